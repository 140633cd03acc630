"""Warnings: whom they point at, and what is named in them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .capture import is_captured
from .options import OF_RULES
from .rules.operator import geometries_in
from .tracker.common import HostCopy
from .views import could_be_controlled, is_controlled

if TYPE_CHECKING:
    from .session import Controlled, Ruled

LISTED = 8
"""Names in a warning, of however many."""


def outside() -> int:
    """The ``stacklevel`` of the first caller that is neither of this package nor of torch, for a warning of the
    function that asks."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("specopt.", "torch.")):
        frame, level = frame.f_back, level + 1
    return level


def names_in(groups: Iterable[Mapping[str, Any]]) -> Mapping[Tensor, str]:
    """A name for every parameter: its own where the groups have names, else its place. That too where somebody has put
    parameters into a group, or taken some out, and left its names as they were."""
    names: dict[Tensor, str] = {}
    for i, group in enumerate(groups):
        params, known = group["params"], group.get("param_names") or ()
        if len(known) != len(params):
            known = [f"{i}.{j}" for j in range(len(params))]
        names.update(zip(params, known, strict=True))
    return names


def listing(names: Sequence[str], between: str = ", ") -> str:
    return between.join([*names[:LISTED], *(["..."] if len(names) > LISTED else [])])


def warn_of_groups(groups: Sequence[Mapping[str, Any]], optimizer: Ruled) -> None:
    """What of groups that are new stays without effect."""
    _warn_of_unclear(groups, optimizer.names())
    if optimizer.base_is_known:  # the options of another may have such names too, as GaLore's ``rank``
        _warn_of_idle_options(groups, optimizer)


def _warn_of_unclear(groups: Iterable[Mapping[str, Any]], names: Mapping[Tensor, str]) -> None:
    """One warning of bare tensors that are not controlled because their shape does not tell how to read them."""
    unclear = [
        f"{names[param]} {tuple(param.shape)}"
        for group in groups
        for param in group["params"]
        if group["spectral"] and could_be_controlled(param) and not is_controlled(param, group)
        if id(param) not in geometries_in(group)
    ]
    if unclear:
        warnings.warn(
            f"{len(unclear)} parameter(s) of a shape that does not tell how to read them are not controlled: "
            f"{listing(unclear)}. Give the model in place of its parameters, or specopt.param_groups(model); or vouch "
            "for them with view= in a group, or put them into one with spectral=False.",
            stacklevel=outside(),
        )


def _warn_of_idle_options(groups: Iterable[Mapping[str, Any]], optimizer: Ruled) -> None:
    """One warning of options that groups have of another rule."""
    idle = {name for group in groups for name in OF_RULES if name in group} - set(optimizer.rule.names)
    if idle:
        warnings.warn(
            f"{listing(sorted(idle))} in a group: {type(optimizer).__name__} has no such option, and goes on without.",
            stacklevel=outside(),
        )


def tell_of_first_steps(optimizer: Ruled, ratios: Iterable[tuple[Sequence[Controlled], HostCopy]]) -> None:
    """Takes up the ratios of norm and target that first steps have found, and warns once of those that have arrived on
    the host and are far from 1."""
    waiting = optimizer.__dict__.setdefault("_waiting", [])
    waiting.extend(ratios)
    if waiting and is_captured(optimizer):  # to ask whether a copy has arrived would end the capture
        return
    arrived: list[tuple[Controlled, float]] = []
    still = []
    for matrices, copy in waiting:
        found = copy.peek()
        if found is None:
            still.append((matrices, copy))
        else:
            arrived.extend(zip(matrices, found.tolist(), strict=True))
    optimizer.__dict__["_waiting"] = still
    far = [(matrix, ratio) for matrix, ratio in arrived if not 0.5 <= ratio <= 2]
    if far and not optimizer.__dict__.get("_warned"):
        optimizer.__dict__["_warned"] = True
        _warn_of_first_steps(far, optimizer.names())


def _warn_of_first_steps(far: Sequence[tuple[Controlled, float]], names: Mapping[Tensor, str]) -> None:
    listed = ", ".join(f"{names[m.param]}{m.suffix} {m.shape}: {r:.3g}" for m, r in far[:4])
    warnings.warn(
        f"the first step moves {len(far)} weight(s) whose norm is not within [0.5, 2] of its target "
        f"(norm / target: {listed}{', ...' if len(far) > 4 else ''}). Start from specopt.init.scaled_orthogonal_, "
        'keep the norm there is with target="initial", or only lower it, with mode="cap".',
        stacklevel=outside(),
    )
