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
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .communicators import communicators

if TYPE_CHECKING:
    from .cut import Sharers
    from .views import ShardedMatrix

T = TypeVar("T")


class Asked(NamedTuple):
    """What a generator has to have summed over the ranks."""

    parts: list[Tensor]
    sharers: list[Sharers]
    """Of each part."""
    late: bool = False
    """Its sums are due by the next step only. It asks for nothing after that."""


Exchange = Generator[Asked, list[Tensor], T]


def now(matrices: Sequence[ShardedMatrix], parts: Iterable[Tensor]) -> Asked:
    return Asked(list(parts), [matrix.cut.sharers for matrix in matrices])


def late(matrices: Sequence[ShardedMatrix], parts: Iterable[Tensor]) -> Asked:
    return Asked(list(parts), [matrix.cut.sharers for matrix in matrices], late=True)


def meet(matrices: Sequence[ShardedMatrix]) -> None:
    """Makes the process groups that sums of these matrices go through, as far as they are not there yet.

    Raises:
        ValueError: a device that the weights' process group does not serve.
    """
    for sharers, device in dict.fromkeys((matrix.cut.sharers, matrix.weight.device) for matrix in matrices):
        communicators(sharers, device)


def run(works: Iterable[Exchange[Any]]) -> Due:
    """Takes generators to their ends; those that ask for something late up to there."""
    waiting = [(work, asked) for work in works if (asked := _resumed(work, None)) is not None]
    put_off, rounds = [], 0
    while waiting:
        put_off += [(work, asked) for work, asked in waiting if asked.late]
        waiting = [(work, asked) for work, asked in waiting if not asked.late]
        rounds += bool(waiting)
        sums = _Sums([asked for _, asked in waiting]).wait()
        resumed = [(work, _resumed(work, found)) for (work, _), found in zip(waiting, sums, strict=True)]
        waiting = [(work, asked) for work, asked in resumed if asked is not None]
    return Due([work for work, _ in put_off], _Sums([asked for _, asked in put_off]), rounds)


@dataclass
class Due:
    """Sums on their way, and the generators that wait for them."""

    waiting: list[Exchange[Any]]
    sums: _Sums
    rounds: int
    """Of sums that were waited for on the way."""

    def finish(self) -> None:
        """Waits for the sums and takes the generators to their ends: no other rank has to do so at the same time."""
        for work, found in zip(self.waiting, self.sums.wait(), strict=True):
            asked = _resumed(work, found)
            assert asked is None, "what is late is last"


def _resumed(work: Exchange[Any], sums: list[Tensor] | None) -> Asked | None:
    """What a generator asks for next; None at its end."""
    try:
        return next(work) if sums is None else work.send(sums)
    except StopIteration:
        return None


class _Sums:
    """Sums that are under way: one all-reduce for each device and ranks that share something, of all that these are to
    sum packed together. Of the parts themselves nothing is kept but their shapes."""

    def __init__(self, asked: Sequence[Asked]) -> None:
        self.counts = [len(one.parts) for one in asked]
        parts = [part for one in asked for part in one.parts]
        sharers = [one for each in asked for one in each.sharers]
        self.kinds = [(part.shape, part.dtype) for part in parts]
        chosen: dict[tuple[torch.device, Sharers], list[int]] = {}
        for i, (part, among) in enumerate(zip(parts, sharers, strict=True)):
            chosen.setdefault((part.device, among), []).append(i)
        self.packs = [_Pack([parts[i] for i in places], places, among) for (_, among), places in chosen.items()]

    def wait(self) -> list[list[Tensor]]:
        """The sums of each generator's parts, in their dtypes."""
        sums: dict[int, Tensor] = {}
        for pack in self.packs:
            found = pack.wait([self.kinds[i][0].numel() for i in pack.places])
            sums |= zip(pack.places, found, strict=True)
        shaped = (sums[i].view(shape).to(dtype) for i, (shape, dtype) in enumerate(self.kinds))
        return [list(islice(shaped, count)) for count in self.counts]


class _Pack:
    """Tensors that one all-reduce sums, in the widest of their dtypes."""

    def __init__(self, parts: Sequence[Tensor], places: list[int], sharers: Sharers) -> None:
        from torch.distributed import all_reduce

        dtype = reduce(torch.promote_types, (part.dtype for part in parts))
        self.places, self.buffer = places, torch.cat([part.reshape(-1).to(dtype) for part in parts])
        *others, last = communicators(sharers, self.buffer.device)
        for group in others:
            all_reduce(self.buffer, group=group)
        self.work = all_reduce(self.buffer, group=last, async_op=True)

    def wait(self, lengths: list[int]) -> tuple[Tensor, ...]:
        if self.work is not None:
            self.work.wait()
        return torch.split(self.buffer, lengths)
