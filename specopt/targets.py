"""Targets ``sigma*``: the spectral norm, or from it the Frobenius norm, that a weight is steered to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

NAMED_TARGETS = ("channels", "fan", "size", "initial")


@dataclass(frozen=True)
class MatrixInfo:
    """What a callable target is told of a matrix."""

    name: str
    """The parameter's; its place ``"group.index"`` in an optimizer that was built without names."""
    shape: tuple[int, ...]
    """``(out, in, *kernel)`` of this matrix, whatever order the parameter has; of the whole of a sharded one."""
    part: int | None
    """Which of the matrices of its parameter; None for the only one."""
    parameter_shape: tuple[int, ...]


Entry = float | Sequence[float] | None
"""The target of a parameter: of all of its matrices, of each of them, or none where control is off."""
Target = str | float | Callable[[MatrixInfo], float] | Sequence[Entry]
"""In a group that has been added to an optimizer: a name other than ``"size"``, a number, or an :data:`Entry` for each
parameter, in a list beside ``params``."""


def target_sigma(shape: Sequence[int], target: str | float, positions: float = 1.0) -> float:
    """``sigma*`` of a matrix of shape ``(out, in, *kernel)``; of a grouped conv, one group's.

    ``"channels"``: ``sqrt(out / in)``; ``"fan"``: ``sqrt(out / (in·k·k))``; ``"size"``:
    ``sqrt(size_out / size_in)`` with size ``C·H·W``, which is ``sqrt(out / in)`` times the root of ``positions``, the
    layer's output positions over its input positions (a group has its share of both sizes); a float: itself.
    ``"initial"`` is known only from the weight, and nan here. Source of ``"size"``: Norm Scaling's initialization;
    ``"channels"`` is the same with channels in place of layer sizes.
    """
    if not isinstance(target, str):
        return float(target)
    if target == "initial":
        return math.nan
    rows, columns = shape[0], shape[1]
    if target == "fan":
        columns = math.prod(shape[1:])
    return math.sqrt(rows / columns * (positions if target == "size" else 1.0))


def target_frobenius(shape: Sequence[int], target: str | float) -> float:
    """``F* = sqrt(min(rows, cols)) · sigma*``: the Frobenius norm where all singular values are ``sigma*``."""
    smaller = min(shape[0], math.prod(shape[1:]))
    return math.sqrt(smaller) * target_sigma(shape, target)


def is_positive(value: Any) -> bool:
    """Whether it is a positive number that a float can hold, and no bool."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return 0 < float(value) < math.inf
    except OverflowError:  # of an integer
        return False


def check_target(target: Any) -> None:
    """Whether it is a target by its kind. What a callable returns and a list holds: see :mod:`specopt.settling`.

    Raises:
        ValueError: it is not, naming what it may be.
    """
    if isinstance(target, str):
        known = target in NAMED_TARGETS
    else:
        known = is_positive(target) or callable(target) or isinstance(target, list | tuple)
    if not known:
        names = ", ".join(map(repr, NAMED_TARGETS))
        instead = " (give float(target): a group holds plain numbers)" if isinstance(target, Tensor) else ""
        raise ValueError(
            f"target must be one of {names}, a positive finite number, a callable, or a list with an entry for each "
            f"parameter of its group, got {target!r}{instead}"
        )


def is_individual(target: Any) -> bool:
    """Whether somebody has chosen it for certain layers: a number, numbers or a callable, and no name."""
    return target is not None and not isinstance(target, str)


def number(value: Any, name: str) -> float:
    """What a callable has returned for the matrix, as a plain number; a tensor of one element is one.

    Raises:
        ValueError: anything that is not positive and finite, naming the matrix.
    """
    plain = value.item() if isinstance(value, Tensor) and value.numel() == 1 and value.dtype != torch.bool else value
    if not is_positive(plain):
        raise ValueError(f"target of {name} must be a positive finite number, got {value!r}")
    return float(plain)
