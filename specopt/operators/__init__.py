"""Convolutions as linear operators between feature maps: their norm, what bounds it, and how it is followed."""

from .bound import flattened_bound, flattened_factors
from .conv import ConvOperator
from .geometry import Geometry, parse
from .norm import operator_norm
from .tracker import COLD, START, WARM, Effort, Found, follow, start

__all__ = [
    "COLD",
    "START",
    "WARM",
    "ConvOperator",
    "Effort",
    "Found",
    "Geometry",
    "flattened_bound",
    "flattened_factors",
    "follow",
    "operator_norm",
    "parse",
    "start",
]
