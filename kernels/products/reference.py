"""Torch reference of the skinny products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend import keep, live

SLICE = 1 << 19
"""Entries of a slice: 2 MiB of float32, and enough for a few threads."""
LARGE = 1 << 16
"""Entries of a matrix from which oneDNN's product is quicker than ``torch.mm`` where one factor has few columns."""
LANES = 16
"""oneDNN makes ``M B`` of 28 columns no quicker than of 32, and much slower where rows are 1024 entries long."""


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


def half_product(matrix: Tensor, block: Tensor, out: Tensor) -> None:
    """``out = W B``."""
    across = lies_across(matrix)
    stored = matrix.mT if across else matrix
    if stored.dtype == block.dtype and (stored.is_contiguous() or stored.device.type != "cpu"):
        out.copy_(_summed(stored, block) if across else _product(stored, block))
        return
    first = 0
    for (part,) in slices([stored]):
        last, wide = first + len(part), widened(part, block.dtype)
        if not across:
            out[first:last] = _product(wide, block)
        elif first == 0:
            out.copy_(_summed(wide, block[:last]))
        else:
            out += _summed(wide, block[first:last])
        first = last


def _product(matrix: Tensor, block: Tensor) -> Tensor:
    """``M B`` of a matrix without gaps."""
    linear = _onednn(matrix)
    if linear is None:
        return matrix @ block
    width = block.shape[1]
    spare = -width % LANES if width > 1 else 0
    padded = torch.nn.functional.pad(block, (0, spare)) if spare else block.contiguous()
    product: Tensor = linear(matrix, padded.mT, None, "none", [], "")
    return product[:, :width]


def _summed(matrix: Tensor, block: Tensor) -> Tensor:
    """``Mᵀ B`` of a matrix without gaps."""
    linear = _onednn(matrix)
    if linear is None or block.shape[1] == 1:
        return matrix.mT @ block
    product: Tensor = linear(block.mT.contiguous(), matrix.mT, None, "none", [], "")
    return product.mT


def _onednn(matrix: Tensor) -> Callable[..., Any] | None:
    """oneDNN's ``x wᵀ``, where it is there and worth its start. Arrays with gaps take it a thousand times as long."""
    if matrix.dtype != torch.float32 or matrix.device.type != "cpu" or matrix.numel() < LARGE:
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch._C._get_mkldnn_enabled() else None


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
