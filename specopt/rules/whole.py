"""Sessions of rules that change a matrix as a whole, and follow no singular vectors: Frobenius scaling, and the cap of
all singular values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specopt import kernels

from ..session import Gate
from ..tracker.common import (
    BLOCK,
    LEFT,
    PROBE,
    RIGHT,
    Stat,
    count_step,
    gather_stats,
    has_stats,
    restart,
    rounding_seeds,
)
from ..views import Matrix
from .steering import InitialNorms, beginners, distance, down_only, factor_to, targets_of, tell_first


class _Whole:
    penalty = None
    writes = True

    def __init__(self, matrices: Sequence[Matrix], gate: Gate) -> None:
        self.matrices, self.gate = matrices, gate
        self.initial = InitialNorms(matrices)
        self.fresh = [matrix for matrix in matrices if not has_stats(matrix)]
        self.norms = kernels.frobenius_norms([matrix.weight for matrix in self.fresh]) if self.fresh else ()

    def finish(self) -> None:
        self.initial.note()
        for matrix, norm in zip(self.fresh, self.norms, strict=True):
            restart(matrix, norm)
        stats = gather_stats(self.matrices)
        valid = self.change(stats)
        finish_whole(self.matrices, stats, valid)

    def change(self, stats: Tensor) -> Tensor:
        """Changes the weights; returns where they are finite (B,)."""
        raise NotImplementedError


class FrobeniusScaled(_Whole):
    """``W *= F*/‖W‖_F``."""

    def change(self, stats: Tensor) -> Tensor:
        norm, factors = frobenius_factors(self.matrices, stats, self.gate)
        kernels.scale_([matrix.weight for matrix in self.matrices], factors)
        return norm.isfinite()


def finish_whole(matrices: Sequence[Matrix], stats: Tensor, valid: Tensor) -> None:
    """The state that such a step leaves, ``valid`` (B,) telling which matrices are finite."""
    stats[:, Stat.SIGMA] = torch.nan  # no singular value is known
    stats[:, Stat.VALID] = valid.to(stats.dtype)
    count_step(matrices, stats)
    for matrix in matrices:
        for key in (BLOCK, PROBE, LEFT, RIGHT):  # of an earlier time under another rule: they follow no longer
            matrix.state.pop(key, None)


def frobenius_factors(
    matrices: Sequence[Matrix], stats: Tensor, gate: Gate, norm: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``‖W‖_F``, where that is not given, and what the weights are to be scaled by (B,)."""
    if norm is None:
        norm = kernels.frobenius_norms([matrix.weight for matrix in matrices])
    target = targets_of(matrices, stats)
    change = distance(norm, target, norm.isfinite(), down_only(matrices, norm, target, stats))
    tell_first(matrices, beginners(matrices), norm, target, change != 0, gate)
    moved = (change != 0) & (gate.open(matrices, norm) > 0)
    return norm, factor_to(target, norm, moved)


class Capped(_Whole):
    """``W ← U min(Σ, σ*) Vᵀ``."""

    def change(self, stats: Tensor) -> Tensor:
        return cap_all(self.matrices, stats, self.gate, wild=bool(beginners(self.matrices)))


def cap_all(
    matrices: Sequence[Matrix], stats: Tensor, gate: Gate, *, wild: bool, weights: Sequence[Tensor] | None = None
) -> Tensor:
    """The cap of all singular values; where the weights are finite (B,).

    Args:
        wild: as for weights that were never capped: see :func:`specopt.kernels.cap_`.
        weights: what is to be capped, where the matrices hold parts of it alone.
    """
    if weights is None:
        weights = [matrix.weight for matrix in matrices]
    target = targets_of(matrices, stats)
    active = (gate.open(matrices, target) > 0) & ~target.isnan()
    bounds = kernels.cap_(weights, target, active=active, wild=wild, seeds=rounding_seeds(matrices))
    valid = bounds.isfinite()
    lowered = torch.where(active & valid, target, torch.inf)
    stats[:, Stat.TOP] = torch.minimum(stats[:, Stat.TOP], lowered)
    return valid
