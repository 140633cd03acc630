"""What the weights of an optimizer look like now."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from specopt import kernels

from .control import SpectralOptimizer
from .rules import NormScale, find, targets_of
from .rules.operator import kernels_of, measured, target_of
from .session import Controlled
from .tracker.common import STATS, Stat
from .tracker.measure import measure
from .views import Matrix


@dataclass(frozen=True)
class SpectralRow:
    """One matrix. Norms are those of the matrix view."""

    name: str
    """The parameter's, and which of its matrices where it holds several: ``in_proj_weight[0]``."""
    shape: tuple[int, ...]
    """``(out, in, *kernel)``, whatever order the parameter has."""
    sigma: float
    """Its largest singular value now, measured afresh."""
    target: float | None
    """sigma*, or F* under Frobenius scaling; None where the rule has none (a penalty), or before the first step."""
    residual: float
    """``‖Wᵀu₁ − σ₁v₁‖ / σ₁`` of that measurement."""
    stable_rank: float
    """``(‖W‖_F / σ₁)²``; nan for a zero matrix."""
    frobenius: float
    finite: bool
    """False where the weight holds a non-finite entry and is left alone."""
    capped: bool
    """True while a matrix that was all zero at the start is only capped."""


@torch.no_grad()
def spectral_report(optimizer: Optimizer) -> list[SpectralRow]:
    """A row for each matrix that ``optimizer`` controls, in the order of its groups, and then for each convolution that
    it controls as an operator. One host sync for these and one for those; changes nothing.

    Raises:
        TypeError: an optimizer that controls nothing by design, such as a plain ``torch.optim`` one.
    """
    if not isinstance(optimizer, SpectralOptimizer):
        raise TypeError(f"spectral_report takes an optimizer of specopt, got {type(optimizer).__name__}")
    operators = _operator_rows(optimizer)
    matrices = list(optimizer.matrices(with_grad=False))
    if not matrices:
        return operators
    stats = measure(matrices)
    columns = [
        stats[:, Stat.SIGMA],
        stats[:, Stat.RESIDUAL],
        torch.stack([kernels.frobenius_norms([matrix.weight])[0].to(stats) for matrix in matrices]),
        torch.stack([_target(optimizer, matrix, stats) for matrix in matrices]),
        torch.stack([_capped(matrix, stats) for matrix in matrices]),
    ]
    names = optimizer.names()
    rows = []
    for matrix, values in zip(matrices, torch.stack(columns, 1).tolist(), strict=True):
        sigma, residual, frobenius, target, capped = values
        rows.append(
            SpectralRow(
                name=names[matrix.param] + matrix.suffix,
                shape=tuple(matrix.piece.shape),
                sigma=sigma,
                target=None if target != target else target,
                residual=residual,
                stable_rank=(frobenius / sigma) ** 2 if sigma > 0 else float("nan"),
                frobenius=frobenius,
                finite=sigma == sigma and abs(frobenius) != float("inf"),
                capped=capped > 0,
            )
        )
    return rows + operators


def _operator_rows(optimizer: SpectralOptimizer) -> list[SpectralRow]:
    """Rows of convolutions that are controlled as operators: sigma is the operator norm, frobenius that of the kernel,
    and a stable rank, which compares norms of one matrix, there is none."""
    names, rows = optimizer.names(), []
    found = measured(kernels_of(optimizer, with_grad=False))
    scaled = "mode" in optimizer.rule.names
    values = [
        torch.stack(
            [
                sigma.double(),
                residual.double(),
                torch.linalg.vector_norm(kernel.param.detach().double()),
                target_of(kernel, sigma).double() if scaled else sigma.new_full((), torch.nan).double(),
                _capped(kernel, sigma).double(),
            ]
        )
        for kernel, sigma, residual in found
    ]
    told = torch.stack([value.to(values[0].device) for value in values]).tolist() if values else []
    for (kernel, *_), (sigma, residual, frobenius, target, capped) in zip(found, told, strict=True):
        rows.append(
            SpectralRow(
                name=names[kernel.param],
                shape=tuple(kernel.param.transpose(0, 1).shape if kernel.geometry.transposed else kernel.param.shape),
                sigma=sigma,
                target=None if target != target else target,
                residual=residual,
                stable_rank=float("nan"),
                frobenius=frobenius,
                finite=sigma == sigma and abs(frobenius) != float("inf"),
                capped=capped > 0,
            )
        )
    return rows


def _target(optimizer: SpectralOptimizer, matrix: Matrix, like: Tensor) -> Tensor:
    if find(optimizer.rule, NormScale) is None:
        return like.new_tensor(float("nan"))
    return targets_of([matrix], like)[0]


def _capped(matrix: Controlled, like: Tensor) -> Tensor:
    stats = matrix.state.get(STATS)
    return like.new_zeros(()) if stats is None else stats[Stat.CAPPED].to(like)
