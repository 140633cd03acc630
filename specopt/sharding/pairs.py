"""The tracker of pairs (:mod:`specopt.tracker.pairs`) over ranks: the same state and the same steps, but that
``Z = Wᵀ U`` is of the corrected weight, and taken up when the next step begins.

Whether a step makes a conditional pair depends on the residual of the last step, which is there by then, and on its own
only where that might call it off: so for corrections of one triplet every step makes the pairs that it would make
unsharded, and ``Z`` is waited for only where a pair is in question. (The residual of several triplets counts in the
step itself, so those wait in each.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specopt import kernels
from specopt.kernels import BasisLayout, Triplets

from ..tracker.common import (
    BLOCK,
    PROBE,
    STATS,
    Schedule,
    Stat,
    count_step,
    fits,
    gather_stats,
    has_stats,
    noise_like,
    omega,
    probe_columns,
    restart,
)
from ..tracker.pairs import Correct, Found, apply, correct_exact, kept_columns, record
from .cut import spread
from .exchange import Exchange, late, now
from .triplets import gram, ritz
from .views import ShardedMatrix

AT_ONCE = 2**20
"""Entries of a weight that are copied to float64 at a time."""

Then = Callable[[Tensor], Exchange[None]]
"""What else is to be done with weights once they are corrected, given the stats (B, len(Stat)) of the step, which it
may write to."""


def upright(matrix: ShardedMatrix) -> ShardedMatrix:
    """Read so that ranks have whole rows, where one way or the other they have. A square one is read as it is, for
    nothing in its state would tell which way the block goes, where it is loaded on other ranks."""
    rows, columns = matrix.cut.shape
    may_turn = rows != columns and not matrix.cut.by_rows and not matrix.complete
    return matrix.turned if may_turn and matrix.cut.mT.by_rows else matrix


def has_state(matrix: ShardedMatrix) -> bool:
    """Of an :func:`upright` matrix."""
    rows, a = matrix.cut.shape[1], probe_columns(matrix.block)
    if not has_stats(matrix):
        return False
    shapes = {BLOCK: (rows, matrix.columns), PROBE: (rows, a)}
    return matrix.complete or all(fits(matrix.state, key, shape, matrix) for key, shape in shapes.items())


def own_rows(blocks: Sequence[Tensor], matrices: Sequence[ShardedMatrix]) -> list[Tensor]:
    """This rank's rows of left blocks: they are all there is where ranks have whole rows of the weight."""
    return [x if m.cut.by_rows else x[m.cut.rows] for x, m in zip(blocks, matrices, strict=True)]


def own_columns(blocks: Sequence[Tensor], matrices: Sequence[ShardedMatrix]) -> list[Tensor]:
    """Of right blocks the rows that stand for this rank's columns of the weight."""
    return [x[m.cut.columns] for x, m in zip(blocks, matrices, strict=True)]


def own_part(triplets: Triplets, matrices: Sequence[ShardedMatrix]) -> Triplets:
    """What of them is to correct this rank's part of the weights; sigma is the same tensor."""
    return Triplets(triplets.sigma, own_rows(triplets.lefts, matrices), own_columns(triplets.rights, matrices))


def images(matrices: Sequence[ShardedMatrix], bases: Sequence[Tensor]) -> Exchange[Triplets]:
    """The triplets of ``Y = W V``: the Gram matrices are summed, or Y where no rank has whole rows of it."""
    local = kernels.skinny_products([m.weight for m in matrices], own_columns(bases, matrices))
    return (yield from _triplets(matrices, local, bases))


def exact_triplets(matrices: Sequence[ShardedMatrix]) -> Exchange[Triplets]:
    """The same of complete matrices, for which V is the identity."""
    dtype = kernels.accumulation_dtype(matrices[0].weight.dtype)
    device = matrices[0].weight.device
    bases = [kernels.identity(m.columns, dtype, device) for m in matrices]
    local = []
    for matrix in matrices:
        weight = matrix.weight.to(dtype)
        if not matrix.cut.by_rows:
            wide = weight.new_zeros(len(weight), matrix.columns)
            wide[:, matrix.cut.columns] = weight
            weight = wide
        local.append(weight)
    return (yield from _triplets(matrices, local, bases))


def _triplets(
    matrices: Sequence[ShardedMatrix], local: Sequence[Tensor], bases: Sequence[Tensor]
) -> Exchange[Triplets]:
    pairs = zip(local, matrices, strict=True)
    asked = [gram(y) if m.cut.by_rows else spread(y, m.cut.rows, m.cut.shape[0]) for y, m in pairs]
    sums = yield now(matrices, asked)
    products = [y if m.cut.by_rows else total for y, m, total in zip(local, matrices, sums, strict=True)]
    grams = [total if m.cut.by_rows else gram(total) for m, total in zip(matrices, sums, strict=True)]
    return ritz(products, bases, grams)


def transposed_terms(matrices: Sequence[ShardedMatrix], lefts: Sequence[Tensor]) -> list[Tensor]:
    """This rank's terms (n, ·) of ``Wᵀ X``, X given by its own rows."""
    local = kernels.skinny_products([m.weight.mT for m in matrices], lefts)
    return [spread(x, m.cut.columns, m.cut.shape[1]) for x, m in zip(local, matrices, strict=True)]


def own_omega(matrix: ShardedMatrix, columns: int, like: Tensor) -> Tensor:
    """This rank's rows of Ω."""
    mine: Tensor = omega(matrix.cut.shape[0], columns, like)[matrix.cut.rows]
    return mine


def squared_norms(matrices: Sequence[ShardedMatrix]) -> list[Tensor]:
    """``‖W‖²_F`` of this rank's part, (1,) in float64 each."""
    return [_squared_norm(matrix.weight).reshape(1) for matrix in matrices]


def _squared_norm(weight: Tensor) -> Tensor:
    """Some rows after the others: in float64 a whole shard would take twice the memory of its own."""
    rows = max(1, AT_ONCE // max(1, weight.shape[1]))
    total = weight.new_zeros((), dtype=torch.float64)
    for some in torch.split(weight, rows):
        total += some.to(torch.float64).square().sum()
    return total


class Start:
    """What has to be seen of new matrices before the base update, and their state after it."""

    def __init__(self, matrices: Sequence[ShardedMatrix]) -> None:
        self.matrices = matrices
        self.tracked = [matrix for matrix in matrices if not matrix.complete]
        self.squares: list[Tensor] = []
        self.before: list[Tensor] = []

    def look(self) -> Exchange[None]:
        sums = yield now([*self.matrices, *self.tracked], [*squared_norms(self.matrices), *self._probes()])
        self.squares, self.before = sums[: len(self.matrices)], sums[len(self.matrices) :]

    def _probes(self) -> list[Tensor]:
        if not self.tracked:
            return []
        like = torch.empty(0, dtype=kernels.accumulation_dtype(self.tracked[0].weight.dtype))
        like = like.to(self.tracked[0].weight.device)
        return transposed_terms(self.tracked, [own_omega(m, m.columns, like) for m in self.tracked])

    def finish(self) -> Exchange[None]:
        """After the base update."""
        for matrix, square in zip(self.matrices, self.squares, strict=True):
            restart(matrix, square[0])
        if not self.tracked:
            return
        after = yield now(self.tracked, self._probes())
        moved = [torch.nan_to_num(b - a, 0.0, 0.0, 0.0) for a, b in zip(self.before, after, strict=True)]
        blocks = [torch.empty_like(x) for x in moved]
        kernels.orthonormalize(moved, noise_like(blocks, self.tracked), blocks)
        for matrix, block, before in zip(self.tracked, blocks, self.before, strict=True):
            matrix.state[BLOCK] = block
            matrix.state[PROBE] = torch.nan_to_num(before[:, : probe_columns(matrix.block)], 0.0, 0.0, 0.0)


def nothing_else(_: Tensor) -> Exchange[None]:
    yield from ()


def step(
    matrices: Sequence[ShardedMatrix], correct: Correct, rank: int = 1, then: Then = nothing_else
) -> Exchange[None]:
    """One step of matrices of one device, accumulation dtype and kind (complete or tracked), all with state. See
    :func:`specopt.tracker.pairs.step`."""
    stats = gather_stats(matrices)
    work = _exact if matrices[0].complete else _tracked
    yield from work(matrices, stats, correct, rank, then)


def _exact(matrices: Sequence[ShardedMatrix], stats: Tensor, correct: Correct, _: int, then: Then) -> Exchange[None]:
    triplets = yield from exact_triplets(matrices)
    correct_exact(matrices, stats, triplets, correct, own_part(triplets, matrices))
    yield from then(stats)
    count_step(matrices, stats)


def _tracked(
    matrices: Sequence[ShardedMatrix], stats: Tensor, correct: Correct, rank: int, then: Then
) -> Exchange[None]:
    work = Pair(matrices, rank)
    sigma, pairs = yield from settled(work, stats)
    valid = sigma.isfinite()
    stats[:, Stat.SIGMA] = sigma
    change = correct(Found(work.triplets.sigma, valid, stats))
    apply(change, matrices, own_part(work.triplets, matrices))
    record(stats, work.triplets, change, valid)
    stats[:, Stat.PAIRS] = pairs
    yield from then(stats)
    starts = noise_like(work.bases, matrices)
    held = [matrix.state[STATS] for matrix in matrices]
    count_step(matrices, stats)
    everyone = range(len(matrices))
    work.returned = yield late(matrices, work.terms(everyone))
    first, _ = work.measure(everyone)
    chosen = chosen_of(valid)
    for i in chosen:
        held[i][Stat.RESIDUAL] = first[i]
    work.next_basis(chosen, change.added, starts)
    work.keep_probes(chosen)


def settled(work: Pair, stats: Tensor) -> Exchange[tuple[Tensor, Tensor]]:
    """As many pairs as the schedule asks for; sigma₁ and their number (B,)."""
    matrices, rank = work.matrices, work.rank
    schedule = Schedule.of(matrices, stats)
    yield from work.look(range(len(matrices)))
    sigma = work.triplets.sigma[:, 0].clone()
    pairs = torch.ones_like(sigma)
    asks = schedule.first(sigma, stats[:, Stat.TOP], stats[:, Stat.RESIDUAL])
    if rank > 1:
        asks = sigma.isfinite() & (schedule.maximum > pairs)
    before: Tensor | None = None
    nothing = torch.zeros_like(sigma)[:, None]
    for done in range(1, schedule.rounds):
        chosen = chosen_of(asks)
        if not chosen:
            break
        residual = yield from work.back(chosen)
        if before is None:
            fine = residual <= 0.5 * schedule.tolerance
            seen = residual if rank > 1 else torch.where(fine, residual, work.residuals)
            wanted = asks & schedule.first(sigma, stats[:, Stat.TOP], seen)
        else:
            wanted = asks & schedule.again(pairs, sigma, before, residual)
        chosen = chosen_of(wanted)
        if not chosen:
            break
        work.next_basis(chosen, nothing, noise_like(work.bases, matrices, shift=done))
        yield from work.look(chosen)
        before, sigma = sigma, work.triplets.sigma[:, 0].clone()
        pairs = pairs + wanted
        asks = wanted & sigma.isfinite() & (schedule.maximum > pairs)
    return sigma, pairs


def chosen_of(mask: Tensor) -> list[int]:
    return [i for i, on in enumerate(mask.tolist()) if on]


class Pair:
    """``Y = W V`` with its Ritz triplets and ``Z = Wᵀ [U | Ω]``, made as often as a step asks for."""

    def __init__(self, matrices: Sequence[ShardedMatrix], rank: int) -> None:
        self.matrices, self.rank = matrices, rank
        blocks = [matrix.block for matrix in matrices]
        self.layout = BasisLayout(
            tuple(matrix.columns for matrix in matrices),
            tuple(kept_columns(block) for block in blocks),
            tuple(probe_columns(block) for block in blocks),
        )
        self.bases = [matrix.state[BLOCK] for matrix in matrices]
        self.probes = [matrix.state[PROBE] for matrix in matrices]
        like = self.bases[0]
        self.triplets = Triplets(like.new_zeros(len(matrices), max(self.layout.columns)), [like] * len(matrices), [])
        self.triplets.rights.extend(self.bases)
        self.returned = [block.new_zeros(block.shape[0], 0) for block in self.bases]
        self.residuals = gather_stats(matrices)[:, Stat.RESIDUAL]
        """Of the last step."""

    def look(self, chosen: Sequence[int]) -> Exchange[None]:
        """The triplets of some of the matrices, by a product with their bases."""
        found = yield from images([self.matrices[i] for i in chosen], [self.bases[i] for i in chosen])
        for i, sigma, left, right in zip(chosen, *found, strict=True):
            self.triplets.sigma[i, : len(sigma)] = sigma
            self.triplets.lefts[i], self.triplets.rights[i] = left, right

    def terms(self, chosen: Sequence[int]) -> list[Tensor]:
        """This rank's terms of ``Wᵀ [U | Ω]``."""
        matrices = [self.matrices[i] for i in chosen]
        lefts = own_rows([self.triplets.lefts[i] for i in chosen], matrices)
        wide = [
            torch.cat([left, own_omega(m, probe_columns(m.block), left)], 1)
            for left, m in zip(lefts, matrices, strict=True)
        ]
        return transposed_terms(matrices, wide)

    def back(self, chosen: Sequence[int]) -> Exchange[Tensor]:
        """Z of some, now; the largest residual of their first ``rank`` triplets (B,), 0 for the others."""
        sums = yield now([self.matrices[i] for i in chosen], self.terms(chosen))
        for i, total in zip(chosen, sums, strict=True):
            self.returned[i] = total
        return self.measure(chosen)[1]

    def measure(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Residuals (B,) by Z, as of :func:`specopt.kernels.leading_residuals`."""
        picked = self._picked(chosen)
        found = kernels.leading_residuals([self.returned[i] for i in chosen], picked, self.rank)
        out = torch.zeros_like(self.triplets.sigma[:, 0]), torch.zeros_like(self.triplets.sigma[:, 0])
        for whole, part in zip(out, found, strict=True):
            whole[list(chosen)] = part
        return out

    def next_basis(self, chosen: Sequence[int], change: Tensor, starts: Sequence[Tensor]) -> None:
        if not chosen:
            return
        lists = (self.returned, self.probes, starts, self.bases)
        returned, probes, random, bases = ([blocks[i] for i in chosen] for blocks in lists)
        layout = BasisLayout(*(tuple(counts[i] for i in chosen) for counts in self.layout))
        kernels.next_basis(self._picked(chosen), returned, probes, random, layout, change[list(chosen)], bases)

    def keep_probes(self, chosen: Sequence[int]) -> None:
        """What the next step's are compared with."""
        for i in chosen:
            self.probes[i].copy_(self.returned[i][:, self.matrices[i].columns :])

    def _picked(self, chosen: Sequence[int]) -> Triplets:
        width = max(self.layout.columns[i] for i in chosen)
        lefts, rights = ([blocks[i] for i in chosen] for blocks in self.triplets[1:])
        return Triplets(self.triplets.sigma[list(chosen), :width], lefts, rights)
