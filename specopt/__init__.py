"""Spectral control of weights inside ``optimizer.step()``.

Swap the optimizer class, and every weight matrix' largest singular value is regularized (:class:`SNRSGD`) or set
(:class:`NormScaleAdamW`), with no term in the loss and no layer wrapper.
"""

from . import init, operators
from .adamw import NormScaleAdamW
from .groups import param_groups
from .report import SpectralRow, spectral_report
from .rules import Compose, NormScale, SpectralDecay, SpectralPenalty
from .sgd import SNRSGD
from .wrapping import unwrap, wrap

__version__ = "0.1.0"

__all__ = [
    "SNRSGD",
    "Compose",
    "NormScale",
    "NormScaleAdamW",
    "SpectralDecay",
    "SpectralPenalty",
    "SpectralRow",
    "init",
    "operators",
    "param_groups",
    "spectral_report",
    "unwrap",
    "wrap",
]
