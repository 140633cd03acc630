"""A record on its way to the host: tensors that are copied behind the step's work, and not waited for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from specopt import kernels

from ..control import SpectralOptimizer
from ..rules.operator import Kernel, has_state, kernels_of
from ..session import Controlled
from ..sharding.checking import check_whole
from ..tracker.common import STATS, HostCopy, Stat, has_stats
from ..views import Matrix
from .history import QUANTITIES, Array, Record
from .naming import distinct
from .report import operator_targets, targets

STORED = {
    "sigma": Stat.SIGMA,
    "sigma_after": Stat.TOP,
    "residual": Stat.RESIDUAL,
    "valid": Stat.VALID,
    "capped": Stat.CAPPED,
    "pairs": Stat.PAIRS,
}


@dataclass(frozen=True)
class Snapshot:
    """What is known of a step once everything of it has arrived."""

    step: int
    names: tuple[str, ...]
    """Of the matrices, then of the convolutions that are controlled as operators."""
    matrices: int
    """How many of the names, the first, are those of matrices; operators have no stable rank."""
    parts: list[tuple[list[int], HostCopy]]
    """Places of matrices, or of operators, of one device and dtype, and their table ``[ stats | target | ‖W‖_F ]``."""
    gradients: list[HostCopy]
    """Norms of the gradients of one device and dtype, of no dimensions."""

    @classmethod
    @torch.no_grad()
    def of(cls, optimizer: SpectralOptimizer, step: int, *, weights: bool, gradients: bool) -> Snapshot:
        """Of the step just made. Enqueues a few small operations for each device and dtype, whatever the number of
        matrices, and none that waits; ``weights`` and ``gradients`` add a read of each."""
        matrices = [m for m in optimizer.matrices(with_grad=False) if optimizer.rule.is_on(m.group)]
        check_norms(optimizer, weights=weights, gradients=gradients)
        operators = kernels_of(optimizer, with_grad=False)
        parts = []
        for places in _buckets(matrices):
            table = _table(optimizer, [matrices[i] for i in places], weights=weights)
            parts.append((places, HostCopy.of(table)))
        for places in _buckets(operators):
            table = _operator_table(optimizer, [operators[i] for i in places], weights=weights)
            parts.append(([len(matrices) + i for i in places], HostCopy.of(table)))
        norms = [HostCopy.of(norm) for norm in _gradient_norms(optimizer)] if gradients else []
        known = optimizer.names()
        controlled: list[Controlled] = [*matrices, *operators]
        names = [known[one.param] + one.suffix for one in controlled]
        return cls(step, tuple(distinct(names)), len(matrices), parts, norms)

    def arrived(self) -> bool:
        return all(copy.peek() is not None for copy in [*(copy for _, copy in self.parts), *self.gradients])

    def record(self) -> Record:
        """Waits for what has not arrived."""
        table = np.full((len(self.names), len(Stat) + 2), np.nan)
        for places, copy in self.parts:
            table[places] = copy.wait().numpy()
        values: dict[str, Array] = {name: table[:, stat] for name, stat in STORED.items()}
        values |= {"target": table[:, -2], "frobenius": table[:, -1]}
        # where the step knew no sigma, the stored value is an older one, or none
        after = values["sigma_after"] = np.where(np.isfinite(values["sigma"]), values["sigma_after"], np.nan)
        with np.errstate(over="ignore"):
            ratio = values["frobenius"] / np.where(after > 0, after, np.nan)
            values["stable_rank"] = ratio**2
        values["stable_rank"][self.matrices :] = np.nan  # it compares norms of one matrix
        norms = [float(copy.wait()) for copy in self.gradients]
        total = math.hypot(*norms) if norms else math.nan
        return Record(self.step, self.names, {name: values[name] for name in QUANTITIES}, total)


def check_norms(optimizer: SpectralOptimizer, *, weights: bool, gradients: bool) -> None:
    """
    Raises:
        ValueError: norms asked for of what is cut up over ranks.
    """
    if weights:
        matrices = (m for m in optimizer.matrices(with_grad=False) if optimizer.rule.is_on(m.group))
        controlled: list[Controlled] = [*matrices, *kernels_of(optimizer, with_grad=False)]
        check_whole((one.param for one in controlled), "a SpectralMonitor with weights=True")
    if gradients:
        params = (param for group in optimizer.param_groups for param in group["params"])
        check_whole(params, "a SpectralMonitor with gradients=True")


def _buckets(controlled: Sequence[Controlled]) -> list[list[int]]:
    """Places of what shares device and dtype."""
    buckets: dict[Any, list[int]] = {}
    for i, one in enumerate(controlled):
        buckets.setdefault((one.param.device, one.param.dtype), []).append(i)
    return list(buckets.values())


def _table(optimizer: SpectralOptimizer, matrices: Sequence[Matrix], *, weights: bool) -> Tensor:
    stats = _stats(matrices, [has_stats(matrix) for matrix in matrices])
    norms = _norms([matrix.weight for matrix in matrices] if weights else [], stats)
    return torch.cat([stats, targets(optimizer, matrices, stats)[:, None], norms[:, None]], 1)


def _operator_table(optimizer: SpectralOptimizer, operators: Sequence[Kernel], *, weights: bool) -> Tensor:
    stats = _stats(operators, [has_state(kernel) for kernel in operators])
    norms = _norms([kernel.whole.values.flatten(1) for kernel in operators] if weights else [], stats)
    return torch.cat([stats, operator_targets(optimizer, operators, stats)[:, None], norms[:, None]], 1)


def _stats(controlled: Sequence[Controlled], known: Sequence[bool]) -> Tensor:
    """``(B, len(Stat))``, nan where there are none."""
    param = controlled[0].param
    dtype = kernels.accumulation_dtype(param.dtype)
    unknown = torch.full((len(Stat),), torch.nan, dtype=dtype, device=param.device)
    return torch.stack(
        [one.state[STATS] if is_known else unknown for one, is_known in zip(controlled, known, strict=True)]
    )


def _norms(weights: Sequence[Tensor], stats: Tensor) -> Tensor:
    """``‖W‖_F`` (B,), nan where no weights are given."""
    return kernels.frobenius_norms(weights).to(stats) if weights else torch.full_like(stats[:, 0], torch.nan)


def _gradient_norms(optimizer: SpectralOptimizer) -> list[Tensor]:
    """``‖g‖₂`` over the gradients of each device and dtype, without a gradient scaler's factor; nan where they are
    sparse, and have no norm before entries of one place are summed up."""
    buckets: dict[Any, list[Tensor]] = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None and param.numel():
                grad = param.grad
                buckets.setdefault((grad.device, grad.dtype, grad.layout), []).append(grad)
    scale = cast("Tensor | None", getattr(optimizer, "grad_scale", None))
    norms = [_norm(grads) for grads in buckets.values()]
    return norms if scale is None else [norm / scale.reshape(()).to(norm) for norm in norms]


def _norm(grads: Sequence[Tensor]) -> Tensor:
    first = grads[0]
    # squares of float32 overflow from 1e19 up; mps has no float64
    dtype = torch.float32 if first.device.type == "mps" else torch.float64
    if first.layout != torch.strided:
        return torch.full((), torch.nan, dtype=dtype, device=first.device)
    real = [torch.view_as_real(grad) if grad.is_complex() else grad for grad in grads]
    total: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(real, 2, dtype=dtype)))
    return total
