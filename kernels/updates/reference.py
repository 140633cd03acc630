"""Torch reference of the operations that write into matrices.

On the CPU, where a matrix is far larger than a cache, every pass over it counts: in-place updates that cannot overflow
are made in one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backend import accumulation_dtype

SAFE_NORM = 1e-10, 1e18
"""Norms between which no square of an entry overflows in float32, and what underflows does not count."""
LONGEST_ROW = 1 << 13
"""Entries whose squares float32 sums to a few units in the last place."""


def rank_updates_(
    matrices: Sequence[Tensor], coefficients: Tensor, lefts: Sequence[Tensor], rights: Sequence[Tensor]
) -> None:
    rank = coefficients.shape[1]
    on_host = coefficients.device.type == "cpu"
    for i, matrix in enumerate(matrices):
        if matrix.numel() == 0 or (on_host and not coefficients[i].any()):
            continue
        left, right = lefts[i][:, :rank] * coefficients[i], rights[i][:, :rank].mT.contiguous()
        if on_host and matrix.dtype == left.dtype and too_small_to_overflow(left, right):
            # of rank 1 a sum of an outer product is quicker than a matrix product
            matrix.addcmul_(left, right) if rank == 1 else matrix.addmm_(left, right)
        else:
            _store_finite(matrix, torch.addmm(matrix.to(left.dtype), left, right).to(matrix.dtype))


def frobenius_norms(matrices: Sequence[Tensor]) -> Tensor:
    norms = []
    for matrix in matrices:
        dtype = accumulation_dtype(matrix.dtype)
        if dtype == torch.float32 and matrix.device.type != "mps":  # whose squares are safe in float64; mps has none
            norms.append(_float32_norm(matrix).to(dtype))
            continue
        peak = matrix.abs().amax() if matrix.numel() else matrix.new_zeros(())
        norms.append(torch.linalg.vector_norm(matrix / torch.where(peak > 0, peak, 1.0)) * peak)
    return torch.stack(norms)


def _float32_norm(matrix: Tensor) -> Tensor:
    """In float64; on the CPU, where torch sums slowly in it, of row norms in float32 where their squares are safe."""
    norm: Tensor
    rows = matrix.mT if matrix.stride(0) < matrix.stride(1) else matrix
    if matrix.device.type == "cpu" and 0 < rows.shape[1] <= LONGEST_ROW:
        parts = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
        norm = torch.linalg.vector_norm(parts, dtype=torch.float64)
        if SAFE_NORM[0] < norm < SAFE_NORM[1]:
            return norm
    norm = torch.linalg.vector_norm(matrix, dtype=torch.float64)
    return norm


def scale_(matrices: Sequence[Tensor], factors: Tensor) -> None:
    on_host = factors.device.type == "cpu"
    for i, matrix in enumerate(matrices):
        if on_host and factors[i] == 1:
            continue
        if on_host and matrix.dtype == factors.dtype and 0 <= factors[i] < 1:
            matrix.mul_(factors[i])
        else:
            _store_finite(matrix, (matrix.to(factors.dtype) * factors[i]).to(matrix.dtype))


def too_small_to_overflow(left: Tensor, right: Tensor) -> bool:
    """Every entry of the product lies under half a unit in the last place of the largest finite number, so that adding
    it leaves a finite number finite. False where one is not finite itself."""
    limits = torch.finfo(left.dtype)
    largest = (float(torch.linalg.vector_norm(factor, math.inf)) for factor in (left, right))
    return left.shape[1] * math.prod(largest) < limits.max * limits.eps / 4


def _store_finite(matrix: Tensor, new: Tensor) -> None:
    matrix.copy_(torch.where(new.isfinite(), new, matrix))
