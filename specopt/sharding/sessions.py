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
from ..rules.norm_scale import NormScale
from ..rules.penalty import SpectralPenalty, strengths
from ..rules.steering import INITIAL, noted_norm
from ..rules.whole import finish_whole, frobenius_factors
from ..session import Gate
from ..tracker.common import gather_stats, has_stats, restart
from ..tracker.pairs import Correct
from . import halves, pairs
from .exchange import Exchange, now
from .views import ShardedMatrix

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
    if isinstance(rule, NormScale) and sharded[0].group["norm"] == "frobenius":
        return _FrobeniusScaled(sharded, gate)
    upright = [pairs.upright(matrix) for matrix in sharded]
    reads_initial = find(rule, NormScale) is not None
    if isinstance(rule, Compose):
        correct = Corrections(rule, upright, gate)
        return _Corrected(upright, correct, correct.reach, reads_initial)
    assert isinstance(rule, NormScale | SpectralDecay)
    return _Corrected(upright, rule.correction(upright, gate), rule.reach(upright), reads_initial)


def has_state(rule: Rule, matrix: ShardedMatrix) -> bool:
    """Whether the matrix' tracker can go on from its state."""
    if isinstance(rule, SpectralPenalty):
        return halves.has_state(matrix)
    if isinstance(rule, NormScale) and matrix.group["norm"] == "frobenius":
        return has_stats(matrix)
    return pairs.has_state(pairs.upright(matrix))


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
        yield from pairs.step(self.matrices, self.correct, self.rank)


class _FrobeniusScaled(ShardedSession):
    """``W *= F*/‖W‖_F``."""

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
        sums = yield now(self.matrices, pairs.squared_norms(self.matrices))
        norm = torch.cat(sums).sqrt().to(stats.dtype)
        _, factors = frobenius_factors(self.matrices, stats, self.gate, norm)
        kernels.scale_([matrix.weight for matrix in self.matrices], factors)
        finish_whole(self.matrices, stats, norm.isfinite())


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
            self.values = list((yield from pairs.measure(self.unknown)).unbind())

    def note(self) -> None:
        """After the base update: AdamW takes state that is not empty for its own."""
        for matrix, value in zip(self.unknown, self.values, strict=True):
            dtype = kernels.accumulation_dtype(matrix.param.dtype)
            matrix.state[INITIAL[matrix.group["norm"]]] = value.to(dtype, copy=True)
