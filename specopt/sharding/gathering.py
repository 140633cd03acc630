"""Parameters that every rank takes whole: one sum brings them, and each rank keeps its own part of what they become."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from ..views import Matrix, matrices_of
from .communicators import communicators
from .cut import Part, Sharers, held, is_cut, is_distributed, local_of, placed_like, sharers_of
from .exchange import Asked, Exchange, run

TOGETHER = 1 << 24
"""Entries that are whole at the same time, but of one tensor at least."""


class Whole:
    """All of a parameter: its own memory; or, where it is cut up over ranks, what :func:`gather` has brought."""

    def __init__(self, param: Tensor) -> None:
        here = local_of(param.detach())
        self.param, self.part = param, Part.all_of(here)
        self.sharers: Sharers | None = None
        """Those among whom it is cut up, if it is."""
        self.values = here
        """Of the parameter's dtype, and of the shape of the whole. Before anything is gathered it has no memory, and so
        cannot be taken for the parameter's."""
        if is_cut(param):
            self.part, self.sharers = Part(here, held(param), tuple(param.shape)), sharers_of(param)
            self.values = torch.empty(param.shape, dtype=param.dtype, device="meta")

    def store(self, values: Tensor) -> None:
        """Into the parameter, of which other ranks store their parts, rounded to its dtype."""
        self.values.copy_(values)
        if self.sharers is not None:
            self.part.take(self.values)

    def gradient_with(self, gained: Tensor) -> Tensor:
        """The parameter's gradient, placed as that is, with what the whole gains added."""
        grad = cast(Tensor, self.param.grad)
        if not is_distributed(self.param):
            return grad.to(gained.dtype).add(gained).to(grad.dtype)
        found = torch.empty_like(self.param)
        here = local_of(placed_like(grad, self.param)).to(gained.dtype)
        local_of(found).copy_(here.add(self.part.share_of(gained)))
        return found


def meet(wholes: Sequence[Whole]) -> None:
    """As :func:`specopt.sharding.exchange.meet`, of parameters that are cut up."""
    for sharers, device in dict.fromkeys((whole.sharers, whole.part.here.device) for whole in wholes):
        if sharers is not None:
            communicators(sharers, device)


def gather(wholes: Sequence[Whole]) -> Exchange[None]:
    """Brings what is cut up, as it is now. Exact: of every number one rank has it, and the others add −0."""
    cut = [(whole, whole.sharers) for whole in wholes if whole.sharers is not None]
    if not cut:
        return
    sums = yield Asked([whole.part.amid_zeros() for whole, _ in cut], [sharers for _, sharers in cut])
    for (whole, _), total in zip(cut, sums, strict=True):
        whole.values = total


def bring(wholes: Sequence[Whole]) -> None:
    """:func:`gather`, by itself: all ranks that share something have to ask."""
    run([gather(wholes)])


def whole_matrices(matrices: Sequence[Matrix]) -> Iterator[list[Matrix]]:
    """The same matrices in their order, to look at: where a parameter is cut up over ranks, those of a copy of all of
    it, on every rank. As many at a time as are there between two sums; all at once where nothing is cut up. What comes
    in one sum is the same on all ranks that share it, whatever else they have."""
    by_param: dict[Tensor, list[Matrix]] = {}
    for matrix in matrices:
        by_param.setdefault(matrix.param, []).append(matrix)
    together = _sums_of([param for param in by_param if is_cut(param)])
    brought: dict[Tensor, Whole] = {}
    some: list[Matrix] = []
    for param, of_it in by_param.items():
        if param in together and param not in brought:
            if some:
                yield some
            some = []
            wholes = [Whole(each) for each in together[param]]
            bring(wholes)
            brought |= {whole.param: whole for whole in wholes}
        whole = brought.pop(param, None)
        some += of_it if whole is None else [_of(matrix, whole) for matrix in of_it]
    if some:
        yield some


def _sums_of(params: Sequence[Tensor]) -> dict[Tensor, list[Tensor]]:
    """By parameter those that come in one sum with it."""
    shared: dict[Sharers, list[Tensor]] = {}
    for param in params:
        shared.setdefault(sharers_of(cast(Any, param)), []).append(param)
    together: dict[Tensor, list[Tensor]] = {}
    for own in shared.values():
        for chosen in portions([param.numel() for param in own]):
            some = [own[i] for i in chosen]
            together |= {param: some for param in some}
    return together


def _of(matrix: Matrix, whole: Whole) -> Matrix:
    """A matrix of a parameter, in a copy of all of that."""
    found = matrices_of(whole.values, matrix.group, {}, matrix.columns, matrix.place)[matrix.part or 0]
    return replace(found, param=matrix.param, state=matrix.state)


def portions(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Places, in order, in lists of at most :data:`TOGETHER` entries, or of one place."""
    chosen: list[int] = []
    for i, size in enumerate(sizes):
        if chosen and sum(sizes[j] for j in chosen) + size > TOGETHER:
            yield chosen
            chosen = []
        chosen.append(i)
    if chosen:
        yield chosen
