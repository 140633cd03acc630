"""What rules do with sharded matrices in a step: their sessions, as generators in the place of calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from specopt import kernels
from specopt.kernels import Penalty

from ..rules.compose import Compose, Corrections, find
from ..rules.decay import SpectralDecay
from ..rules.norm_scale import NormScale, is_tracked
from ..rules.penalty import SpectralPenalty, strengths
from ..rules.steering import INITIAL, beginners, norm_to_keep, noted_norm
from ..rules.whole import finish_whole, frobenius_factors
from ..session import Gate
from ..tracker.common import STEP, Stat, gather_stats, has_stats, restart
from ..tracker.pairs import Correct, drop_first
from . import halves, pairs
from .exchange import Exchange, now
from .measuring import first_triplets, measure
from .views import ShardedMatrix
from .whole import cap_all

if TYPE_CHECKING:
    from ..session import Rule
    from ..views import Matrix


class ShardedSession(ABC):
    """The control of some sharded matrices in one step."""

    penalty: Penalty | None = None
    """What this rank's part of their gradients gains, once :meth:`before` is through."""
    writes = True
    """Whether :meth:`after` may change the weights."""

    @abstractmethod
    def before(self) -> Exchange[None]:
        """What comes before the base update."""

    @abstractmethod
    def after(self) -> Exchange[None]:
        """What comes after it."""


def begin(rule: Rule, matrices: Sequence[Matrix], gate: Gate) -> ShardedSession:
    """The session of matrices that :meth:`Rule.sort` puts together."""
    sharded = cast("Sequence[ShardedMatrix]", matrices)
    if isinstance(rule, SpectralPenalty):
        return _Penalized(sharded)
    if _is_whole(rule, sharded[0]):
        return (_FrobeniusScaled if sharded[0].group["norm"] == "frobenius" else _Capped)(sharded, gate)
    if isinstance(rule, Compose):
        return _Composed(rule, sharded, gate)
    assert isinstance(rule, NormScale | SpectralDecay)
    upright = [pairs.upright(matrix) for matrix in sharded]
    return _Corrected(upright, rule.correction(upright, gate), rule.reach(upright), isinstance(rule, NormScale))


def has_state(rule: Rule, matrix: ShardedMatrix) -> bool:
    """Whether the matrix' tracker can go on from its state."""
    if isinstance(rule, SpectralPenalty):
        return halves.has_state(matrix)
    return has_stats(matrix) if _is_whole(rule, matrix) else pairs.has_state(pairs.upright(matrix))


def _is_whole(rule: Rule, matrix: Matrix) -> bool:
    """Whether the matrix is changed as a whole, and nothing of it is followed."""
    return isinstance(rule, NormScale) and not is_tracked(matrix)


class _Penalized(ShardedSession):
    """A step of :class:`specopt.SpectralPenalty`: all of it comes before the base update."""

    writes = False

    def __init__(self, matrices: Sequence[ShardedMatrix]) -> None:
        self.matrices = matrices

    def before(self) -> Exchange[None]:
        yield from halves.start([matrix for matrix in self.matrices if not halves.has_state(matrix)])
        first = yield from halves.step(self.matrices)
        sigma = torch.where(first.valid, first.sigma, 0.0)
        self.penalty = Penalty(strengths(self.matrices, sigma) * sigma, first.lefts, first.rights)

    def after(self) -> Exchange[None]:
        yield from ()


class _Corrected(ShardedSession):
    """A step of a rule that acts on weights after the base update."""

    def __init__(self, matrices: Sequence[ShardedMatrix], correct: Correct, rank: int, reads_initial: bool) -> None:
        self.matrices, self.correct, self.rank = matrices, correct, rank
        self.start = pairs.Start([matrix for matrix in matrices if not pairs.has_state(matrix)])
        self.initial = _InitialNorms(matrices if reads_initial else [])

    def before(self) -> Exchange[None]:
        yield from self.initial.look()
        if self.start.matrices:
            yield from self.start.look()

    def after(self) -> Exchange[None]:
        self.initial.note()
        if self.start.matrices:
            yield from self.start.finish()
        yield from self.look_and_correct()

    def look_and_correct(self) -> Exchange[None]:
        yield from pairs.step(self.matrices, self.correct, self.rank)


class _Composed(_Corrected):
    """A step of :class:`specopt.Compose`. The penalty's triplet is read from the weight as the step finds it: whether
    anybody has written to it since the last one, each rank could only tell for itself."""

    def __init__(self, rule: Compose, matrices: Sequence[ShardedMatrix], gate: Gate) -> None:
        upright, group = [pairs.upright(matrix) for matrix in matrices], matrices[0].group
        self.corrections = Corrections(rule, upright, gate)
        scales = find(rule, NormScale) is not None
        super().__init__(upright, self.corrections, self.corrections.reach, scales)
        self.gate, self.turned = gate, [m.flipped != u.flipped for m, u in zip(matrices, upright, strict=True)]
        self.penalizes = rule.penalizes(group)
        self.is_full = scales and group["rank"] == "full"
        self.is_frobenius = scales and group["norm"] == "frobenius"

    def before(self) -> Exchange[None]:
        yield from super().before()
        if self.penalizes:
            self.penalty = yield from self._penalty()

    def _penalty(self) -> Exchange[Penalty]:
        first = yield from first_triplets(self.matrices)
        sigma = torch.stack([one.sigma for one in first])
        sigma = torch.where(sigma.isfinite(), sigma, 0.0)
        sides = [one[:0:-1] if turned else one[1:] for one, turned in zip(first, self.turned, strict=True)]
        lefts, rights = (list(blocks) for blocks in zip(*sides, strict=True))
        return Penalty(strengths(self.matrices, sigma) * sigma, lefts, rights)

    def look_and_correct(self) -> Exchange[None]:
        drop_first(self.matrices)
        if self.is_frobenius:
            self.corrections.norm = yield from _frobenius_norms(self.matrices, gather_stats(self.matrices))
        yield from pairs.step(self.matrices, self.correct, self.rank, self._cap)

    def _cap(self, stats: Tensor) -> Exchange[None]:
        """Of all singular values, in the first of ``every`` steps."""
        due = [i for i, m in enumerate(self.matrices) if self.is_full and m.state[STEP] % m.group["every"] == 0]
        if due:
            chosen, found = [self.matrices[i] for i in due], stats[due]
            found[:, Stat.VALID] = yield from cap_all(chosen, found, self.gate, wild=bool(beginners(chosen)))
            stats[due] = found


class _Whole(ShardedSession):
    """A step of a rule that changes matrices as a whole."""

    def __init__(self, matrices: Sequence[ShardedMatrix], gate: Gate) -> None:
        self.matrices, self.gate = matrices, gate
        self.initial = _InitialNorms(matrices)
        self.fresh = [matrix for matrix in matrices if not has_stats(matrix)]
        self.found: list[Tensor] = []

    def before(self) -> Exchange[None]:
        yield from self.initial.look()
        if self.fresh:
            self.found = yield now(self.fresh, pairs.squared_norms(self.fresh))

    def after(self) -> Exchange[None]:
        self.initial.note()
        for matrix, square in zip(self.fresh, self.found, strict=True):
            restart(matrix, square[0])
        stats = gather_stats(self.matrices)
        valid = yield from self.change(stats)
        finish_whole(self.matrices, stats, valid)

    @abstractmethod
    def change(self, stats: Tensor) -> Exchange[Tensor]:
        """Changes the weights; returns where they are finite (B,)."""


class _FrobeniusScaled(_Whole):
    """``W *= F*/‖W‖_F``."""

    def change(self, stats: Tensor) -> Exchange[Tensor]:
        norm = yield from _frobenius_norms(self.matrices, stats)
        _, factors = frobenius_factors(self.matrices, stats, self.gate, norm)
        kernels.scale_([matrix.weight for matrix in self.matrices], factors)
        return norm.isfinite()


class _Capped(_Whole):
    """``W ← U min(Σ, σ*) Vᵀ``."""

    def change(self, stats: Tensor) -> Exchange[Tensor]:
        return (yield from cap_all(self.matrices, stats, self.gate, wild=bool(beginners(self.matrices))))


def _frobenius_norms(matrices: Sequence[ShardedMatrix], like: Tensor) -> Exchange[Tensor]:
    """(B,)."""
    sums = yield now(matrices, pairs.squared_norms(matrices))
    return torch.cat(sums).sqrt().to(like.dtype)


class _InitialNorms:
    """The norms of weights as they are, where those are to be the targets and not yet noted: see
    :class:`specopt.rules.steering.InitialNorms`."""

    def __init__(self, matrices: Sequence[ShardedMatrix]) -> None:
        self.unknown = [m for m in matrices if m.group["target"] == "initial" and noted_norm(m) is None]
        self.values: list[Tensor] = []

    def look(self) -> Exchange[None]:
        if not self.unknown:
            return
        if self.unknown[0].group["norm"] == "frobenius":
            sums = yield now(self.unknown, pairs.squared_norms(self.unknown))
            self.values = [total[0].sqrt() for total in sums]
        else:
            self.values = list((yield from measure(self.unknown)).unbind())

    def note(self) -> None:
        """After the base update: AdamW takes state that is not empty for its own."""
        for matrix, value in zip(self.unknown, self.values, strict=True):
            dtype = kernels.accumulation_dtype(matrix.param.dtype)
            matrix.state[INITIAL[matrix.group["norm"]]] = norm_to_keep(value).to(dtype, copy=True)
