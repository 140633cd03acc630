"""Torch reference of the operations that write into matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backend import accumulation_dtype


def rank_updates_(
    matrices: Sequence[Tensor], coefficients: Tensor, lefts: Sequence[Tensor], rights: Sequence[Tensor]
) -> None:
    rank = coefficients.shape[1]
    on_host = coefficients.device.type == "cpu"
    for i, matrix in enumerate(matrices):
        if on_host and not coefficients[i].any():
            continue
        scaled = lefts[i][:, :rank] * coefficients[i]
        new = torch.addmm(matrix.to(scaled.dtype), scaled, rights[i][:, :rank].mT).to(matrix.dtype)
        _store_finite(matrix, new)


def frobenius_norms(matrices: Sequence[Tensor]) -> Tensor:
    norms = []
    for matrix in matrices:
        values = matrix.to(accumulation_dtype(matrix.dtype))
        peak = values.abs().amax() if values.numel() else values.new_zeros(())
        safe = torch.where(peak > 0, peak, torch.ones_like(peak))
        norms.append(torch.linalg.vector_norm(values / safe) * peak)
    return torch.stack(norms)


def scale_(matrices: Sequence[Tensor], factors: Tensor) -> None:
    on_host = factors.device.type == "cpu"
    for i, matrix in enumerate(matrices):
        if on_host and factors[i] == 1:
            continue
        _store_finite(matrix, (matrix.to(factors.dtype) * factors[i]).to(matrix.dtype))


def _store_finite(matrix: Tensor, new: Tensor) -> None:
    matrix.copy_(torch.where(new.isfinite(), new, matrix))
