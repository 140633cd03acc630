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
    LEFT,
    PROBE,
    RIGHT,
    STATS,
    Schedule,
    Stat,
    all_idle,
    count_step,
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
    sharpened,
)


class Found(NamedTuple):
    """What a step has found of a list of matrices."""

    sigma: Tensor
    """Singular values, or their Ritz values (B, K), by size; 0 beyond a matrix' own."""
    valid: Tensor
    """(B,) whether they are finite."""
    stats: Tensor
    """(B, len(Stat)), to be read and written to."""


class Change(NamedTuple):
    """``W ← f W + Σ_i c_i u_i v_iᵀ``."""

    added: Tensor
    """``c`` (B, r) of the first r triplets."""
    factor: Tensor | None = None
    """``f`` (B,); 1 if absent."""

    def of(self, sigma: Tensor) -> Tensor:
        """The singular values (B, K), in the same order, that it makes of those."""
        changed = sigma.clone() if self.factor is None else sigma * self.factor[:, None]
        changed[:, : self.added.shape[1]] += self.added
        return changed


Correct = Callable[[Found], Change]
"""What is to be done with weights of which this was found."""


def basis_columns(block: int) -> int:
    return block - probe_columns(block)


def kept_columns(block: int) -> int:
    return max(block // 16, min(1, block // 4))


def has_state(matrix: Matrix) -> bool:
    state, rows, a = matrix.state, matrix.weight.shape[1], probe_columns(matrix.block)
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
            a = probe_columns(matrix.block)
            matrix.state[BLOCK] = block
            matrix.state[PROBE] = torch.nan_to_num(before[:, :a], 0.0, 0.0, 0.0)


def step(matrices: Sequence[Matrix], correct: Correct, rank: int = 1, *, keep_first: bool = False) -> None:
    """One step of matrices of one device, accumulation dtype and kind (complete or tracked), all with state.

    Args:
        rank: of how many triplets the residual counts, and the most that ``correct`` may change.
        keep_first: leave the first triplet of the corrected weight in the state: σ as ``Stat.TOP``, u and v as blocks
            of one column. Where it is tracked it is read from Z, the weight's own product with U.
    """
    stats = gather_stats(matrices)
    work = _exact if matrices[0].complete else _tracked
    first = work(matrices, stats, correct, rank, keep_first)
    if first is not None:
        keep(matrices, first, stats)
    count_step(matrices, stats)


def keep(matrices: Sequence[Matrix], first: Triplets, stats: Tensor) -> None:
    """A first triplet into state that is there; not where it is not finite."""
    sigma = first.sigma[:, 0]
    valid = sigma.isfinite()
    stats[:, Stat.TOP] = torch.where(valid, sigma, stats[:, Stat.TOP])
    blocks = [*(left[:, :1] for left in first.lefts), *(right[:, :1] for right in first.rights)]
    kept = [*(matrix.state[LEFT] for matrix in matrices), *(matrix.state[RIGHT] for matrix in matrices)]
    kernels.copy_blocks(blocks, kept, active=torch.cat([valid, valid]))


def make_room(matrices: Sequence[Matrix]) -> None:
    """For the first triplet, in state that has none."""
    for matrix in matrices:
        dtype = kernels.accumulation_dtype(matrix.param.dtype)
        for key, length in zip((LEFT, RIGHT), matrix.weight.shape, strict=True):
            if not fits(matrix.state, key, (length, 1), matrix):
                matrix.state[key] = torch.zeros(length, 1, dtype=dtype, device=matrix.param.device)


def drop_first(matrices: Sequence[Matrix]) -> None:
    """A triplet that this step does not keep up."""
    for matrix in matrices:
        for key in (LEFT, RIGHT):
            matrix.state.pop(key, None)


def has_first(matrix: Matrix) -> bool:
    """Whether :func:`step` has left the first triplet."""
    lengths = zip((LEFT, RIGHT), matrix.weight.shape, strict=True)
    return has_state(matrix) and all(fits(matrix.state, key, (length, 1), matrix) for key, length in lengths)


def first_triplets(matrices: Sequence[Matrix]) -> Triplets:
    """Of weights as they are, by one product with the blocks that there are."""
    like = matrices[0].state[STATS]
    if matrices[0].complete:
        return exact_triplets(matrices, like)
    bases = [matrix.state[BLOCK] for matrix in matrices]
    return kernels.ritz_triplets(kernels.skinny_products([matrix.weight for matrix in matrices], bases), bases)


def _exact(matrices: Sequence[Matrix], stats: Tensor, correct: Correct, rank: int, keep_first: bool) -> Triplets | None:
    triplets = exact_triplets(matrices, stats, rank + keep_first)  # one more may come to be the first
    change = correct_exact(matrices, stats, triplets, correct, triplets)
    return _largest(triplets, change.added, rank + 1) if keep_first else None


def correct_exact(
    matrices: Sequence[Matrix], stats: Tensor, triplets: Triplets, correct: Correct, part: Triplets
) -> Change:
    """The correction by exact triplets, with its stats.

    Args:
        part: what of the triplets the weights are corrected by, where these are parts themselves.
    """
    valid = triplets.sigma[:, 0].isfinite()
    stats[:, Stat.SIGMA] = triplets.sigma[:, 0]
    change = correct(Found(triplets.sigma, valid, stats))
    apply(change, matrices, part)
    record(stats, triplets, change, valid)
    stats[:, Stat.RESIDUAL] = torch.where(valid, 0.0, stats[:, Stat.RESIDUAL])
    stats[:, Stat.PAIRS] = 0.5
    return change


def _largest(triplets: Triplets, added: Tensor, count: int) -> Triplets:
    """The first triplet once something is added to some."""
    sigma, place = Change(added).of(triplets.sigma)[:, :count].max(1, keepdim=True)

    def chosen(blocks: Sequence[Tensor]) -> list[Tensor]:
        picked = zip(blocks, place.unbind(), strict=True)
        return [block.index_select(1, at.clamp(max=block.shape[1] - 1)) for block, at in picked]

    return Triplets(sigma, chosen(triplets.lefts), chosen(triplets.rights))


def _tracked(
    matrices: Sequence[Matrix], stats: Tensor, correct: Correct, rank: int, keep_first: bool
) -> Triplets | None:
    work = _Pair(matrices, rank)
    schedule = Schedule.of(matrices, stats)
    sigma, first, residual = work.make(None)
    pairs = torch.ones_like(sigma)
    seen = residual
    if rank == 1:
        fine = residual <= 0.5 * schedule.tolerance  # then the last step's residual counts for nothing
        seen = torch.where(fine, residual, stats[:, Stat.RESIDUAL])
    wanted = schedule.first(sigma, stats[:, Stat.TOP], seen)
    nothing = torch.zeros_like(sigma)[:, None]
    for done in range(1, schedule.rounds):
        if all_idle(wanted):
            break
        work.next_basis(nothing, wanted, shift=done)
        before, sigma_before = (first, residual), sigma
        sigma, first, residual = work.make(wanted)
        first, residual = (torch.where(wanted, x, y) for x, y in zip((first, residual), before, strict=True))
        pairs = pairs + wanted
        wanted = wanted & schedule.again(pairs, sigma, sigma_before, residual)

    valid = sigma.isfinite()
    stats[:, Stat.SIGMA] = sigma
    change = correct(Found(work.triplets.sigma, valid, stats))
    apply(change, matrices, work.triplets)
    work.follow(change)
    kept = work.turned() if keep_first else None
    work.next_basis(change.added, valid)
    work.keep_probes(valid)
    record(stats, work.triplets, change, valid)
    stats[:, Stat.RESIDUAL] = torch.where(valid, first, stats[:, Stat.RESIDUAL])
    stats[:, Stat.PAIRS] = pairs
    return kept


class _Pair:
    """``Y = W V`` with its Ritz triplets and ``Z = Wᵀ [U | Ω]``, made as often as a step asks for."""

    def __init__(self, matrices: Sequence[Matrix], rank: int) -> None:
        self.matrices, self.layout, self.rank = matrices, _layout(matrices), rank
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

    def make(self, active: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """sigma₁, the residual of its triplet, and the largest of the first ``rank`` triplets' (B,)."""
        kernels.skinny_products(self.weights, self.bases, out=self.products, active=active)
        kernels.ritz_triplets(self.products, self.bases, out=self.triplets, active=active)
        if self.rank > 1:
            kernels.sharpen(self.triplets, sharpened(self.rank))
        transposed = [weight.mT for weight in self.weights]
        kernels.skinny_products(transposed, self.lefts, out=self.returned, active=active)
        residuals = kernels.leading_residuals(self.returned, self.triplets, self.rank)
        return self.triplets.sigma[:, 0].clone(), *residuals

    def follow(self, change: Change) -> None:
        """``(f W + Σ c_i u_i v_iᵀ)ᵀ [U | Ω] = f Z + Σ c_i v_i (u_iᵀ [U | Ω])``: the product of corrected weights
        without another."""
        rank = change.added.shape[1]
        first = [left[:, : min(rank, m.columns)] for left, m in zip(self.lefts, self.matrices, strict=True)]
        turned = kernels.skinny_products([left.mT for left in self.lefts], first)
        kernels.corrections_(self.returned, change.added, self.triplets.rights, turned, factors=change.factor)

    def turned(self) -> Triplets:
        """Triplets of the corrected weight, from ``Z = Wᵀ U``: half an iteration beyond those that were corrected."""
        bases = self.triplets.lefts
        products = [block[:, : m.columns] for block, m in zip(self.returned, self.matrices, strict=True)]
        other = kernels.ritz_triplets(products, bases)
        return Triplets(other.sigma, other.rights, other.lefts)

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


def apply(change: Change, matrices: Sequence[Matrix], triplets: Triplets) -> None:
    """The correction of the weights, and what its factor makes of the singular values."""
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


def record(stats: Tensor, triplets: Triplets, change: Change, valid: Tensor) -> None:
    """What a step has found and left, into its stats."""
    after = Change(change.added).of(triplets.sigma)
    stats[:, Stat.TOP] = torch.where(valid, after.abs().amax(1), stats[:, Stat.TOP])
    stats[:, Stat.VALID] = valid.to(stats.dtype)


def _layout(matrices: Sequence[Matrix]) -> BasisLayout:
    blocks = [matrix.block for matrix in matrices]
    return BasisLayout(
        tuple(matrix.columns for matrix in matrices),
        tuple(kept_columns(block) for block in blocks),
        tuple(probe_columns(block) for block in blocks),
    )
