"""sigma₁ of weights as they are, from nothing: for reports and for targets read from the weight itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specopt import kernels
from specopt.kernels import Triplets

from ..views import Matrix, with_options
from . import pairs
from .common import BLOCK, LEFT, PROBE, RIGHT, STATS, Stat, noise_like, probe_columns, restart

CAREFUL: dict[str, Any] = {"tolerance": 1e-3, "max_passes": 64}
OPTIONS: dict[str, Any] = {"block": 32, **CAREFUL}


def measure(weights: Sequence[Matrix]) -> Tensor:
    """The stats (B, len(Stat)) of a cold step that changes nothing: residual at most 1e-3, or 64 pairs."""
    rows: list[Tensor | None] = [None] * len(weights)
    matrices = [with_options(matrix, OPTIONS, pairs.basis_columns(OPTIONS["block"])) for matrix in weights]
    for key in {_key(matrix) for matrix in matrices}:
        chosen = [i for i, matrix in enumerate(matrices) if _key(matrix) == key]
        bucket = [matrices[i] for i in chosen]
        _start(bucket)
        pairs.step(bucket, _nothing)
        for i in chosen:
            rows[i] = matrices[i].state[STATS].to(weights[0].param.device, torch.float64)
    return torch.stack([row for row in rows if row is not None])


def measured_triplets(matrices: Sequence[Matrix]) -> Triplets:
    """The first triplets of weights as they are, each as its matrix is read, by a cold step that changes nothing. All
    of one device, accumulation dtype and kind."""
    probes = [with_options(matrix, {**matrix.group, **CAREFUL}, matrix.columns) for matrix in matrices]
    _start(probes)
    pairs.make_room(probes)
    pairs.step(probes, _nothing, keep_first=True)
    sigma = torch.stack([probe.state[STATS][Stat.TOP] for probe in probes])[:, None]
    return Triplets(sigma, *([probe.state[key] for probe in probes] for key in (LEFT, RIGHT)))


def _nothing(found: pairs.Found) -> pairs.Change:
    return pairs.Change(torch.zeros_like(found.sigma[:, :1]))


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
        matrix.state[PROBE] = block.new_zeros(block.shape[0], probe_columns(matrix.block))


def new_block(matrix: Matrix) -> Tensor:
    weight = matrix.weight
    dtype = kernels.accumulation_dtype(weight.dtype)
    return torch.empty(weight.shape[1], matrix.columns, dtype=dtype, device=weight.device)
