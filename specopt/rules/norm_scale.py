"""The rule of Norm Scaling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from specopt import kernels
from specopt.kernels import accumulation_dtype

from .. import options
from ..session import Gate, Session
from ..settling import own_target
from ..targets import Target, target_frobenius, target_sigma
from ..tracker import device, pairs
from ..tracker.common import (
    BLOCK,
    PREFIX,
    PROBE,
    STEP,
    HostCopy,
    Stat,
    constant,
    gather_stats,
    has_stats,
    restart,
    scatter_stats,
)
from ..tracker.measure import measure
from ..views import Matrix
from .after import AfterOnDevice, AfterOnHost

INITIAL = {norm: f"{PREFIX}initial_{norm}" for norm in options.NORMS}
"""State keys of the norms noted for ``target="initial"``."""


@dataclass(frozen=True, kw_only=True, repr=False)
class NormScale(options.Shared):
    """Weights steered to a norm after the base update.

    Spectral, with the first triplet (σ₁, u₁, v₁) and the target σ*: ``"set"``: ``W += (σ* − σ₁) u₁v₁ᵀ``; ``"cap"``: the
    same where σ₁ > σ*; ``"rescale"``: ``W *= σ*/σ₁``. Frobenius, with ``F* = sqrt(min(rows, cols)) σ*``: ``"set"``:
    ``W *= F*/‖W‖_F``; ``"cap"``: the same where ``‖W‖_F > F*``.

    A zero matrix stays zero; one that is zero when control starts is capped until it has reached its target by itself,
    unless ``raise_small``; one with a non-finite entry is left as the base left it; nothing changes at a learning rate
    of 0.

    Args: see :class:`specopt.NormScaleAdamW`.

    Raises:
        ValueError: an option that makes no sense, naming it, its value and what it may be.

    Source: Norm Scaling (blog post and code, December 2023).
    """

    norm: str = "spectral"
    mode: str = "set"
    target: Target = "channels"
    rank: int = 1
    raise_small: bool = False
    names: ClassVar[tuple[str, ...]] = ("norm", "mode", "target", "rank", "raise_small", *options.SHARED)

    def __post_init__(self) -> None:
        if isinstance(self.target, list | tuple):
            raise ValueError(f"target must be a list in a group alone, beside its params; a rule got {self.target!r}")
        self.check(self.options)

    def check(self, group: Mapping[str, Any]) -> None:
        options.check_shared(group)
        options.check_norm_scale(group)

    def is_on(self, group: Mapping[str, Any]) -> bool:
        return True

    def columns(self, group: Mapping[str, Any]) -> int:
        return pairs.basis_columns(group["block"])

    def has_state(self, matrix: Matrix) -> bool:
        return pairs.has_state(matrix) if matrix.group["norm"] == "spectral" else has_stats(matrix)

    def takes_along(self, matrix: Matrix) -> bool:
        return bool(matrix.group["norm"] == "spectral")

    def begin(self, matrices: Sequence[Matrix], gate: Gate) -> Session:
        if device.runs_on(matrices[0]) and matrices[0].group["norm"] == "spectral":
            return _ScaledOnDevice(matrices, gate)
        return _Scaled(matrices, gate)


class _Scaled:
    penalty = None

    def __init__(self, matrices: Sequence[Matrix], gate: Gate) -> None:
        self.matrices, self.gate = matrices, gate
        self.spectral = [matrix for matrix in matrices if matrix.group["norm"] == "spectral"]
        self.frobenius = [matrix for matrix in matrices if matrix.group["norm"] == "frobenius"]
        self.initial = _initial_norms(self.spectral, self.frobenius)
        self.after = AfterOnHost(self.spectral)
        self.fresh = [matrix for matrix in self.frobenius if not has_stats(matrix)]
        self.norms = kernels.frobenius_norms([matrix.weight for matrix in self.fresh]) if self.fresh else ()

    def finish(self) -> None:
        # state not before: AdamW takes one that is not empty for its own
        for matrix, key, value in self.initial:
            matrix.state[key] = value
        for matrix, norm in zip(self.fresh, self.norms, strict=True):
            restart(matrix, norm)
        self.after.finish(_SpectralCorrection(self.spectral, self.gate))
        if self.frobenius:
            _scale_frobenius(self.frobenius, self.gate)


class _ScaledOnDevice(AfterOnDevice):
    def __init__(self, matrices: Sequence[Matrix], gate: Gate) -> None:
        self.initial = _initial_norms(matrices, [])
        super().__init__(matrices, gate)

    def numbers(self) -> dict[str, Any]:
        noted = [_noted(matrix) for matrix in self.matrices]
        return {
            "TARGET": [shape_target(matrix) for matrix in self.matrices],
            "TARGET_AT": [
                value.data_ptr() if matrix.group["target"] == "initial" and value is not None else 0
                for matrix, value in zip(self.matrices, noted, strict=True)
            ],
            "MODE": [options.MODES["spectral"].index(matrix.group["mode"]) for matrix in self.matrices],
            "RAISE_SMALL": [matrix.group["raise_small"] for matrix in self.matrices],
        }

    def finish(self) -> None:
        for matrix, key, value in self.initial:
            matrix.state[key] = value
        tracked = self.tracked()
        first = [i for i, matrix in enumerate(self.matrices) if matrix.state[STEP] == 0]
        tracked.finish()
        if first:
            sigma, changed = tracked.norms
            pulled = changed & (constant([float(m.group["mode"] != "cap") for m in self.matrices], sigma) > 0)
            ratio = torch.where(pulled, sigma / targets_of(self.matrices, sigma), 1.0)
            ratio = torch.stack([ratio[i] for i in first])
            self.gate.ratios.append(([self.matrices[i] for i in first], HostCopy.of(ratio)))


class _SpectralCorrection:
    def __init__(self, matrices: Sequence[Matrix], gate: Gate) -> None:
        self.matrices, self.gate = matrices, gate

    def __call__(self, sigma: Tensor, valid: Tensor, stats: Tensor) -> pairs.Change:
        target = targets_of(self.matrices, stats)
        change, stats[:, Stat.CAPPED] = _allowed(self.matrices, sigma, target, valid, stats, self.gate)
        rescaled = [matrix.group["mode"] == "rescale" for matrix in self.matrices]
        if not any(rescaled):
            return pairs.Change(change)
        whole = constant([float(r) for r in rescaled], sigma) > 0
        factor = torch.where(whole & (change != 0), target / torch.where(sigma > 0, sigma, 1.0), 1.0)
        return pairs.Change(torch.where(whole, 0.0, change), factor)


def _initial_norms(spectral: Sequence[Matrix], frobenius: Sequence[Matrix]) -> list[tuple[Matrix, str, Tensor]]:
    """(matrix, state key, norm) of the weights as they are, where that is to be the target and not yet noted."""
    found: list[tuple[Matrix, str, Tensor]] = []
    for norm, matrices in (("spectral", spectral), ("frobenius", frobenius)):
        key = INITIAL[norm]
        unknown = [m for m in matrices if m.group["target"] == "initial" and _noted(m) is None]
        if unknown and norm == "spectral":
            values = measure(unknown)[:, Stat.SIGMA]
        elif unknown:
            values = kernels.frobenius_norms([m.weight for m in unknown])
        else:
            continue
        dtypes = [accumulation_dtype(m.param.dtype) for m in unknown]
        found += [(m, key, value.to(dtype, copy=True)) for m, value, dtype in zip(unknown, values, dtypes, strict=True)]
    return found


def _scale_frobenius(matrices: Sequence[Matrix], gate: Gate) -> None:
    stats = gather_stats(matrices)
    weights = [matrix.weight for matrix in matrices]
    norm = kernels.frobenius_norms(weights)
    target = targets_of(matrices, stats)
    valid = norm.isfinite()
    change, stats[:, Stat.CAPPED] = _allowed(matrices, norm, target, valid, stats, gate)
    kernels.scale_(weights, torch.where(change != 0, target / torch.where(norm > 0, norm, 1.0), 1.0))
    for matrix in matrices:
        for key in (BLOCK, PROBE):  # of an earlier time under the spectral norm: they follow no longer
            matrix.state.pop(key, None)
    stats[:, Stat.SIGMA] = torch.nan  # not known from a Frobenius norm
    stats[:, Stat.VALID] = valid.to(stats.dtype)
    stats[:, Stat.COUNT] += 1
    scatter_stats(matrices, stats)
    for matrix in matrices:
        matrix.state[STEP] += 1


def _allowed(
    matrices: Sequence[Matrix], norm: Tensor, target: Tensor, valid: Tensor, stats: Tensor, gate: Gate
) -> tuple[Tensor, Tensor]:
    """``target − norm`` where the rule may make that change, else 0; and which matrices are still capped."""
    raise_small = constant([float(matrix.group["raise_small"]) for matrix in matrices], norm) > 0
    capped = (stats[:, Stat.CAPPED] > 0) & ~(norm >= target) & ~raise_small
    down_only = capped | (constant([float(matrix.group["mode"] == "cap") for matrix in matrices], norm) > 0)
    change = torch.where(valid & (norm > 0), target - norm, 0.0)
    change = torch.where(down_only, change.clamp_max(0.0), change)
    first = [i for i, matrix in enumerate(matrices) if matrix.state[STEP] == 0]
    if first:
        pulled = (change != 0) & (constant([float(m.group["mode"] != "cap") for m in matrices], norm) > 0)
        ratio = torch.where(pulled, norm / target, 1.0)
        ratio = torch.stack([ratio[i] for i in first])
        gate.ratios.append(([matrices[i] for i in first], HostCopy.of(ratio)))
    return torch.where(gate.open(matrices, norm) > 0, change, 0.0), capped.to(stats.dtype)


def targets_of(matrices: Sequence[Matrix], like: Tensor) -> Tensor:
    """sigma*, or F* under Frobenius scaling, of each matrix (B,)."""
    known = constant([shape_target(matrix) for matrix in matrices], like)
    if not any(matrix.group["target"] == "initial" for matrix in matrices):
        return known
    nothing = like.new_full((), torch.nan)
    known_norms = [_noted(matrix) for matrix in matrices]
    noted = torch.stack([(nothing if norm is None else norm).to(like) for norm in known_norms])
    return torch.where(known.isnan(), noted, known)


def _noted(matrix: Matrix) -> Tensor | None:
    """The norm noted for ``target="initial"``, if it is of this matrix: there are more where the view was another."""
    norm = matrix.state.get(INITIAL[matrix.group["norm"]])
    return norm if isinstance(norm, Tensor) and norm.ndim == 0 else None


def shape_target(matrix: Matrix) -> float:
    """The target as far as the shape and the options tell it; nan for ``"initial"``."""
    shape_rule = target_frobenius if matrix.group["norm"] == "frobenius" else target_sigma
    return shape_rule(matrix.shape, own_target(matrix))
