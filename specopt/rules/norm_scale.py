"""The rule of Norm Scaling."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from specopt.kernels import tables

from .. import options
from ..session import Gate, Session
from ..targets import Target
from ..tracker import device, pairs
from ..tracker.common import constant, has_stats
from ..views import SCALING, Matrix, block_of
from .after import After, AfterOnDevice
from .steering import (
    InitialNorms,
    beginners,
    distance,
    down_only,
    factor_to,
    noted_norm,
    shape_target,
    targets_of,
    tell_first,
)
from .whole import Capped, FrobeniusScaled


@dataclass(frozen=True, kw_only=True, repr=False)
class NormScale(options.Shared):
    """Weights steered to a norm after the base update.

    Spectral, with the first triplets (σ_i, u_i, v_i) and the target σ*: ``"set"``: ``W += Σ (σ* − σ_i) u_i v_iᵀ`` over
    the first ``rank``; ``"cap"``: over those of them with ``σ_i > σ*``; ``"rescale"``: ``W *= σ*/σ₁``. Frobenius, with
    ``F* = sqrt(min(rows, cols)) σ*``: ``"set"``: ``W *= F*/‖W‖_F``; ``"cap"``: the same where ``‖W‖_F > F*``.

    ``rank="full"`` caps every singular value, ``W ← U min(Σ, σ*) Vᵀ``, by products of whole matrices
    (:func:`specopt.kernels.cap_`). See there for what it holds and costs.

    With ``every=n`` all that is done in the first of n steps, and the base update alone in the others: a norm is then
    above its target by no more than what n updates add to it.

    A zero matrix stays zero, and so does what "set" with a rank above 1 finds below 1e-3 σ₁ (1e-7 σ₁ of float64
    weights), which has no direction in that precision; one that is zero when control starts is capped until it has
    reached its target by itself, unless ``raise_small``; one with a non-finite entry is left as the base left it;
    nothing changes at a learning rate of 0.

    Args: see :class:`specopt.NormScaleAdamW`.

    Raises:
        ValueError: an option that makes no sense, naming it, its value and what it may be.

    Source: Norm Scaling (blog post and code, December 2023).
    """

    norm: str = "spectral"
    mode: str = "set"
    target: Target = "channels"
    rank: int | str = 1
    every: int = 1
    raise_small: bool = False
    names: ClassVar[tuple[str, ...]] = (*SCALING, *options.SHARED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target, list | tuple):
            raise ValueError(f"target must be a list in a group alone, beside its params; a rule got {self.target!r}")
        self.check(self.options)

    def check(self, group: Mapping[str, Any]) -> None:
        options.check_shared(group)
        options.check_norm_scale(group)

    def is_on(self, group: Mapping[str, Any]) -> bool:
        return True

    def columns(self, group: Mapping[str, Any]) -> int:
        return pairs.basis_columns(block_of(group))

    def period(self, group: Mapping[str, Any]) -> int:
        return int(group["every"])

    def has_state(self, matrix: Matrix) -> bool:
        return pairs.has_state(matrix) if is_tracked(matrix) else has_stats(matrix)

    def is_fused(self, matrix: Matrix) -> bool:
        return device.runs_on(matrix) and is_tracked(matrix) and matrix.group["rank"] == 1

    def sort(self, matrix: Matrix) -> Hashable:
        return matrix.group["norm"], matrix.group["rank"]

    def takes_along(self, matrix: Matrix) -> bool:
        return self.is_fused(matrix)

    def begin(self, matrices: Sequence[Matrix], gate: Gate) -> Session:
        first = matrices[0]
        if self.is_fused(first):
            return _ScaledOnDevice(matrices, gate)
        if first.group["norm"] == "frobenius":
            return FrobeniusScaled(matrices, gate)
        if first.group["rank"] == "full":
            return Capped(matrices, gate)
        return _Scaled(matrices, self.correction(matrices, gate), self.reach(matrices))

    def reach(self, matrices: Sequence[Matrix]) -> int:
        """How many triplets the correction may change."""
        return int(matrices[0].group["rank"])

    def correction(self, matrices: Sequence[Matrix], gate: Gate) -> pairs.Correct:
        """Of matrices of one sort."""
        return partial(_correct, matrices, gate)


NOISE = {torch.float32: 1e-3, torch.float64: 1e-7}
"""A singular value of less than this part of the first has, in the precision of products, no direction to be raised
in."""


def is_tracked(matrix: Matrix) -> bool:
    """Whether singular vectors are followed; else the rule changes the matrix as a whole."""
    return bool(matrix.group["norm"] == "spectral" and matrix.group["rank"] != "full")


class _Scaled(After):
    def __init__(self, matrices: Sequence[Matrix], correct: pairs.Correct, rank: int) -> None:
        self.initial = InitialNorms(matrices)
        super().__init__(matrices, correct, rank)

    def finish(self) -> None:
        self.initial.note()
        super().finish()


def _correct(matrices: Sequence[Matrix], gate: Gate, found: pairs.Found) -> pairs.Change:
    norm, target = found.sigma[:, 0], targets_of(matrices, found.stats)
    down = down_only(matrices, norm, target, found.stats)
    open_ = gate.open(matrices, norm)[:, None]
    leading = found.sigma[:, : matrices[0].group["rank"]]
    change = distance(leading, target[:, None], found.valid[:, None], down[:, None])
    noise = leading <= NOISE[leading.dtype] * norm[:, None]
    change = torch.where(noise, change.clamp_max(0.0), change)
    tell_first(matrices, beginners(matrices), norm, target, change[:, 0] != 0, gate)
    change = torch.where(open_ > 0, change, 0.0)
    rescaled = [matrix.group["mode"] == "rescale" for matrix in matrices]
    if not any(rescaled):
        return pairs.Change(change)
    whole = constant([float(r) for r in rescaled], norm) > 0
    factor = factor_to(target, norm, whole & (change[:, 0] != 0))
    return pairs.Change(torch.where(whole[:, None], 0.0, change), factor)


class _ScaledOnDevice(AfterOnDevice):
    def __init__(self, matrices: Sequence[Matrix], gate: Gate) -> None:
        self.initial = InitialNorms(matrices)
        super().__init__(matrices, gate)

    def numbers(self) -> dict[str, Any]:
        noted = [noted_norm(matrix) for matrix in self.matrices]
        return {
            "TARGET": [shape_target(matrix) for matrix in self.matrices],
            "TARGET_AT": [
                tables.address(value) if matrix.group["target"] == "initial" and value is not None else 0
                for matrix, value in zip(self.matrices, noted, strict=True)
            ],
            "MODE": [options.MODES["spectral"].index(matrix.group["mode"]) for matrix in self.matrices],
            "RAISE_SMALL": [matrix.group["raise_small"] for matrix in self.matrices],
        }

    def finish(self) -> None:
        self.initial.note()
        tracked = self.tracked()
        first = beginners(self.matrices)
        tracked.finish()
        if first:
            sigma, changed = tracked.norms
            tell_first(self.matrices, first, sigma, targets_of(self.matrices, sigma), changed, self.gate)
