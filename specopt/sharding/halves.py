"""The tracker of half products (:mod:`specopt.tracker.halves`) over ranks: the same state and the same steps.

A half product takes the weight from one side, say ``[Y | P] = W [V | Ω]``. Where ranks have whole rows, Y and the
blocks ``[U | P_before]`` beside it stay in pieces, as the weight is, and all that is to be known of them follows from
one Gram matrix, of ``[Y | P | U | P_before]``: the triplets, the residual, and what makes the next U orthonormal. On
the other side, and of weights that are cut both ways, ``[Y | P]`` itself is summed, and is on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specopt import kernels
from specopt.kernels import TurnLayout

from ..tracker.common import (
    LEFT,
    RIGHT,
    STATS,
    Schedule,
    Stat,
    gather_stats,
    has_stats,
    noise,
    omega,
    probe_columns,
    restart,
)
from ..tracker.halves import First, kept_columns, on_right, record
from .cut import count_of, is_distributed, local_of, spread
from .exchange import Exchange, now
from .pairs import chosen_of, exact_triplets, own_columns, own_rows
from .triplets import DEPENDENT, Basis, candidates, factors, gram, mixed, solved
from .views import ShardedMatrix


def is_kept_in_pieces(matrix: ShardedMatrix, key: str) -> bool:
    """Whether of the blocks of this side a rank has the rows that belong to its part of the weight: only where those
    are cut up as a dimension of the parameter is, which is what a DTensor can tell."""
    cut, piece = (matrix.cut if key == LEFT else matrix.cut.mT), matrix.piece
    is_dimension = piece.ndim == matrix.param.ndim and (key == LEFT or piece.ndim == 2)
    return matrix.part is None and is_dimension and cut.by_rows


def block_of_state(matrix: ShardedMatrix, key: str) -> Tensor:
    """What this rank has of the blocks of a side."""
    return local_of(matrix.state[key])


def has_state(matrix: ShardedMatrix) -> bool:
    if not has_stats(matrix):
        return False
    return matrix.complete or all(_fits(matrix, key) for key in (LEFT, RIGHT))


def _fits(matrix: ShardedMatrix, key: str) -> bool:
    value, width = matrix.state.get(key), matrix.columns + probe_columns(matrix.block)
    if not isinstance(value, Tensor) or is_distributed(value) != is_kept_in_pieces(matrix, key):
        return False
    length, places = _rows(matrix, key)
    local, dtype = local_of(value), kernels.accumulation_dtype(matrix.param.dtype)
    rows = count_of(places) if is_kept_in_pieces(matrix, key) else length
    return (tuple(value.shape), len(local), value.dtype) == ((length, width), rows, dtype)


def _rows(matrix: ShardedMatrix, key: str) -> tuple[int, slice | Tensor]:
    """Of the blocks of a side, their length and this rank's places."""
    cut = matrix.cut if key == LEFT else matrix.cut.mT
    return cut.shape[0], cut.rows


def start(matrices: Sequence[ShardedMatrix]) -> Exchange[None]:
    """Complete state for new matrices: see :func:`specopt.tracker.halves.start`."""
    for matrix in matrices:
        restart(matrix)
    tracked = [matrix for matrix in matrices if not matrix.complete]
    if not tracked:
        return
    fixed = [noise(m.cut.shape[0], m.columns, m)[m.cut.rows] for m in tracked]
    terms = kernels.skinny_products([m.gradient.mT for m in tracked], fixed)
    sums = yield now(tracked, [spread(x, m.cut.columns, m.cut.shape[1]) for x, m in zip(terms, tracked, strict=True)])
    ranges = [torch.nan_to_num(block, 0.0, 0.0, 0.0) for block in sums]
    rights = [torch.empty_like(block) for block in ranges]
    kernels.orthonormalize(ranges, [noise(len(r), m.columns, m) for r, m in zip(rights, tracked, strict=True)], rights)
    for matrix, block in zip(tracked, rights, strict=True):
        length, width = matrix.cut.shape[0], matrix.columns + probe_columns(matrix.block)
        _store(matrix, RIGHT, torch.nn.functional.pad(block, (0, width - matrix.columns)))
        _store(matrix, LEFT, block.new_zeros(length, width))


def _store(matrix: ShardedMatrix, key: str, block: Tensor) -> None:
    """Takes a whole block into the state."""
    if not is_kept_in_pieces(matrix, key):
        matrix.state[key] = block
        return
    matrix.state[key] = matrix.in_pieces(block[_rows(matrix, key)[1]].clone(), block.shape)


def step(matrices: Sequence[ShardedMatrix]) -> Exchange[First]:
    """One step of matrices of one device, accumulation dtype and kind (complete or tracked), all with state. Of what it
    returns, this rank's part: as many rows as it has of the weight, and as many columns."""
    stats = gather_stats(matrices)
    work = _exact if matrices[0].complete else _tracked
    first = yield from work(matrices, stats)
    record(matrices, stats, first)
    return first


def _exact(matrices: Sequence[ShardedMatrix], stats: Tensor) -> Exchange[First]:
    triplets = yield from exact_triplets(matrices)
    sigma = triplets.sigma[:, 0]
    valid = sigma.isfinite()
    stats[:, Stat.RESIDUAL] = torch.where(valid, 0.0, stats[:, Stat.RESIDUAL])
    stats[:, Stat.PAIRS] = 0.5
    return First(sigma, own_rows(triplets.lefts, matrices), own_columns(triplets.rights, matrices), valid)


def _tracked(matrices: Sequence[ShardedMatrix], stats: Tensor) -> Exchange[First]:
    sides = [_Side(matrix) for matrix in matrices]
    schedule = Schedule.of(matrices, stats)
    everyone = range(len(matrices))
    found = yield from half(sides, everyone)
    sigma, residual = found.sigma, found.residual
    lefts, rights = [side.left for side in sides], [side.right for side in sides]
    pairs = torch.full_like(sigma, 0.5)
    expected = stats[:, Stat.TOP]
    wanted = schedule.first(sigma, expected, residual)
    if bool(wanted.any()):
        residual = yield from look(sides, sigma, residual, schedule.doubtful(wanted, sigma, expected))
        wanted = schedule.first(sigma, expected, residual)
    for _ in range(1, schedule.rounds):
        if not bool(wanted.any()):
            break
        chosen = chosen_of(wanted)
        yield from half(sides, chosen)
        found = yield from half(sides, chosen)
        residual = torch.where(wanted, found.residual, residual)
        before, sigma = sigma, torch.where(wanted, found.sigma, sigma)
        for i in chosen:
            lefts[i], rights[i] = sides[i].left, sides[i].right
        pairs = pairs + wanted.to(pairs.dtype)
        wanted = wanted & schedule.again(pairs + 0.5, sigma, before, residual)
    for side in sides:
        side.keep_probes()
    valid = sigma.isfinite()
    stats[:, Stat.RESIDUAL] = torch.where(valid, residual, stats[:, Stat.RESIDUAL])
    stats[:, Stat.PAIRS] = pairs
    return First(sigma, lefts, rights, valid)


class _Side:
    """The half products of one matrix, from the side at its turn."""

    def __init__(self, matrix: ShardedMatrix) -> None:
        self.matrix, self.halves, self.starts_right = matrix, 0, on_right(matrix)
        self.k, self.a = matrix.columns, probe_columns(matrix.block)
        self.r = kept_columns(self.k)
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.candidates: Tensor | None = None
        self.left = self.right = torch.empty(0)
        """u₁ and v₁ as first columns, by the last half product: of them this rank's part."""

    def begin(self, look: bool = False) -> Tensor:
        """This rank's part of the product of the side at its turn, of which a sum is to be asked for; for a
        :meth:`look` of its first column alone."""
        matrix = self.matrix
        self.is_right = self.starts_right != (self.halves % 2 == 1)
        mine, other = (RIGHT, LEFT) if self.is_right else (LEFT, RIGHT)
        self.cut = matrix.cut if self.is_right else matrix.cut.mT
        self.basis, self.other = block_of_state(matrix, mine), block_of_state(matrix, other)
        self.in_pieces, self.basis_in_pieces = (is_kept_in_pieces(matrix, key) for key in (other, mine))
        weight = matrix.weight if self.is_right else matrix.weight.mT
        width = 1 if look else self.k
        block = self.basis[:, :width] if self.basis_in_pieces else self.basis[self.cut.columns, :width]
        if not look:
            block = torch.cat([block, omega(self.cut.shape[1], self.a, self.basis)[self.cut.columns]], 1)
        (self.product,) = kernels.skinny_products([weight], [block])
        if self.in_pieces:
            return gram(torch.cat([self.product, self.other[:, :1] if look else self.other], 1))
        return spread(self.product, self.cut.rows, self.cut.shape[0])

    @property
    def starts(self) -> Tensor:
        """Random columns for directions that vanish, of the whole length."""
        return noise(self.cut.shape[0], self.k, self.matrix, self.halves)

    def look(self, total: Tensor, sigma: Tensor) -> Tensor:
        """The residual, of no dimensions, of the triplet as the last half product has left it."""
        if self.in_pieces:
            return _residual(total[0, 0], total[0, 1], total[1, 1]) / sigma
        return kernels.first_column_residuals([total], [self.other], sigma[None])[0]

    def turn(self, product: Tensor) -> tuple[Tensor, Tensor]:
        """With the whole product: see :func:`specopt.kernels.turn`. sigma₁ and the residual, of no dimensions."""
        self.product = product
        layout = TurnLayout((self.k,), (self.r,), (self.a,))
        triplets, residual, valid = kernels.turn([product], [self.basis], [self.other], [self.starts], layout)
        self._take(triplets.lefts[0], triplets.rights[0], bool(valid))
        return triplets.sigma[0, 0], residual[0]

    def turn_in_pieces(self, total: Tensor) -> tuple[Tensor, Tensor, bool]:
        """The same with the Gram matrix of ``[Y | P | U | P_before]``; and whether that does not tell enough of the
        next U, which is to be made :meth:`again` from what is kept as ``candidates``."""
        k, r, a = self.k, self.r, self.a
        width = k + a
        values, rotation, inverse = (found[0] for found in solved([total[:k, :k]], self.product.dtype))
        sigma = values[0]
        if not bool(sigma.isfinite()) or not bool(total.isfinite().all()):
            nothing = torch.zeros_like(self.product[:, :1])
            self._take(nothing, torch.zeros_like(self.basis[:, :1]), valid=False)
            return torch.full_like(sigma, torch.nan), torch.zeros_like(sigma), False
        scale = 1 / sigma if bool(sigma > 0) else torch.ones_like(sigma)
        along = total[:k, width : width + k].diagonal()[: max(r, 1)]
        residual = _residual(total[0, 0], along[0], total[width, width]) * scale
        images = k - r - a
        mixing = total.new_zeros(2 * width, k)
        mixing[:k, :images] = (rotation * inverse)[:, :images]
        if r:
            mixing[:r, images : images + r] = scale * torch.eye(r, dtype=total.dtype, device=total.device)
            mixing[width : width + r, images : images + r] = torch.diag(-scale * along[:r])
        if a:
            eye = scale * torch.eye(a, dtype=total.dtype, device=total.device)
            mixing[k:width, k - a :], mixing[width + k :, k - a :] = eye, -eye
        starts = self.starts[self.cut.rows] * self.cut.shape[0] ** -0.5
        basis = Basis(torch.cat([self.product, self.other], 1), mixing, starts)
        known = factors(total, mixing)
        made = mixed(basis, known.factor) if known.settled else candidates(basis, known)
        self.candidates = None if known.settled else made
        image = self.product[:, :k] @ (rotation * inverse)[:, :1].to(self.product.dtype)
        turned = self.basis[:, :k] @ rotation.to(self.basis.dtype)
        self.other[:, :k] = made  # in the dtype of the state
        self.basis[:, :k] = turned
        self._take(image, turned, valid=True)
        return sigma, residual, not known.settled

    def again(self, total: Tensor) -> None:
        """The next basis from the Gram matrix of its candidates themselves."""
        assert self.candidates is not None
        factor, _ = kernels.orthonormalizers(total[None], threshold=DEPENDENT)
        self.other[:, : self.k] = self.candidates @ factor[0]
        self.candidates = None

    def _take(self, image: Tensor, basis: Tensor, valid: bool) -> None:
        if self.halves < 2 and valid:
            self.seen.append((self.product, self.other))
        image = image if self.in_pieces else image[self.cut.rows]
        basis = basis if self.basis_in_pieces else basis[self.cut.columns]
        self.left, self.right = (image, basis) if self.is_right else (basis, image)
        self.halves += 1

    def keep_probes(self) -> None:
        """The probes of this step's first product on each side, for the next to be compared with."""
        for product, other in self.seen:
            other[:, self.k :] = product[:, self.k :]


def _residual(image: Tensor, along: Tensor, unit: Tensor) -> Tensor:
    """``‖y − (u · y) u‖`` from ``y · y``, ``u · y`` and ``u · u``, which is 1 but for rounding."""
    return (image - (2 - unit) * along.square()).clamp_min(0).sqrt()


@dataclass
class Found:
    """Of one half product (B,): zero where none was made."""

    sigma: Tensor
    residual: Tensor


def look(sides: Sequence[_Side], sigma: Tensor, residual: Tensor, doubtful: Tensor) -> Exchange[Tensor]:
    """See the look of :mod:`specopt.tracker.halves`."""
    chosen = chosen_of(doubtful)
    if not chosen:
        return residual
    picked = [sides[i] for i in chosen]
    sums = yield now([side.matrix for side in picked], [side.begin(look=True) for side in picked])
    shown = [side.look(total, sigma[i]) for i, side, total in zip(chosen, picked, sums, strict=True)]
    return residual.index_put((doubtful,), torch.stack(shown).to(residual.dtype))


def half(sides: Sequence[_Side], chosen: Sequence[int]) -> Exchange[Found]:
    """One half product of some of the matrices: triplets into their sides, and both blocks moved on where finite."""
    picked = [sides[i] for i in chosen]
    sums = yield now([side.matrix for side in picked], [side.begin() for side in picked])
    like = sides[0].matrix.state[STATS]
    found = Found(like.new_zeros(len(sides)), like.new_zeros(len(sides)))
    unsettled: list[_Side] = []
    for i, side, total in zip(chosen, picked, sums, strict=True):
        if side.in_pieces:
            found.sigma[i], found.residual[i], refilled = side.turn_in_pieces(total)
            unsettled += [side] if refilled else []
        else:
            found.sigma[i], found.residual[i] = side.turn(total)
    if unsettled:
        asked = [gram(side.candidates) for side in unsettled if side.candidates is not None]
        sums = yield now([side.matrix for side in unsettled], asked)
        for side, total in zip(unsettled, sums, strict=True):
            side.again(total)
    return found
