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

import torch
from torch import Tensor

from specopt import kernels
from specopt.kernels import Triplets, TurnLayout

from ..views import Matrix
from .common import (
    LEFT,
    RIGHT,
    STEP,
    Schedule,
    Stat,
    all_idle,
    count_step,
    exact_triplets,
    fits,
    gather_stats,
    has_stats,
    noise,
    noise_like,
    probe_columns,
    put_omega,
    restart,
    with_omega,
)


def kept_columns(columns: int) -> int:
    return columns // 4


def basis_columns(block: int) -> int:
    return block - probe_columns(block)


def has_state(matrix: Matrix) -> bool:
    width = matrix.columns + probe_columns(matrix.block)
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
        width = matrix.columns + probe_columns(matrix.block)
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
    record(matrices, stats, first)
    return first


def record(matrices: Sequence[Matrix], stats: Tensor, first: First) -> None:
    """What a step has found, into its stats, and these into the states."""
    stats[:, Stat.SIGMA] = first.sigma
    stats[:, Stat.TOP] = torch.where(first.valid, first.sigma, stats[:, Stat.TOP])
    stats[:, Stat.VALID] = first.valid
    count_step(matrices, stats)


def on_right(matrix: Matrix) -> bool:
    """Whether the next half product is ``W [V | Ω]``."""
    return bool(matrix.state[STEP] % 2 == 0)


def _sides_of(matrices: Sequence[Matrix], right: Sequence[bool]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Of half products from the right or from the left: weights, the blocks beside them, and those of their images."""
    pairs = list(zip(matrices, right, strict=True))
    weights = [m.weight if r else m.weight.mT for m, r in pairs]
    return weights, [m.state[RIGHT if r else LEFT] for m, r in pairs], [m.state[LEFT if r else RIGHT] for m, r in pairs]


def _operands(blocks: Sequence[Tensor], matrices: Sequence[Matrix]) -> list[Tensor]:
    """``[ V | Ω ]`` of state ``[ V | WᵀΩ ]``."""
    if blocks[0].device.type == "cpu":
        return [with_omega(block[:, : m.columns], m) for block, m in zip(blocks, matrices, strict=True)]
    wide = kernels.allocate([(block.shape[0], block.shape[1]) for block in blocks], blocks[0])
    bases = [block[:, : m.columns] for block, m in zip(blocks, matrices, strict=True)]
    kernels.copy_blocks(bases, [block[:, : m.columns] for block, m in zip(wide, matrices, strict=True)])
    put_omega(wide, matrices)
    return wide


def _exact(matrices: Sequence[Matrix], stats: Tensor) -> First:
    triplets = exact_triplets(matrices, stats)
    sigma = triplets.sigma[:, 0]
    valid = sigma.isfinite()
    stats[:, Stat.RESIDUAL] = torch.where(valid, 0.0, stats[:, Stat.RESIDUAL])
    stats[:, Stat.PAIRS] = 0.5
    return First(sigma, triplets.lefts, triplets.rights, valid)


class _Sides:
    """The half products of a list of matrices, each on the side at its turn."""

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        self.matrices = matrices
        columns = tuple(matrix.columns for matrix in matrices)
        self.layout = TurnLayout(
            columns,
            tuple(kept_columns(k) for k in columns),
            tuple(probe_columns(matrix.block) for matrix in matrices),
        )
        self.on_right = [on_right(matrix) for matrix in matrices]
        self.seen: list[tuple[list[Tensor], list[Tensor], Tensor]] = []
        self.halves = 0

    def half(self, active: Tensor | None = None) -> tuple[Triplets, Tensor]:
        """One half product: the Ritz triplets, as (images' side, basis' side), and the residual that the product shows
        of the triplet before it. Moves both blocks on where active and finite."""
        right = [on != (self.halves % 2 == 1) for on in self.on_right]
        weights, mine, others = _sides_of(self.matrices, right)
        sizes = [(other.shape[0], other.shape[1]) for other in others]
        products = kernels.allocate(sizes, others[0], zero=active is not None)
        kernels.skinny_products(weights, _operands(mine, self.matrices), out=products, active=active)
        starts = noise_like(others, self.matrices, self.halves)
        triplets, residual, valid = kernels.turn(products, mine, others, starts, self.layout, active=active)
        if self.halves < 2:
            self.seen.append((products, others, valid))
        self.halves += 1
        return triplets, residual

    def look(self, sigma: Tensor, residual: Tensor, doubtful: Tensor) -> Tensor:
        """The residual, but where doubtful that of the triplet as the first half product has left it: by one column of
        the next one, which costs little beside the pair that it may save."""
        chosen = doubtful.nonzero().flatten().tolist()
        if not chosen:
            return residual
        right = [not self.on_right[i] for i in chosen]
        weights, mine, others = _sides_of([self.matrices[i] for i in chosen], right)
        images = kernels.skinny_products(weights, [block[:, :1] for block in mine])
        return residual.index_put((doubtful,), kernels.first_column_residuals(images, others, sigma[chosen]))

    def keep_probes(self) -> None:
        """The probes of this step's first product on each side, for the next to be compared with."""
        if not max(self.layout.followers):
            return
        for blocks in self.seen:
            products, others = ([x[:, k:] for x, k in zip(xs, self.layout.columns, strict=True)] for xs in blocks[:2])
            kernels.copy_blocks(products, others, active=blocks[2])

    def oriented(self, triplets: Triplets) -> tuple[list[Tensor], list[Tensor]]:
        """(left, right) blocks of the triplets of an odd number of halves."""
        pairs = zip(triplets.lefts, triplets.rights, self.on_right, strict=True)
        swapped = [(image, basis) if on else (basis, image) for image, basis, on in pairs]
        return [left for left, _ in swapped], [right for _, right in swapped]


def _tracked(matrices: Sequence[Matrix], stats: Tensor) -> First:
    sides = _Sides(matrices)
    schedule = Schedule.of(matrices, stats)
    triplets, residual = sides.half()
    sigma = triplets.sigma[:, 0]
    lefts, rights = sides.oriented(triplets)
    pairs = torch.full_like(sigma, 0.5)
    expected = stats[:, Stat.TOP]
    wanted = schedule.first(sigma, expected, residual)
    if sigma.device.type == "cpu" and bool(wanted.any()):
        residual = sides.look(sigma, residual, schedule.doubtful(wanted, sigma, expected))
        wanted = schedule.first(sigma, expected, residual)
    for _ in range(1, schedule.rounds):
        if all_idle(wanted):
            break
        sides.half(wanted)
        triplets, shown = sides.half(wanted)
        residual = torch.where(wanted, shown, residual)
        before, sigma = sigma, torch.where(wanted, triplets.sigma[:, 0], sigma)
        new_lefts, new_rights = sides.oriented(triplets)
        kernels.copy_blocks([*new_lefts, *new_rights], [*lefts, *rights], active=torch.cat([wanted, wanted]))
        pairs = pairs + wanted.to(pairs.dtype)
        wanted = wanted & schedule.again(pairs + 0.5, sigma, before, residual)
    sides.keep_probes()
    valid = sigma.isfinite()
    stats[:, Stat.RESIDUAL] = torch.where(valid, residual, stats[:, Stat.RESIDUAL])
    stats[:, Stat.PAIRS] = pairs
    return First(sigma, lefts, rights, valid)
