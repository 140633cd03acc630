"""First triplets of sharded weights as they are, which change nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specopt import kernels
from specopt.kernels import Triplets

from ..tracker.common import BLOCK, PROBE, STATS, gather_stats, noise_like, probe_columns, restart
from ..tracker.measure import OPTIONS, careful
from ..tracker.pairs import basis_columns
from .exchange import Exchange
from .pairs import Pair, exact_triplets, has_state, images, own_part, settled, upright
from .views import ShardedMatrix, with_options


class First(NamedTuple):
    """The first triplet of a matrix."""

    sigma: Tensor
    """Of no dimensions."""
    left: Tensor
    """(·, 1), of this rank's rows."""
    right: Tensor
    """(·, 1), of this rank's columns."""


Source = Callable[[Sequence[ShardedMatrix]], Exchange[Triplets]]


def first_triplets(matrices: Sequence[ShardedMatrix]) -> Exchange[list[First]]:
    """Of :func:`~specopt.sharding.pairs.upright` matrices: by one product with the block that follows them; from
    nothing where there is none."""

    def source_of(matrix: ShardedMatrix) -> Source:
        if matrix.complete:
            return exact_triplets
        return _by_block if has_state(matrix) else _careful

    return (yield from _each(matrices, source_of))


def measure(matrices: Sequence[ShardedMatrix]) -> Exchange[Tensor]:
    """sigma₁ (B,), from nothing: see :func:`specopt.tracker.measure.measure`."""
    probes = [upright(with_options(matrix, OPTIONS, basis_columns(OPTIONS["block"]))) for matrix in matrices]
    found = yield from _each(probes, lambda probe: exact_triplets if probe.complete else _from_nothing)
    return torch.stack([first.sigma for first in found])


def _each(matrices: Sequence[ShardedMatrix], source_of: Callable[[ShardedMatrix], Source]) -> Exchange[list[First]]:
    sources: dict[Source, list[int]] = {}
    for i, matrix in enumerate(matrices):
        sources.setdefault(source_of(matrix), []).append(i)
    found: dict[int, First] = {}
    for source, chosen in sources.items():
        picked = [matrices[i] for i in chosen]
        triplets = own_part((yield from source(picked)), picked)
        for i, sigma, left, right in zip(chosen, *triplets, strict=True):
            found[i] = First(sigma[0], left[:, :1], right[:, :1])
    return [found[i] for i in range(len(matrices))]


def _by_block(matrices: Sequence[ShardedMatrix]) -> Exchange[Triplets]:
    return (yield from images(matrices, [matrix.state[BLOCK] for matrix in matrices]))


def _careful(matrices: Sequence[ShardedMatrix]) -> Exchange[Triplets]:
    probes = [upright(with_options(matrix, careful(matrix.group), matrix.columns)) for matrix in matrices]
    return (yield from _from_nothing(probes))


def _from_nothing(probes: Sequence[ShardedMatrix]) -> Exchange[Triplets]:
    """Of tracked matrices without state, by a cold step."""
    for probe in probes:
        restart(probe)
        block = torch.empty(probe.cut.shape[1], probe.columns, dtype=probe.state[STATS].dtype)
        block = block.to(probe.weight.device)
        starts = noise_like([block], [probe])
        kernels.orthonormalize(starts, starts, [block])
        probe.state[BLOCK] = block
        probe.state[PROBE] = block.new_zeros(len(block), probe_columns(probe.block))
    work = Pair(probes, 1)
    yield from settled(work, gather_stats(probes))
    return work.triplets
