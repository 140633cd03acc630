"""Torch reference of the skinny products.

On the CPU a product is made in slices of the matrix' rows in memory, as the passes make it while a slice is in the
cache: the same bits either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..backend import keep, live

SLICE = 1 << 19
"""Entries of a slice: 2 MiB of float32, and enough for a few threads."""
LANES = 16
"""MKL makes a product of 28 columns slower than one of 32, and one of 8 slower than one of 16."""
ALIASED = 512
"""Rows whose length is a multiple of so many entries fall into few sets of a cache: read by columns, a copy with gaps
between them is faster."""
LARGE = 1 << 16
"""Entries of a matrix for which either pays."""


def lies_across(matrix: Tensor) -> bool:
    """Whether rows in memory are the matrix' columns."""
    return matrix.stride(0) < matrix.stride(1)


def slices(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Tensors (m, n) laid out alike, some rows of each at a time; whole on a device, which has no use for it."""
    height = max(1, SLICE // max(1, tensors[0].shape[1]))
    if height >= tensors[0].shape[0] or tensors[0].device.type != "cpu":
        yield tuple(tensors)
    else:
        yield from zip(*(torch.split(tensor, height) for tensor in tensors), strict=True)


def widened(part: Tensor, dtype: torch.dtype) -> Tensor:
    """A slice in the dtype that sums are kept in, without gaps."""
    return part if part.dtype == dtype and part.is_contiguous() else part.to(dtype).contiguous()


class HalfProduct:
    """``out = M B``, or ``Mᵀ B`` where ``summed``, of a matrix M whose slices of rows come one after the other."""

    def __init__(self, block: Tensor, out: Tensor, summed: bool, size: int) -> None:
        large = size >= LARGE and out.device.type == "cpu"
        extra = -block.shape[1] % LANES if large else 0
        self.out, self.summed, self.rows = out, summed, 0
        self.aliased = large and summed and out.shape[0] % ALIASED == 0
        self.room: Tensor | None = None
        self.block = torch.nn.functional.pad(block, (0, extra)) if extra else block
        self.wide = out.new_empty(out.shape[0], block.shape[1] + extra) if extra else out

    def add(self, part: Tensor) -> None:
        first, last = self.rows, self.rows + part.shape[0]
        whole = part.shape[0] == (self.block if self.summed else self.wide).shape[0]
        if self.aliased:
            if self.room is None:
                self.room = part.new_empty(part.shape[0], part.shape[1] + LANES)
            part = self.room[: part.shape[0], : part.shape[1]].copy_(part)
        if not self.summed:
            torch.mm(part, self.block, out=self.wide if whole else self.wide[first:last])
        elif first == 0:
            torch.mm(part.mT, self.block if whole else self.block[:last], out=self.wide)
        else:
            self.wide.addmm_(part.mT, self.block[first:last])
        self.rows = last

    def finish(self) -> None:
        if self.wide is not self.out:
            self.out.copy_(self.wide[:, : self.out.shape[1]])


def half_product(matrix: Tensor, block: Tensor, out: Tensor) -> None:
    """``out = W B``."""
    across = lies_across(matrix)
    half = HalfProduct(block, out, across, matrix.numel())
    for (part,) in slices([matrix.mT if across else matrix]):
        half.add(widened(part, block.dtype))
    half.finish()


def skinny_products(
    matrices: Sequence[Tensor], blocks: Sequence[Tensor], out: Sequence[Tensor], active: Tensor | None
) -> None:
    for i in live(active, len(matrices)):
        if active is None or active.device.type == "cpu":
            half_product(matrices[i], blocks[i], out[i])
        else:
            new = torch.empty_like(out[i])
            half_product(matrices[i], blocks[i], new)
            out[i].copy_(keep(active, i, new, out[i]))
