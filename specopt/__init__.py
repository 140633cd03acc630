"""Spectral control of weights inside ``optimizer.step()``.

Swap the optimizer class, and every weight matrix' largest singular value is regularized (:class:`SNRSGD`) or set
(:class:`NormScaleAdamW`), with no term in the loss and no layer wrapper.
"""

from typing import TYPE_CHECKING

from . import init, operators, penalties
from .adamw import NormScaleAdamW
from .certify import Certificate, CertificateRow, certify
from .groups import param_groups
from .recording import LayerShapes, record_shapes
from .rules import Compose, NormScale, SpectralDecay, SpectralPenalty
from .seeing import SpectralHistory, SpectralMonitor, SpectralReport, SpectralRow, spectral_report
from .sgd import SNRSGD
from .targets import MatrixInfo
from .wrapping import unwrap, wrap

__version__ = "0.1.0"

__all__ = [
    "SNRSGD",
    "Certificate",
    "CertificateRow",
    "Compose",
    "LayerShapes",
    "MatrixInfo",
    "NormScale",
    "NormScaleAdamW",
    "SpectralDecay",
    "SpectralHistory",
    "SpectralMonitor",
    "SpectralPenalty",
    "SpectralReport",
    "SpectralRow",
    "certify",
    "init",
    "operators",
    "param_groups",
    "penalties",
    "record_shapes",
    "spectral_report",
    "unwrap",
    "wrap",
]

if TYPE_CHECKING:
    from . import plots as plots
else:

    def __getattr__(name: str) -> object:
        if name == "plots":  # not before it is asked for: it takes matplotlib
            import importlib

            return importlib.import_module(".plots", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
