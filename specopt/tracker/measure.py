"""sigma₁ of weights as they are, from nothing: for reports and for targets read from the weight itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specopt import kernels

from ..views import Matrix, with_options
from . import pairs
from .common import BLOCK, PROBE, STATS, exact_triplets, noise_like, probe_columns, restart

OPTIONS: dict[str, Any] = {"block": 32, "tolerance": 1e-3, "max_passes": 64}


LARGEST = 16
"""Singular values that the block of a measurement tells: of its 28 columns, what is not there to look for others."""


def measure(weights: Sequence[Matrix]) -> Tensor:
    """The stats (B, len(Stat)) of a cold step that changes nothing: residual at most 1e-3, or 64 pairs."""
    return _measured(weights)[1]


def measure_spectrum(weights: Sequence[Matrix], top: int) -> tuple[Tensor, Tensor]:
    """:func:`measure`, and from one product more with the block that it ends with the leading singular values
    (B, top), by size; 0 where a matrix has no more, non-finite where it is."""
    matrices, stats = _measured(weights)
    spectra: list[Tensor] = [stats] * len(matrices)
    for chosen in _buckets(matrices):
        bucket = [matrices[i] for i in chosen]
        sigma = (_exact(bucket) if bucket[0].complete else _ritz_values(bucket)).to(stats)
        sigma = torch.nn.functional.pad(sigma[:, :top], (0, max(0, top - sigma.shape[1])))
        for i, row in zip(chosen, sigma, strict=True):
            spectra[i] = row
    return stats, torch.stack(spectra)


def _exact(bucket: Sequence[Matrix]) -> Tensor:
    return exact_triplets(bucket, bucket[0].state[STATS]).sigma


def _ritz_values(bucket: Sequence[Matrix]) -> Tensor:
    blocks = [matrix.state[BLOCK] for matrix in bucket]
    products = kernels.skinny_products([matrix.weight for matrix in bucket], blocks)
    return kernels.ritz_triplets(products, blocks).sigma


def _measured(weights: Sequence[Matrix]) -> tuple[list[Matrix], Tensor]:
    """The matrices with the state of such a step, and its stats."""
    rows: list[Tensor | None] = [None] * len(weights)
    matrices = [with_options(matrix, OPTIONS, pairs.basis_columns(OPTIONS["block"])) for matrix in weights]
    for chosen in _buckets(matrices):
        bucket = [matrices[i] for i in chosen]
        _start(bucket)
        pairs.step(bucket, lambda sigma, valid, stats: pairs.Change(torch.zeros_like(sigma)))
        for i in chosen:
            rows[i] = matrices[i].state[STATS].to(weights[0].param.device, torch.float64)
    return matrices, torch.stack([row for row in rows if row is not None])


def _buckets(matrices: Sequence[Matrix]) -> list[list[int]]:
    """The places of those that one call can serve."""
    buckets: dict[Any, list[int]] = {}
    for i, matrix in enumerate(matrices):
        buckets.setdefault(_key(matrix), []).append(i)
    return list(buckets.values())


def _key(matrix: Matrix) -> tuple[torch.device, torch.dtype, bool]:
    return matrix.param.device, kernels.accumulation_dtype(matrix.param.dtype), matrix.complete


def _start(matrices: Sequence[Matrix]) -> None:
    for matrix in matrices:
        restart(matrix)
    if matrices[0].complete:
        return
    blocks = [new_block(matrix) for matrix in matrices]
    starts = noise_like(blocks, matrices)
    kernels.orthonormalize(starts, starts, blocks)
    for matrix, block in zip(matrices, blocks, strict=True):
        matrix.state[BLOCK] = block
        matrix.state[PROBE] = block.new_zeros(block.shape[0], probe_columns(matrix.group["block"]))


def new_block(matrix: Matrix) -> Tensor:
    weight = matrix.weight
    dtype = kernels.accumulation_dtype(weight.dtype)
    return torch.empty(weight.shape[1], matrix.columns, dtype=dtype, device=weight.device)
