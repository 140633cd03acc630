"""Sums over ranks, packed: what all matrices of a step ask for at the same time goes in one all-reduce.

A step of sharded matrices is written as a generator, one for each list of matrices that is served alike. It yields
what it has to have summed, and is sent the sums::

    grams = yield now(matrices, partial_grams)
    ...
    products = yield late(matrices, partial_products)

:func:`run` takes such generators through their steps together. Every rank yields the same in the same order, whatever
its shard holds: what is decided on the way is decided from sums, which are the same bits on every rank.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .views import ShardedMatrix

T = TypeVar("T")


class Asked(NamedTuple):
    """What a generator has to have summed over the ranks."""

    parts: list[Tensor]
    groups: list[tuple[ProcessGroup, ...]]
    """Of each part."""
    late: bool = False
    """Its sums are due by the next step only. It asks for nothing after that."""


Exchange = Generator[Asked, list[Tensor], T]


def now(matrices: Sequence[ShardedMatrix], parts: Iterable[Tensor]) -> Asked:
    return Asked(list(parts), [matrix.cut.groups for matrix in matrices])


def late(matrices: Sequence[ShardedMatrix], parts: Iterable[Tensor]) -> Asked:
    return Asked(list(parts), [matrix.cut.groups for matrix in matrices], late=True)


def run(works: Iterable[Exchange[Any]]) -> Due:
    """Takes generators to their ends; those that ask for something late up to there."""
    waiting = [(work, asked) for work in works if (asked := _resumed(work, None)) is not None]
    put_off = []
    while waiting:
        put_off += [(work, asked) for work, asked in waiting if asked.late]
        waiting = [(work, asked) for work, asked in waiting if not asked.late]
        packs = _packed([asked for _, asked in waiting])
        for pack in packs:
            pack.sum()
        sums = _unpacked(packs, [asked for _, asked in waiting])
        resumed = [(work, _resumed(work, found)) for (work, _), found in zip(waiting, sums, strict=True)]
        waiting = [(work, asked) for work, asked in resumed if asked is not None]
    return Due.of(put_off)


@dataclass
class Due:
    """Sums on their way, and the generators that wait for them."""

    waiting: list[tuple[Exchange[Any], Asked]]
    packs: list[_Pack]

    @classmethod
    def of(cls, waiting: list[tuple[Exchange[Any], Asked]]) -> Due:
        packs = _packed([asked for _, asked in waiting])
        for pack in packs:
            pack.begin()
        return cls(waiting, packs)

    def finish(self) -> None:
        """Waits for the sums and takes the generators to their ends. Nothing, where that has been done."""
        waiting, self.waiting = self.waiting, []
        if not waiting:
            return
        for pack in self.packs:
            pack.end()
        for (work, _), found in zip(waiting, _unpacked(self.packs, [asked for _, asked in waiting]), strict=True):
            asked = _resumed(work, found)
            assert asked is None, "what is late is last"
        self.packs = []


def _resumed(work: Exchange[Any], sums: list[Tensor] | None) -> Asked | None:
    """What a generator asks for next; None at its end."""
    try:
        return next(work) if sums is None else work.send(sums)
    except StopIteration:
        return None


@dataclass
class _Pack:
    """Tensors that one all-reduce sums, over one group after the other."""

    groups: tuple[ProcessGroup, ...]
    places: list[tuple[int, int]]
    """Of each tensor: which generator's, and which of its parts."""
    buffer: Tensor
    work: Any = None

    def sum(self) -> None:
        self.begin()
        self.end()

    def begin(self) -> None:
        from torch.distributed import all_reduce

        for group in self.groups[:-1]:
            all_reduce(self.buffer, group=group)
        self.work = all_reduce(self.buffer, group=self.groups[-1], async_op=True)

    def end(self) -> None:
        if self.work is not None:
            self.work.wait()
            self.work = None


def _packed(asked: Sequence[Asked]) -> list[_Pack]:
    """One pack for each device and tuple of groups, in the widest dtype of its parts."""
    chosen: dict[Any, list[tuple[int, int]]] = {}
    for i, one in enumerate(asked):
        for j, (part, groups) in enumerate(zip(one.parts, one.groups, strict=True)):
            chosen.setdefault((part.device, groups), []).append((i, j))
    packs = []
    for (_, groups), places in chosen.items():
        parts = [asked[i].parts[j] for i, j in places]
        dtype = reduce(torch.promote_types, (part.dtype for part in parts))
        packs.append(_Pack(groups, places, torch.cat([part.reshape(-1).to(dtype) for part in parts])))
    return packs


def _unpacked(packs: Sequence[_Pack], asked: Sequence[Asked]) -> list[list[Tensor]]:
    """The sums of each generator's parts."""
    sums: list[list[Tensor]] = [list(one.parts) for one in asked]
    for pack in packs:
        lengths = [asked[i].parts[j].numel() for i, j in pack.places]
        for (i, j), found in zip(pack.places, torch.split(pack.buffer, lengths), strict=True):
            part = asked[i].parts[j]
            sums[i][j] = found.view(part.shape).to(part.dtype)
    return sums
