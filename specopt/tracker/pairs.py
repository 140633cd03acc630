"""The tracker of rules that act after the base update: one pair of products, ``Y = W V`` and ``Z = Wᵀ U``, a step.

State of a matrix: its block ``V = [ images | kept | followers | scout ]`` (n, k), the probe ``WᵀΩ`` (n, a) of fixed
random Ω, and its stats. The difference of two probes is the last update's range, ``ΔWᵀ Ω``; it becomes the followers:
the block knows where the update went without a copy of the weights, whatever made the update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specopt import kernels
from specopt.kernels import BasisLayout, Triplets

from ..views import Matrix
from .common import (
    BLOCK,
    PROBE,
    STEP,
    Schedule,
    Stat,
    all_idle,
    exact_triplets,
    fits,
    gather_stats,
    has_stats,
    noise_like,
    omega,
    probe_columns,
    put_omega,
    restart,
    rounding_seeds,
    scatter_stats,
)


class Change(NamedTuple):
    """``W ← f W + c u₁v₁ᵀ``."""

    added: Tensor
    """``c`` (B,)."""
    factor: Tensor | None = None
    """``f`` (B,); 1 if absent."""


Correct = Callable[[Tensor, Tensor, Tensor], Change]
"""``correct(sigma, valid, stats)``: what is to be done with weights of these sigma₁ (B,)."""


def basis_columns(block: int) -> int:
    return block - probe_columns(block)


def kept_columns(block: int) -> int:
    return max(block // 16, min(1, block // 4))


def has_state(matrix: Matrix) -> bool:
    state, rows, a = matrix.state, matrix.weight.shape[1], probe_columns(matrix.group["block"])
    if not has_stats(matrix):
        return False
    shapes = {BLOCK: (rows, matrix.columns), PROBE: (rows, a)}
    return matrix.complete or all(fits(state, key, shape, matrix) for key, shape in shapes.items())


class Start:
    """What has to be seen of new matrices before the base update: whether they are zero, and ``Wᵀ Ω``."""

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        self.matrices = matrices
        self.norms = kernels.frobenius_norms([matrix.weight for matrix in matrices])
        self.tracked = [matrix for matrix in matrices if not matrix.complete]
        self.before = self._probe() if self.tracked else []

    def _probe(self) -> list[Tensor]:
        like = self.norms
        return kernels.skinny_products(
            [matrix.weight.mT for matrix in self.tracked],
            [omega(matrix.weight.shape[0], matrix.columns, like) for matrix in self.tracked],
        )

    def finish(self) -> None:
        """After the base update: complete state, the block being the update's range ``ΔWᵀ Ω``, or fixed random columns
        where that is zero or not finite."""
        for matrix, norm in zip(self.matrices, self.norms, strict=True):
            restart(matrix, norm)
        if not self.tracked:
            return
        after = self._probe()
        moved = [torch.nan_to_num(b - a, 0.0, 0.0, 0.0) for a, b in zip(self.before, after, strict=True)]
        blocks = [torch.empty_like(x) for x in moved]
        kernels.orthonormalize(moved, noise_like(blocks, self.tracked), blocks)
        for matrix, block, before in zip(self.tracked, blocks, self.before, strict=True):
            a = probe_columns(matrix.group["block"])
            matrix.state[BLOCK] = block
            matrix.state[PROBE] = torch.nan_to_num(before[:, :a], 0.0, 0.0, 0.0)


def step(matrices: Sequence[Matrix], correct: Correct) -> None:
    """One step of matrices of one device, accumulation dtype and kind (complete or tracked), all with state."""
    stats = gather_stats(matrices)
    if matrices[0].complete:
        _exact(matrices, stats, correct)
    else:
        _tracked(matrices, stats, correct)
    stats[:, Stat.COUNT] += 1
    scatter_stats(matrices, stats)
    for matrix in matrices:
        matrix.state[STEP] += 1


def _exact(matrices: Sequence[Matrix], stats: Tensor, correct: Correct) -> None:
    triplets = exact_triplets(matrices, stats)
    valid = triplets.sigma[:, 0].isfinite()
    stats[:, Stat.SIGMA] = triplets.sigma[:, 0]
    change = correct(triplets.sigma[:, 0], valid, stats)
    _apply(change, matrices, triplets)
    _record(stats, triplets, change, valid)
    stats[:, Stat.RESIDUAL] = torch.where(valid, 0.0, stats[:, Stat.RESIDUAL])
    stats[:, Stat.PAIRS] = 0.5


def _tracked(matrices: Sequence[Matrix], stats: Tensor, correct: Correct) -> None:
    work = _Pair(matrices)
    schedule = Schedule.of(matrices, stats)
    sigma, residual = work.make(None)
    pairs = torch.ones_like(sigma)
    fine = residual <= 0.5 * schedule.tolerance  # then the last step's residual counts for nothing
    wanted = schedule.first(sigma, stats[:, Stat.TOP], torch.where(fine, residual, stats[:, Stat.RESIDUAL]))
    nothing = torch.zeros_like(sigma)
    for done in range(1, schedule.rounds):
        if all_idle(wanted):
            break
        work.next_basis(nothing, wanted, shift=done)
        before, sigma_before = residual, sigma
        sigma, residual = work.make(wanted)
        residual = torch.where(wanted, residual, before)
        pairs = pairs + wanted
        wanted = wanted & schedule.again(pairs, sigma, sigma_before, residual)

    valid = sigma.isfinite()
    stats[:, Stat.SIGMA] = sigma
    change = correct(sigma, valid, stats)
    _apply(change, matrices, work.triplets)
    work.follow(change)
    work.next_basis(change.added, valid)
    work.keep_probes(valid)
    _record(stats, work.triplets, change, valid)
    stats[:, Stat.RESIDUAL] = torch.where(valid, residual, stats[:, Stat.RESIDUAL])
    stats[:, Stat.PAIRS] = pairs


class _Pair:
    """``Y = W V`` with its Ritz triplets and ``Z = Wᵀ [U | Ω]``, made as often as a step asks for."""

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        self.matrices, self.layout = matrices, _layout(matrices)
        self.weights = [matrix.weight for matrix in matrices]
        self.bases = [matrix.state[BLOCK] for matrix in matrices]
        self.probes = [matrix.state[PROBE] for matrix in matrices]
        widths = [k + a for k, a in zip(self.layout.columns, self.layout.followers, strict=True)]
        like = self.bases[0]
        shapes = [weight.shape for weight in self.weights]
        self.lefts = kernels.allocate([(m, width) for (m, _), width in zip(shapes, widths, strict=True)], like)
        self.returned = kernels.allocate([(n, width) for (_, n), width in zip(shapes, widths, strict=True)], like)
        self.products = kernels.allocate([(m, x.columns) for (m, _), x in zip(shapes, matrices, strict=True)], like)
        put_omega(self.lefts, matrices)
        self.triplets = Triplets(
            like.new_zeros(len(matrices), max(self.layout.columns)),
            [left[:, : m.columns] for left, m in zip(self.lefts, matrices, strict=True)],
            kernels.allocate([(base.shape[0], base.shape[1]) for base in self.bases], like),
        )

    def make(self, active: Tensor | None) -> tuple[Tensor, Tensor]:
        """sigma₁ and the residual of its triplet (B,)."""
        kernels.skinny_products(self.weights, self.bases, out=self.products, active=active)
        kernels.ritz_triplets(self.products, self.bases, out=self.triplets, active=active)
        transposed = [weight.mT for weight in self.weights]
        kernels.skinny_products(transposed, self.lefts, out=self.returned, active=active)
        sigma = self.triplets.sigma[:, 0].clone()
        scale = torch.where(sigma > 0, sigma, 1.0)
        return sigma, kernels.first_column_residuals(self.returned, self.triplets.rights, scale)

    def follow(self, change: Change) -> None:
        """``(f W + c u₁v₁ᵀ)ᵀ [U | Ω] = f Z + c v₁ (u₁ᵀ [U | Ω])``: the product of corrected weights without another."""
        first = [left[:, :1] for left in self.lefts]
        turned = kernels.skinny_products([left.mT for left in self.lefts], first)
        kernels.corrections_(self.returned, change.added, self.triplets.rights, turned, factors=change.factor)

    def next_basis(self, change: Tensor, active: Tensor, shift: int = 0) -> None:
        starts = noise_like(self.bases, self.matrices, shift=shift)
        kernels.next_basis(
            self.triplets, self.returned, self.probes, starts, self.layout, change, self.bases, active=active
        )

    def keep_probes(self, active: Tensor) -> None:
        """What the next step's are compared with."""
        if max(self.layout.followers):
            seen = [block[:, m.columns :] for block, m in zip(self.returned, self.matrices, strict=True)]
            kernels.copy_blocks(seen, self.probes, active=active)


def _apply(change: Change, matrices: Sequence[Matrix], triplets: Triplets) -> None:
    """The correction of the weights, and what it makes of their singular values but for the first one's change."""
    kernels.corrections_(
        [matrix.weight for matrix in matrices],
        change.added,
        triplets.lefts,
        triplets.rights,
        factors=change.factor,
        seeds=rounding_seeds(matrices),
    )
    if change.factor is not None:
        triplets.sigma.mul_(change.factor[:, None])


def _record(stats: Tensor, triplets: Triplets, change: Change, valid: Tensor) -> None:
    after = triplets.sigma.clone()
    after[:, 0] += change.added
    stats[:, Stat.TOP] = torch.where(valid, after.abs().amax(1), stats[:, Stat.TOP])
    stats[:, Stat.VALID] = valid.to(stats.dtype)


def _layout(matrices: Sequence[Matrix]) -> BasisLayout:
    blocks = [matrix.group["block"] for matrix in matrices]
    return BasisLayout(
        tuple(matrix.columns for matrix in matrices),
        tuple(kept_columns(block) for block in blocks),
        tuple(probe_columns(block) for block in blocks),
    )
