"""Rules: what is done with the triplets, before the base update (on gradients) or after it (on weights).

A rule is a value: it holds the options that groups have by default, and no state. What counts in a step are the options
in the optimizer's param groups, and its tracker's state in ``optimizer.state``. So both travel with ``state_dict``,
deepcopy and pickle.
"""

from .decay import SpectralDecay
from .norm_scale import NormScale, targets_of
from .penalty import SpectralPenalty

__all__ = ["NormScale", "SpectralDecay", "SpectralPenalty", "targets_of"]
