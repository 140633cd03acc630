"""What a saved state has to look like to be taken up: looked at before any of it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .tracker.common import BLOCK, LEFT, PROBE, RIGHT, STATS, STEP, Stat
from .views import Matrix

ANY = -1
"""In a shape: a length that options decide."""


def check_options(defaults: Mapping[str, Any], group: Mapping[str, Any], optimizer: str) -> None:
    """Whether a group has what an optimizer of this kind always had.

    Switches came over the years, and an older state may lack them; numbers it may not.

    Raises:
        ValueError: it has not.
    """
    numbers = [name for name, value in defaults.items() if value is not None and not isinstance(value, bool | str)]
    missing = [name for name in numbers if name not in group]
    if missing:
        raise ValueError(
            f"a group to load has no {', '.join(missing)}, which {optimizer} takes: the state is that of another "
            "optimizer, and nothing was loaded"
        )


def check_like_weight(param: Tensor, state: Mapping[str, Any], keys: tuple[str, ...], name: str) -> None:
    """Whether what the base keeps in the shape of the weight has that shape.

    Raises:
        ValueError: it has not.
    """
    for key in keys:
        _check(param, state, key, tuple(param.shape), name)


def check_matrix(matrix: Matrix, name: str) -> None:
    """Whether the tracker's state is that of a matrix with as many rows and columns.

    How many columns a block has is not looked at: where the options ask for others, as after a change of ``block``, the
    tracker restarts in the next step.

    Raises:
        ValueError: it is not, naming the parameter, its shape and what was found.
    """
    rows, columns = matrix.weight.mT.shape if matrix.flipped else matrix.weight.shape
    shapes = {STATS: (len(Stat),), LEFT: (rows, ANY), **dict.fromkeys((BLOCK, PROBE, RIGHT), (columns, ANY))}
    for key, shape in shapes.items():
        _check(matrix.param, matrix.state, key, shape, name)
    step = matrix.state.get(STEP, 0)
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"{STEP} of parameter {name} must be a count of steps, got {step!r}; nothing was loaded")


def _check(param: Tensor, state: Mapping[str, Any], key: str, shape: tuple[int, ...], name: str) -> None:
    value = state.get(key)
    if value is None or _has_shape(value, shape):
        return
    found = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
    wanted = ", ".join("any" if length == ANY else str(length) for length in shape)
    raise ValueError(
        f"{key} of parameter {name}, whose shape is {tuple(param.shape)}, must have the shape ({wanted}), got {found}; "
        "the state is that of another parameter, and nothing was loaded"
    )


def _has_shape(value: Any, shape: tuple[int, ...]) -> bool:
    if not isinstance(value, Tensor) or value.ndim != len(shape):
        return False
    return all(length in (ANY, found) for length, found in zip(shape, value.shape, strict=True))
