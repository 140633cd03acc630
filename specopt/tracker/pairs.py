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
from specopt.kernels import BasisLayout, Product, Triplets

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


def next_products(matrices: Sequence[Matrix]) -> list[Product]:
    """The half products that :func:`step` begins with, of tracked matrices; to be made of the weights as they are
    then."""
    bases = [matrix.state[BLOCK] for matrix in matrices]
    return [
        Product(base, base.new_empty(matrix.weight.shape[0], matrix.columns), False)
        for base, matrix in zip(bases, matrices, strict=True)
    ]


def step(matrices: Sequence[Matrix], correct: Correct, made: Sequence[Tensor] | None = None) -> None:
    """One step of matrices of one device, accumulation dtype and kind (complete or tracked), all with state.

    Args:
        made: the products with their blocks, if they are there.
    """
    stats = gather_stats(matrices)
    weights = [matrix.weight for matrix in matrices]
    if matrices[0].complete:
        _exact(matrices, stats, correct)
    else:
        _tracked(matrices, weights, stats, correct, made)
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


def _tracked(
    matrices: Sequence[Matrix],
    weights: Sequence[Tensor],
    stats: Tensor,
    correct: Correct,
    made: Sequence[Tensor] | None,
) -> None:
    transposed = [weight.mT for weight in weights]
    bases = [matrix.state[BLOCK] for matrix in matrices]
    probes = [matrix.state[PROBE] for matrix in matrices]
    layout = _layout(matrices)
    schedule = Schedule.of(matrices, stats)
    residual = stats[:, Stat.RESIDUAL].clone()

    widths = [k + a for k, a in zip(layout.columns, layout.followers, strict=True)]
    lefts = kernels.allocate([(w.shape[0], width) for w, width in zip(weights, widths, strict=True)], bases[0])
    returned = kernels.allocate([(w.shape[1], width) for w, width in zip(weights, widths, strict=True)], bases[0])
    put_omega(lefts, matrices)
    triplets = Triplets(
        stats.new_zeros(len(matrices), max(layout.columns)),
        [left[:, : m.columns] for left, m in zip(lefts, matrices, strict=True)],
        kernels.allocate([(base.shape[0], base.shape[1]) for base in bases], bases[0]),
    )
    products = kernels.skinny_products(weights, bases) if made is None else list(made)
    kernels.ritz_triplets(products, bases, out=triplets)

    sigma = triplets.sigma[:, 0].clone()
    pairs = torch.ones_like(sigma)
    wanted = schedule.first(sigma, stats[:, Stat.TOP], residual)
    nothing = torch.zeros_like(sigma)
    for done in range(1, schedule.rounds):
        if all_idle(wanted):
            break
        starts = noise_like(bases, matrices, shift=done)
        kernels.skinny_products(transposed, lefts, out=returned, active=wanted)
        new = kernels.next_basis(triplets, returned, probes, starts, layout, nothing, bases, active=wanted)
        residual = torch.where(wanted, new, residual)
        kernels.skinny_products(weights, bases, out=products, active=wanted)
        kernels.ritz_triplets(products, bases, out=triplets, active=wanted)
        pairs = pairs + wanted
        before, sigma = sigma, triplets.sigma[:, 0].clone()
        wanted = wanted & schedule.again(pairs, sigma, before, residual)

    valid = sigma.isfinite()
    stats[:, Stat.SIGMA] = sigma
    change = correct(sigma, valid, stats)
    then = [Product(left, out, True) for left, out in zip(lefts, returned, strict=True)]
    _apply(change, matrices, triplets, then)
    starts = noise_like(bases, matrices)
    new = kernels.next_basis(triplets, returned, probes, starts, layout, change.added, bases, active=valid)
    if max(layout.followers):
        seen = [block[:, m.columns :] for block, m in zip(returned, matrices, strict=True)]
        kernels.copy_blocks(seen, probes, active=valid)
    _record(stats, triplets, change, valid)
    stats[:, Stat.RESIDUAL] = torch.where(valid, new, residual)
    stats[:, Stat.PAIRS] = pairs


def _apply(
    change: Change, matrices: Sequence[Matrix], triplets: Triplets, products: Sequence[Product] | None = None
) -> None:
    """The correction of the weights, and what it makes of their singular values but for the first one's change."""
    kernels.corrections_(
        [matrix.weight for matrix in matrices],
        change.added,
        triplets.lefts,
        triplets.rights,
        factors=change.factor,
        products=products,
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
