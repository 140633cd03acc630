"""Targets ``sigma*``: the spectral norm, or from it the Frobenius norm, that a weight is steered to."""

from __future__ import annotations

import math

from torch import Tensor

Target = str | float
NAMED_TARGETS = ("channels", "fan", "initial")


def target_sigma(weight: Tensor, target: Target) -> float:
    """``sigma*`` of a matrix that is ``(out, in, *kernel)``; of a grouped conv, one group's.

    ``"channels"``: ``sqrt(out / in)``; ``"fan"``: ``sqrt(out / (in·k·k))``; a float: itself. ``"initial"`` is known
    only from the weight, and nan here. Source of the first: Norm Scaling's initialization, with channels in place of
    layer sizes.
    """
    if not isinstance(target, str):
        return float(target)
    if target == "initial":
        return math.nan
    rows, columns = weight.shape[0], weight.shape[1]
    if target == "fan":
        columns = math.prod(weight.shape[1:])
    return math.sqrt(rows / columns)


def target_frobenius(weight: Tensor, target: Target) -> float:
    """``F* = sqrt(min(rows, cols)) · sigma*``: the Frobenius norm where all singular values are ``sigma*``."""
    smaller = min(weight.shape[0], math.prod(weight.shape[1:]))
    return math.sqrt(smaller) * target_sigma(weight, target)
