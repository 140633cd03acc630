"""What the weights of an optimizer look like now."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from specopt import kernels

from ..control import SpectralOptimizer
from ..rules import NormScale, find, targets_of
from ..rules.operator import Kernel, kernels_of, measured, target_of
from ..session import Controlled
from ..sharding.gathering import bring, whole_matrices
from ..tracker.common import STATS, Stat
from ..tracker.measure import LARGEST, measure_spectrum, ritz_values
from ..views import Matrix
from .table import SpectralReport, SpectralRow


@torch.no_grad()
def spectral_report(optimizer: Optimizer, top: int = 8) -> SpectralReport:
    """A row for each matrix that ``optimizer`` controls, in the order of its groups, and then for each convolution that
    it controls as an operator: a list that prints as a table.

    One host sync for these and one for those; changes neither weights nor state, and draws no random number. Everything
    is measured afresh, from the weights as they are now: σ₁ of a matrix within 1e-4 of float64 SVD, or 1e-3 where the
    spectrum is flat at its top. The lower singular values are Ritz values of the same block, and so lie below the true
    ones: up to the eighth by at most 2e-3 in the spectrum of a random matrix or one that falls off, by 4e-2 in the
    flattest, as where three lie 5 % above all others. Of an operator the norm alone is told, with the Frobenius norm of
    its kernel.

    Args:
        top: how many leading singular values a row holds, from 1 to 16.

    Raises:
        TypeError: an optimizer that controls nothing by design, such as a plain ``torch.optim`` one.
        ValueError: ``top`` is not such a number.
    """
    if not isinstance(optimizer, SpectralOptimizer):
        raise TypeError(f"spectral_report takes an optimizer of specopt, got {type(optimizer).__name__}")
    if isinstance(top, bool) or not isinstance(top, int) or not 1 <= top <= LARGEST:
        raise ValueError(f"top must be a whole number from 1 to {LARGEST}, got {top!r}")
    with optimizer._without_autocast(), kernels.full_precision():
        return _report(optimizer, top)


def _report(optimizer: SpectralOptimizer, top: int) -> SpectralReport:
    operators = kernels_of(optimizer, with_grad=False)
    bring([kernel.whole for kernel in operators])
    behind = _operator_rows(optimizer, operators)
    matrices = list(optimizer.matrices(with_grad=False))
    rows = (row for some in whole_matrices(matrices) for row in _matrix_rows(optimizer, some, top))
    return SpectralReport([*rows, *behind])


def _matrix_rows(optimizer: SpectralOptimizer, matrices: Sequence[Matrix], top: int) -> list[SpectralRow]:
    stats, (grams, scales) = measure_spectrum(matrices)
    columns = [
        stats[:, Stat.RESIDUAL],
        torch.stack([kernels.frobenius_norms([matrix.weight])[0].to(stats) for matrix in matrices]),
        targets(optimizer, matrices, stats),
        torch.stack([_capped(optimizer, matrix, stats) for matrix in matrices]),
    ]
    found = torch.cat([torch.stack(columns, 1), scales[:, None], grams.flatten(1)], 1).cpu().numpy()
    spectra = ritz_values(found[:, len(columns) + 1 :].reshape(grams.shape), found[:, len(columns)])[:, :top]
    names = optimizer.names()
    return [
        _row(names[matrix.param] + matrix.suffix, matrix, values.tolist(), spectrum.tolist())
        for matrix, values, spectrum in zip(matrices, found[:, : len(columns)], spectra, strict=True)
    ]


def _row(name: str, matrix: Matrix, values: Sequence[float], spectrum: Sequence[float]) -> SpectralRow:
    residual, frobenius, target, capped = values
    sigma = spectrum[0]
    return SpectralRow(
        name=name,
        shape=matrix.shape,
        sigma=sigma,
        target=None if target != target else target,
        residual=residual,
        stable_rank=(frobenius / sigma) ** 2 if sigma > 0 else float("nan"),
        frobenius=frobenius,
        finite=sigma == sigma and abs(frobenius) != float("inf"),
        capped=capped > 0,
        spectrum=tuple(spectrum[: min(matrix.weight.shape)]),
    )


def _operator_rows(optimizer: SpectralOptimizer, operators: Sequence[Kernel]) -> list[SpectralRow]:
    """Rows of convolutions that are controlled as operators: sigma is the operator norm, frobenius that of the kernel,
    and a stable rank, which compares norms of one matrix, there is none."""
    names, rows = optimizer.names(), []
    found = measured(operators)
    values = [
        torch.stack(
            [
                sigma.double(),
                residual.double(),
                torch.linalg.vector_norm(kernel.whole.values.double()),
                operator_targets(optimizer, [kernel], sigma)[0].double(),
                _capped(optimizer, kernel, sigma).double(),
            ]
        )
        for kernel, sigma, residual in found
    ]
    told = torch.stack([value.to(values[0].device) for value in values]).tolist() if values else []
    for (kernel, *_), (sigma, residual, frobenius, target, capped) in zip(found, told, strict=True):
        rows.append(
            SpectralRow(
                name=names[kernel.param],
                shape=_shape(kernel),
                sigma=sigma,
                target=None if target != target else target,
                residual=residual,
                stable_rank=float("nan"),
                frobenius=frobenius,
                finite=sigma == sigma and abs(frobenius) != float("inf"),
                capped=capped > 0,
                spectrum=(sigma,),
            )
        )
    return rows


def _shape(kernel: Kernel) -> tuple[int, ...]:
    """As ``(out, in, *k)``."""
    first, second, *lengths = kernel.param.shape
    return (second, first, *lengths) if kernel.geometry.transposed else (first, second, *lengths)


def targets(optimizer: SpectralOptimizer, matrices: Sequence[Matrix], like: Tensor) -> Tensor:
    """sigma*, or F* under Frobenius scaling, of each matrix (B,); nan where there is none."""
    if find(optimizer.rule, NormScale) is None:
        return like.new_full((len(matrices),), torch.nan)
    return targets_of(matrices, like)


def operator_targets(optimizer: SpectralOptimizer, operators: Sequence[Kernel], like: Tensor) -> Tensor:
    """sigma* of each convolution that is controlled as an operator (B,); nan where there is none."""
    if find(optimizer.rule, NormScale) is None:
        return like.new_full((len(operators),), torch.nan)
    return torch.stack([target_of(kernel, like) for kernel in operators])


def _capped(optimizer: SpectralOptimizer, matrix: Controlled, like: Tensor) -> Tensor:
    stats = matrix.state.get(STATS) if find(optimizer.rule, NormScale) else None
    return like.new_zeros(()) if stats is None else stats[Stat.CAPPED].to(like)
