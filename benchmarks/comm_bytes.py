"""What a settled step of sharded weights sends, from shapes alone: every all-reduce with its payload.

It knows nothing of the code that sends: formulas and table stand in docs/distributed.md, and
:mod:`benchmarks.comm_count` holds them against what steps are seen to send. A settled step makes no more pairs of
products than it has to: it is not among the first 20, no sigma was lost, and no residual is above ``tolerance``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import reduce
from itertools import zip_longest
from typing import NamedTuple

import torch

BLOCK = 32
"""The default ``block`` of all rules."""
WIDEST = 64
"""Columns of a block, at most."""


class Block(NamedTuple):
    """How many columns follow the spectrum, and how many are a probe of the weight."""

    k: int
    a: int

    @classmethod
    def of(cls, block: int, rank: int = 1) -> Block:
        """Four columns for each triplet where there are several."""
        width = block if rank == 1 else min(max(block, 4 * rank), WIDEST)
        return cls(width - width // 8, width // 8)

    @property
    def solves(self) -> int:
        """The longest short side of a matrix that is solved, and not tracked."""
        return min(2 * (self.k + self.a), WIDEST)


@dataclass(frozen=True)
class Weight:
    """A parameter that is one matrix: its first dimension by all others."""

    shape: tuple[int, ...]
    """Of the whole."""
    cut: frozenset[int] = frozenset({0})
    """The dimensions that are cut up."""
    sharers: Hashable = "all"
    """The ranks among which it is cut up, by any name."""
    dtype: torch.dtype = torch.float32

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def columns(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def rows_cut(self) -> bool:
        return 0 in self.cut

    @property
    def columns_cut(self) -> bool:
        return bool(self.cut - {0})

    @property
    def sums_in(self) -> torch.dtype:
        """The dtype of products; Gram matrices are float64."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


class Numbers(NamedTuple):
    """A tensor that is to be summed over ranks."""

    length: int
    dtype: torch.dtype


class Asks(NamedTuple):
    """What a weight has summed in a step."""

    now: tuple[Numbers, ...]
    """One after the other."""
    late: Numbers | None = None
    """Due by the next step."""


class Payload(NamedTuple):
    """What one all-reduce takes from each rank."""

    bytes: int
    dtype: torch.dtype
    sharers: Hashable
    late: bool = False


Rule = Callable[[Weight], Asks]


def norm_scale(weight: Weight, block: int = BLOCK, rank: int = 1) -> Asks:
    """Of ``NormScale(norm="spectral")`` and ``SpectralDecay``: the Gram matrix of ``Y = W V``, then ``Z = Wᵀ [U | Ω]``.

    It is of Wᵀ where only columns are cut. Several triplets call for a second Z, within the step, unless ``max_passes``
    is 1.
    """
    columns = Block.of(block, rank)
    if min(weight.rows, weight.columns) <= columns.solves:
        return Asks((_solved(weight),))
    m, n, complete = weight.rows, weight.columns, not weight.columns_cut
    if weight.columns_cut and not weight.rows_cut and m != n:
        m, n, complete = n, m, True
    first = _gram(columns.k) if complete else Numbers(m * columns.k, weight.sums_in)
    returned = Numbers(n * sum(columns), weight.sums_in)
    return Asks((first,) if rank == 1 else (first, returned), returned)


def penalty(weight: Weight, block: int = BLOCK, *, right: bool = True) -> Asks:
    """Of ``SpectralPenalty`` and SNRSGD: one half product, from the right (``W V``) in every even step, else from the
    left. Where its rows are cut up as a dimension of the parameter is, the Gram matrix of the product and of the blocks
    beside it; else the product itself."""
    columns = Block.of(block)
    if min(weight.rows, weight.columns) <= columns.solves:
        return Asks((_solved(weight),))
    width = sum(columns)
    if right:
        in_pieces, length = not weight.columns_cut, weight.rows
    else:
        in_pieces, length = not weight.rows_cut and len(weight.shape) == 2, weight.columns
    return Asks((_gram(2 * width) if in_pieces else Numbers(length * width, weight.sums_in),))


def frobenius(weight: Weight) -> Asks:
    """A sum of squares."""
    return Asks((Numbers(1, torch.float64),))


def operator(weight: Weight, times: int = 1) -> Asks:
    """Of a convolution under ``conv="operator"``: its kernel, twice under a penalty and corrections."""
    return Asks((Numbers(weight.rows * weight.columns, weight.dtype),) * times)


def _solved(weight: Weight) -> Numbers:
    """The Gram matrix on the short side, or all of the weight where that side is cut."""
    wide = weight.rows < weight.columns
    if weight.rows_cut if wide else weight.columns_cut:
        return Numbers(weight.rows * weight.columns, weight.sums_in)
    return _gram(min(weight.rows, weight.columns))


def _gram(width: int) -> Numbers:
    return Numbers(width * width, torch.float64)


def sent(weights: Iterable[Weight], rule: Rule) -> list[Payload]:
    """The all-reduces of a step, in order. What the same ranks sum at the same time goes in one, of the widest dtype.

    That is of ranks that have a process group of their own for it (``specopt/sharding/communicators.py``).
    """
    asked = [(weight.sharers, rule(weight)) for weight in weights]
    rounds = zip_longest(*(asks.now for _, asks in asked))
    packed = [_packed([(among, one) for (among, _), one in zip(asked, each, strict=True) if one]) for each in rounds]
    late = _packed([(among, asks.late) for among, asks in asked if asks.late])
    return [payload for each in packed for payload in each] + [payload._replace(late=True) for payload in late]


def _packed(parts: list[tuple[Hashable, Numbers]]) -> list[Payload]:
    by_sharers: dict[Hashable, list[Numbers]] = {}
    for sharers, numbers in parts:
        by_sharers.setdefault(sharers, []).append(numbers)
    payloads = []
    for sharers, found in by_sharers.items():
        dtype = reduce(torch.promote_types, (numbers.dtype for numbers in found))
        payloads.append(Payload(dtype.itemsize * sum(numbers.length for numbers in found), dtype, sharers))
    return payloads
