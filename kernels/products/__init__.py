"""The two products that touch a weight: ``Y = W V`` and, on the transposed view, ``Z = Wᵀ U``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backend import backend_for
from . import reference

MAX_COLUMNS = 64


def skinny_products(
    matrices: Sequence[Tensor],
    blocks: Sequence[Tensor],
    *,
    out: Sequence[Tensor] | None = None,
    active: Tensor | None = None,
) -> list[Tensor]:
    """``out_b = W_b B_b`` for a list of matrices, each read once.

    ``Z = Wᵀ U`` is the same call on ``W.mT``: any strides are taken as they are. Sums run in a fixed order, so the same
    input gives the same bits.

    Args:
        matrices: ``W_b`` of shape (m_b, n_b), any strides; float32, bfloat16, float16 (float64: reference only).
        blocks: ``B_b`` of shape (n_b, k_b), unit column stride, 1 <= k_b <= 64, float32 (float64 beside float64
            matrices).
        out: where to write, (m_b, k_b) with unit column stride, in the blocks' dtype; new tensors if absent.
        active: bool (B,) on the matrices' device; entries of ``out`` where it is False stay as they are.

    Returns:
        ``out``.

    Raises:
        ValueError: shapes that do not fit, or more than 64 columns.
    """
    for matrix, block in zip(matrices, blocks, strict=True):
        if matrix.ndim != 2 or block.ndim != 2 or matrix.shape[1] != block.shape[0]:
            raise ValueError(f"cannot multiply {tuple(matrix.shape)} by {tuple(block.shape)}")
        if not 1 <= block.shape[1] <= MAX_COLUMNS:
            raise ValueError(f"blocks must have 1 to {MAX_COLUMNS} columns, got {block.shape[1]}")
    if out is None:
        sizes = zip(matrices, blocks, strict=True)
        out = [torch.empty(w.shape[0], b.shape[1], dtype=b.dtype, device=b.device) for w, b in sizes]
    if not matrices:
        return []
    if backend_for(blocks[0].device, blocks[0].dtype) == "triton":
        from . import device

        device.skinny_products(matrices, blocks, out, active)
    else:
        reference.skinny_products(matrices, blocks, out, active)
    return list(out)
