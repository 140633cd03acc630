"""Lipschitz constants of activations, exact or rounded up: of elementwise ones the largest slope."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from .gram import in_double, root
from .known import Call, NotKnown

GELU = 1.128904145186
"""Φ(√2) + √2 φ(√2): the derivative Φ(x) + x φ(x) is steepest where x² = 2."""
GELU_TANH = 1.128993068659
"""At x = 1.4185; like the two below, the derivative where the second one vanishes, in 40 digits, rounded up."""
SILU = 1.099839320129
"""At x = 2.39936."""
MISH = 1.088498161252
"""At x = 1.49057."""
SELU = 1.758099340848
"""``scale · α``, the slope at 0 from below."""

FIXED: dict[type[nn.Module], float] = {
    nn.ReLU: 1.0,
    nn.Hardtanh: 1.0,  # and ReLU6
    nn.Tanh: 1.0,
    nn.Sigmoid: 0.25,
    nn.LogSigmoid: 1.0,
    nn.Softsign: 1.0,
    nn.Tanhshrink: 1.0,
    nn.Softshrink: 1.0,
    nn.Hardsigmoid: 1 / 6 * (1 + 2.0**-52),
    nn.Hardswish: 1.5,  # (2x + 3) / 6 at x = 3
    nn.SiLU: SILU,
    nn.Mish: MISH,
    nn.SELU: SELU,
    # the Jacobian diag(p) − ppᵀ is symmetric, its rows' absolute sums are 2 p_i (1 − p_i)
    nn.Softmax: 0.5,
    nn.Softmin: 0.5,
    nn.Softmax2d: 0.5,
}


def _gelu(module: nn.GELU, call: Call) -> float:
    return GELU_TANH if module.approximate == "tanh" else GELU


def _leaky_relu(module: nn.LeakyReLU, call: Call) -> float:
    return max(1.0, abs(module.negative_slope))


def _rrelu(module: nn.RReLU, call: Call) -> float:
    return max(1.0, abs(module.lower), abs(module.upper))


def _prelu(module: nn.PReLU, call: Call) -> float:
    largest = float(in_double(module.weight).abs().max()) if module.weight.numel() else 1.0
    return max(1.0, largest) if largest == largest else math.inf


def _elu(module: nn.ELU, call: Call) -> float:
    return max(1.0, abs(module.alpha))


def _celu(module: nn.CELU, call: Call) -> float:
    if module.alpha > 0:
        return 1.0
    raise NotKnown(f"grows without bound for alpha={module.alpha}")


def _softplus(module: nn.Softplus, call: Call) -> float:
    """The slope of ``log(1 + e^(βx)) / β``, which is the logistic function of βx, below 1.

    From ``x = threshold / β`` on torch takes x itself in place of the formula: a jump of ``log(1 + e^-threshold) / β``
    that, like all rounding, is no part of the map that is bounded. For thresholds from 15 on it is below half a unit in
    the last place of a float32 there, though not of a float64.
    """
    if module.threshold >= 15 and module.beta > 0:
        return 1.0
    raise NotKnown(f"jumps for threshold={module.threshold}, beta={module.beta}")


def _threshold(module: nn.Threshold, call: Call) -> float:
    if module.threshold == module.value:
        return 1.0
    raise NotKnown(f"jumps from value={module.value} to threshold={module.threshold}")


def _log_softmax(module: nn.LogSoftmax, call: Call) -> float:
    """The Jacobian I − 1pᵀ and the projection 1pᵀ, where it is not 0, have the same norm ``√n ‖p‖ <= √n``."""
    given = call.example("the number of classes is")
    dim = module.dim
    if dim is None:
        raise NotKnown("has dim=None, which depends on the shape")
    return root(given.shape[dim])


def _always(value: float) -> Callable[[Any, Call], float]:
    return lambda module, call: value


ACTIVATIONS: dict[type[nn.Module], Callable[[Any, Call], float]] = {
    **{kind: _always(value) for kind, value in FIXED.items()},
    nn.GELU: _gelu,
    nn.LeakyReLU: _leaky_relu,
    nn.RReLU: _rrelu,
    nn.PReLU: _prelu,
    nn.ELU: _elu,
    nn.CELU: _celu,
    nn.Softplus: _softplus,
    nn.Threshold: _threshold,
    nn.LogSoftmax: _log_softmax,
}
