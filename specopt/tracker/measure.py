"""sigma₁ of weights as they are, from nothing: for reports and for targets read from the weight itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specopt import kernels
from specopt.kernels import Triplets

from ..views import Matrix, with_options
from . import pairs
from .common import BLOCK, LEFT, PROBE, RIGHT, STATS, Stat, noise_like, probe_columns, restart

Array = npt.NDArray[np.float64]

CAREFUL: dict[str, Any] = {"tolerance": 1e-3, "max_passes": 64}
OPTIONS: dict[str, Any] = {"block": 32, **CAREFUL}
LARGEST = 16
"""Singular values that the block of a measurement tells: of its 28 columns, what is not there to look for others."""


def measure(weights: Sequence[Matrix]) -> Tensor:
    """The stats (B, len(Stat)) of a cold step that changes nothing: residual at most 1e-3, or 64 pairs."""
    return _measured(weights)[1]


class Grams(NamedTuple):
    """What tells the leading singular values of B matrices, once it is on the host: solving it on a device would wait
    for it there."""

    grams: Tensor
    """``(Y / s)ᵀ (Y / s)`` (B, K, K) in float64, zero beyond a matrix' columns, of ``Y = W V`` for the block V."""
    scales: Tensor
    """``s = max |Y|`` (B,), or 1."""


def measure_spectrum(weights: Sequence[Matrix]) -> tuple[Tensor, Grams]:
    """:func:`measure`, and from one product more with the block that it ends with what :func:`ritz_values` takes."""
    matrices, stats = _measured(weights)
    width = max(matrix.columns for matrix in matrices)
    grams, scales = [], []
    for matrix in matrices:
        product = matrix.weight if matrix.complete else _product(matrix)
        product = product.to(torch.float64)
        peak = product.abs().amax()
        scale = torch.where(peak > 0, peak, 1.0)
        product = product / scale
        gram = torch.nn.functional.pad(product.mT @ product, (0, width - matrix.columns) * 2)
        grams.append(gram.to(stats.device))
        scales.append(scale.to(stats.device))
    return stats, Grams(torch.stack(grams), torch.stack(scales))


def ritz_values(grams: Array, scales: Array) -> Array:
    """The singular values (B, K) of ``Y``, by size: Ritz values of W, and all of them for a complete matrix; nan where
    the weight is not finite. On the host: arrays as of :class:`Grams`."""
    finite = np.isfinite(grams).all((1, 2)) & np.isfinite(scales)
    squares = np.linalg.eigvalsh(np.where(finite[:, None, None], grams, 0.0))[:, ::-1]
    return np.where(finite[:, None], np.sqrt(np.maximum(squares, 0.0)) * scales[:, None], np.nan)


def _product(matrix: Matrix) -> Tensor:
    (product,) = kernels.skinny_products([matrix.weight], [matrix.state[BLOCK]])
    return product


def _measured(weights: Sequence[Matrix]) -> tuple[list[Matrix], Tensor]:
    """The matrices with the state of such a step, and its stats."""
    rows: list[Tensor | None] = [None] * len(weights)
    matrices = [with_options(matrix, OPTIONS, pairs.basis_columns(OPTIONS["block"])) for matrix in weights]
    for chosen in _buckets(matrices):
        bucket = [matrices[i] for i in chosen]
        _start(bucket)
        pairs.step(bucket, _nothing)
        for i in chosen:
            rows[i] = matrices[i].state[STATS].to(weights[0].param.device, torch.float64)
    return matrices, torch.stack([row for row in rows if row is not None])


def _buckets(matrices: Sequence[Matrix]) -> list[list[int]]:
    """The places of those that one call can serve."""
    buckets: dict[Any, list[int]] = {}
    for i, matrix in enumerate(matrices):
        buckets.setdefault(_key(matrix), []).append(i)
    return list(buckets.values())


def measured_triplets(matrices: Sequence[Matrix]) -> Triplets:
    """The first triplets of weights as they are, each as its matrix is read, by a cold step that changes nothing. All
    of one device, accumulation dtype and kind."""
    probes = [with_options(matrix, careful(matrix.group), matrix.columns) for matrix in matrices]
    _start(probes)
    pairs.make_room(probes)
    pairs.step(probes, _nothing, keep_first=True)
    sigma = torch.stack([probe.state[STATS][Stat.TOP] for probe in probes])[:, None]
    return Triplets(sigma, *([probe.state[key] for probe in probes] for key in (LEFT, RIGHT)))


def careful(group: dict[str, Any]) -> dict[str, Any]:
    """A group's options, for a measurement."""
    tolerance = min(group["tolerance"], CAREFUL["tolerance"])
    return {**group, "tolerance": tolerance, "max_passes": max(group["max_passes"] or 0, CAREFUL["max_passes"])}


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
