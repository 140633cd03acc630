"""The tracker of rules that act before the base update: one half product a step, ``W V`` and ``Wᵀ U`` in turn.

State of a matrix: on each side its block and a probe of the weight, ``right = [ V | WᵀΩ ]`` (n, k + a) and ``left =
[ U | WΩ ]`` (m, k + a), and its stats. The half product of the side at turn gives the Ritz triplets of the weight as it
now is. The other side's next block is ``orth[ images | kept | followers ]``: the images, the residuals
``W v_i − (u_i · W v_i) u_i`` of that side's last Ritz vectors (formed before the columns are normalized: in a flat
spectrum they are small, and all there is to see), and the range of what the weight has moved by since that side's last
turn, the difference of two probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from specopt import kernels
from specopt.kernels import Triplets

from ..views import Matrix
from .common import (
    LEFT,
    RIGHT,
    STATS,
    STEP,
    Schedule,
    Stat,
    all_idle,
    fits,
    gather_stats,
    has_stats,
    identity,
    noise,
    noise_like,
    probe_columns,
    put_omega,
    restart,
    scatter_stats,
)


def kept_columns(columns: int) -> int:
    return columns // 4


def basis_columns(block: int) -> int:
    return block - probe_columns(block)


def has_state(matrix: Matrix) -> bool:
    width = matrix.columns + probe_columns(matrix.group["block"])
    if not has_stats(matrix):
        return False
    shapes = {key: (length, width) for key, length in zip((LEFT, RIGHT), matrix.weight.shape, strict=True)}
    return matrix.complete or all(fits(matrix.state, key, shape, matrix) for key, shape in shapes.items())


def start(matrices: Sequence[Matrix]) -> None:
    """Complete state for new matrices: on the right the range of the gradient, ``Gᵀ Ω``, where the first update will
    go; fixed random columns where that is zero or not finite."""
    for matrix in matrices:
        restart(matrix)
    tracked = [matrix for matrix in matrices if not matrix.complete]
    if not tracked:
        return
    omega = [noise(matrix.weight.shape[0], matrix.columns, matrix) for matrix in tracked]
    ranges = kernels.skinny_products([matrix.gradient.mT for matrix in tracked], omega)
    ranges = [torch.nan_to_num(block, 0.0, 0.0, 0.0) for block in ranges]
    for matrix, block in zip(tracked, ranges, strict=True):
        width = matrix.columns + probe_columns(matrix.group["block"])
        matrix.state[RIGHT] = block.new_zeros(matrix.weight.shape[1], width)
        matrix.state[LEFT] = block.new_zeros(matrix.weight.shape[0], width)
    rights = [matrix.state[RIGHT][:, : matrix.columns] for matrix in tracked]
    kernels.orthonormalize(ranges, noise_like(rights, tracked), rights)


@dataclass
class First:
    """The first triplet of each matrix: sigma (B,), and blocks whose first columns are u₁ and v₁."""

    sigma: Tensor
    lefts: list[Tensor]
    rights: list[Tensor]
    valid: Tensor


def step(matrices: Sequence[Matrix]) -> First:
    """One step of matrices of one device, accumulation dtype and kind (complete or tracked), all with state."""
    stats = gather_stats(matrices)
    first = _exact(matrices, stats) if matrices[0].complete else _tracked(matrices, stats)
    stats[:, Stat.SIGMA] = first.sigma
    stats[:, Stat.TOP] = torch.where(first.valid, first.sigma, stats[:, Stat.TOP])
    stats[:, Stat.VALID] = first.valid.to(stats.dtype)
    stats[:, Stat.COUNT] += 1
    scatter_stats(matrices, stats)
    for matrix in matrices:
        matrix.state[STEP] += 1
    return first


def _exact(matrices: Sequence[Matrix], stats: Tensor) -> First:
    bases = [identity(matrix.columns, stats.dtype, stats.device) for matrix in matrices]
    triplets = kernels.ritz_triplets(kernels.skinny_products([m.weight for m in matrices], bases), bases)
    sigma = triplets.sigma[:, 0]
    valid = sigma.isfinite()
    stats[:, Stat.RESIDUAL] = torch.where(valid, 0.0, stats[:, Stat.RESIDUAL])
    stats[:, Stat.PAIRS] = 0.5
    return First(sigma, triplets.lefts, triplets.rights, valid)


class _Sides:
    """The half products of a list of matrices, each on the side at its turn."""

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        self.matrices = matrices
        self.plan = _plan(
            tuple((m.columns, probe_columns(m.group["block"])) for m in matrices),
            matrices[0].state[STATS].dtype,
            matrices[0].state[STATS].device,
        )
        self.on_right = [matrix.state[STEP] % 2 == 0 for matrix in matrices]
        self.seen: list[tuple[list[Tensor], list[Tensor], Tensor]] = []
        self.halves = 0

    def half(self, active: Tensor | None = None) -> tuple[Triplets, Tensor]:
        """One half product: the Ritz triplets, as (images' side, basis' side), and the residual that the product shows
        of the triplet before it. Moves both blocks on where active and finite."""
        right = [on != (self.halves % 2 == 1) for on in self.on_right]
        weights = [m.weight if r else m.weight.mT for m, r in zip(self.matrices, right, strict=True)]
        mine = [m.state[RIGHT if r else LEFT] for m, r in zip(self.matrices, right, strict=True)]
        others = [m.state[LEFT if r else RIGHT] for m, r in zip(self.matrices, right, strict=True)]
        wide = kernels.allocate([(state.shape[0], state.shape[1]) for state in mine], mine[0])
        kernels.copy_blocks(self._blocks(mine), self._blocks(wide))
        put_omega(wide, self.matrices)
        moved = kernels.allocate([(other.shape[0], other.shape[1]) for other in others], others[0], zero=True)
        kernels.skinny_products(weights, wide, out=moved, active=active)
        products, bases, old = self._blocks(moved), self._blocks(mine), self._blocks(others)
        triplets = kernels.ritz_triplets(products, bases)
        sigma = triplets.sigma[:, 0]
        scale = torch.where(sigma > 0, sigma, torch.ones_like(sigma))
        residual = kernels.first_column_residuals(products, old, scale)
        valid = sigma.isfinite() if active is None else active & sigma.isfinite()

        candidates = self._candidates(triplets, moved, others, kernels.column_dots(products, old, scale), scale)
        kernels.orthonormalize(candidates, noise_like(candidates, self.matrices, self.halves), old, active=valid)
        kernels.copy_blocks(triplets.rights, bases, active=valid)
        if self.halves < 2:
            self.seen.append((moved, others, valid))
        self.halves += 1
        return triplets, residual

    def _candidates(
        self, triplets: Triplets, moved: Sequence[Tensor], others: Sequence[Tensor], dots: Tensor, scale: Tensor
    ) -> list[Tensor]:
        """``[ images | W v_i − (u_i · W v_i) u_i | (W − W_before) Ω ]``, in units of sigma₁."""
        width = dots.shape[1]
        followers = self.plan.followers / scale[:, None, None]
        from_moved, from_others = followers.clone(), followers.clone()
        from_moved[:, :width] += self.plan.kept / scale[:, None, None]
        from_others[:, :width] += self.plan.kept * dots[:, :, None]
        candidates = kernels.allocate([(left.shape[0], left.shape[1]) for left in triplets.lefts], moved[0])
        kernels.mixes([(triplets.lefts, self.plan.images), (moved, from_moved), (others, -from_others)], candidates)
        return candidates

    def keep_probes(self) -> None:
        """The probes of this step's first product on each side, for the next to be compared with."""
        for moved, others, valid in self.seen:
            states = [other[:, m.columns :] for other, m in zip(others, self.matrices, strict=True)]
            if self.plan.followers.shape[1] > self.plan.images.shape[1]:
                kernels.mixes([(moved, self.plan.probes)], states, active=valid)

    def oriented(self, triplets: Triplets) -> tuple[list[Tensor], list[Tensor]]:
        """(left, right) blocks of the triplets of an odd number of halves."""
        pairs = zip(triplets.lefts, triplets.rights, self.on_right, strict=True)
        swapped = [(image, basis) if on else (basis, image) for image, basis, on in pairs]
        return [left for left, _ in swapped], [right for _, right in swapped]

    def _blocks(self, states: Sequence[Tensor]) -> list[Tensor]:
        return [state[:, : m.columns] for state, m in zip(states, self.matrices, strict=True)]


def _tracked(matrices: Sequence[Matrix], stats: Tensor) -> First:
    sides = _Sides(matrices)
    schedule = Schedule.of(matrices, stats)
    triplets, residual = sides.half()
    sigma = triplets.sigma[:, 0]
    lefts, rights = sides.oriented(triplets)
    pairs = torch.full_like(sigma, 0.5)
    wanted = schedule.first(sigma, stats[:, Stat.TOP], residual)
    for _ in range(1, schedule.rounds):
        if all_idle(wanted):
            break
        sides.half(wanted)
        triplets, new = sides.half(wanted)
        residual = torch.where(wanted, new, residual)
        before, sigma = sigma, torch.where(wanted, triplets.sigma[:, 0], sigma)
        new_lefts, new_rights = sides.oriented(triplets)
        kernels.copy_blocks([*new_lefts, *new_rights], [*lefts, *rights], active=torch.cat([wanted, wanted]))
        pairs = pairs + wanted
        wanted = wanted & schedule.again(pairs + 0.5, sigma, before, residual)
    sides.keep_probes()
    valid = sigma.isfinite()
    stats[:, Stat.RESIDUAL] = torch.where(valid, residual, stats[:, Stat.RESIDUAL])
    stats[:, Stat.PAIRS] = pairs
    return First(sigma, lefts, rights, valid)


class _Plan(NamedTuple):
    """One-hot matrices (B, from, to) that pick the columns of a block's next basis."""

    images: Tensor
    kept: Tensor
    followers: Tensor  # from the probe's columns
    probes: Tensor  # the probe's columns alone


def _plan(columns: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device) -> _Plan:
    return kernels.remembered(("sides", columns, dtype), device, lambda: _new_plan(columns, dtype, device))


def _new_plan(columns: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device) -> _Plan:
    count, width, probe = len(columns), max(k for k, _ in columns), max(a for _, a in columns)
    images, kept = np.zeros((count, width, width)), np.zeros((count, width, width))
    followers = np.zeros((count, width + probe, width))
    probes = np.zeros((count, width + probe, probe))
    for b, (k, a) in enumerate(columns):
        r = kept_columns(k)
        p = k - r - a
        images[b, :p, :p] = np.eye(p)
        kept[b, :r, p : p + r] = np.eye(r)
        followers[b, k : k + a, p + r : k] = probes[b, k : k + a, :a] = np.eye(a)
    return _Plan(*(kernels.upload(t, dtype, device) for t in (images, kept, followers, probes)))
