"""Targets ``sigma*``: the spectral norm, or from it the Frobenius norm, that a weight is steered to."""

from __future__ import annotations

import math

from torch import Tensor

Target = str | float
NAMED_TARGETS = ("channels", "fan", "initial")


def target_sigma(param: Tensor, target: Target) -> float:
    """``sigma*`` of a weight of shape (out, in, *kernel).

    ``"channels"``: ``sqrt(out / in)``; ``"fan"``: ``sqrt(out / (in·k·k))``; a float: itself. ``"initial"`` is known
    only from the weight, and nan here. Source of the first: Norm Scaling's initialization, with channels in place of
    layer sizes.
    """
    if not isinstance(target, str):
        return float(target)
    if target == "initial":
        return math.nan
    rows, columns = param.shape[0], param.shape[1]
    if target == "fan":
        columns = math.prod(param.shape[1:])
    return math.sqrt(rows / columns)


def target_frobenius(param: Tensor, target: Target) -> float:
    """``F* = sqrt(min(rows, cols)) · sigma*``: the Frobenius norm where all singular values are ``sigma*``."""
    smaller = min(param.shape[0], math.prod(param.shape[1:]))
    return math.sqrt(smaller) * target_sigma(param, target)
