"""Rules: what is done with the triplets, before the base update (on gradients) or after it (on weights).

A rule is a value: it holds the options that groups have by default, and no state. What counts in a step are the options
in the optimizer's param groups, and its tracker's state in ``optimizer.state``. So both travel with ``state_dict``,
deepcopy and pickle.
"""

from .compose import Compose, find
from .decay import SpectralDecay
from .norm_scale import NormScale
from .penalty import SpectralPenalty
from .steering import targets_of

__all__ = ["Compose", "NormScale", "SpectralDecay", "SpectralPenalty", "find", "targets_of"]
