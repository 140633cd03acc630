"""Operations on skinny blocks (many rows, at most 64 columns): Gram matrices, mixes of columns, distances.

Blocks are 2-D, float32 or float64, with unit column stride and any row stride (a slice of columns is a block).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backend import backend_for
from . import reference

Term = tuple[Sequence[Tensor], Tensor]


def grams(blocks: Sequence[Tensor], *, width: int | None = None) -> tuple[Tensor, Tensor]:
    """``G_b = (X_b / s_b)ᵀ (X_b / s_b)`` with ``s_b = max |X_b|``, so that squares neither underflow nor overflow.

    Args:
        blocks: ``X_b`` of shape (n_b, k_b).
        width: ``K``, the padded size of the result; the largest ``k_b`` if absent.

    Returns:
        ``G`` (B, K, K), zero beyond ``k_b``, and ``s`` (B,); ``s_b`` is 1 for a block of zeros, and of subnormal
        numbers, which count for zeros: their inverses may be none. A non-finite entry in a block leaves a non-finite
        entry in its ``G_b`` or ``s_b``.
    """
    width = width or max(block.shape[1] for block in blocks)
    if backend_for(blocks[0].device, blocks[0].dtype) == "triton":
        from . import device

        return device.grams(blocks, width)
    return reference.grams(blocks, width)


def mixes(terms: Sequence[Term], out: Sequence[Tensor], *, active: Tensor | None = None) -> list[Tensor]:
    """``out_b = Σ_t X_tb M_tb``: columns of skinny blocks recombined by small matrices.

    Args:
        terms: one to three pairs of blocks ``X_t`` (a list of (n_b, k_tb)) and ``M_t`` (B, K_t, K), of which
            ``M_tb[:k_tb, :k_b]`` is used.
        out: (n_b, k_b); must not overlap the terms' blocks.
        active: bool (B,); entries of ``out`` where it is False stay as they are.
    """
    if not 1 <= len(terms) <= 3:
        raise ValueError(f"mixes takes one to three terms, got {len(terms)}")
    if backend_for(out[0].device, out[0].dtype) == "triton":
        from . import device

        device.mixes(terms, out, active)
    else:
        reference.mixes(terms, out, active)
    return list(out)


def copy_blocks(blocks: Sequence[Tensor], out: Sequence[Tensor], *, active: Tensor | None = None) -> list[Tensor]:
    """``out_b = X_b`` where ``active``, for the whole list at once."""
    if backend_for(out[0].device, out[0].dtype) == "reference":
        reference.copy_blocks(blocks, out, active)
        return list(out)
    width = max(block.shape[1] for block in blocks)
    eye = torch.eye(width, dtype=out[0].dtype, device=out[0].device).expand(len(out), -1, -1)
    return mixes([(blocks, eye)], out, active=active)


def column_dots(blocks: Sequence[Tensor], others: Sequence[Tensor], scales: Tensor) -> Tensor:
    """``x_bi · y_bi / s_b`` of the i-th columns of two blocks (n_b, k_b): (B, K), zero beyond ``k_b``."""
    if backend_for(blocks[0].device, blocks[0].dtype) == "triton":
        from . import device

        return device.column_dots(blocks, others, scales)
    return reference.column_dots(blocks, others, scales)


def first_column_residuals(blocks: Sequence[Tensor], units: Sequence[Tensor], scales: Tensor) -> Tensor:
    """``‖x_b − (x_b·y_b) y_b‖ / s_b`` for the first columns ``x_b`` of ``blocks`` and ``y_b`` (unit) of ``units``.

    Args:
        blocks, units: (n_b, ·).
        scales: ``s`` (B,), positive; the division comes before the squares.

    Returns:
        (B,).
    """
    if backend_for(blocks[0].device, blocks[0].dtype) == "triton":
        from . import device

        return device.first_column_residuals(blocks, units, scales)
    return reference.first_column_residuals(blocks, units, scales)
