"""Warnings: whom they point at, and what is named in them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .views import could_be_controlled, is_controlled

LISTED = 8
"""Names in a warning, of however many."""


def outside() -> int:
    """The ``stacklevel`` of the first caller that is not of this package, for a warning of the function that asks."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("specopt."):
        frame, level = frame.f_back, level + 1
    return level


def listing(names: Sequence[str], between: str = ", ") -> str:
    return between.join([*names[:LISTED], *(["..."] if len(names) > LISTED else [])])


def warn_of_unclear(groups: Iterable[Mapping[str, Any]], names: Mapping[Tensor, str]) -> None:
    """One warning of bare tensors that are not controlled because their shape does not tell how to read them."""
    unclear = [
        f"{names[param]} {tuple(param.shape)}"
        for group in groups
        for param in group["params"]
        if group["spectral"] and could_be_controlled(param) and not is_controlled(param, group)
    ]
    if unclear:
        warnings.warn(
            f"{len(unclear)} parameter(s) of a shape that does not tell how to read them are not controlled: "
            f"{listing(unclear)}. Give the model in place of its parameters, or specopt.param_groups(model); or vouch "
            "for them with view= in a group, or put them into one with spectral=False.",
            stacklevel=outside(),
        )
