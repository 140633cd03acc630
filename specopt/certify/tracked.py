"""The norms of layers as an optimizer tracks them, or measured afresh: what a bound is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..control import SpectralOptimizer
from ..operators import Geometry
from ..rules.operator import OPERATOR, kernels_of
from ..tracker.common import STATS, Stat, has_stats
from ..tracker.measure import OPTIONS, measure
from ..tracker.pairs import basis_columns
from ..views import Matrix, matrices_of
from ..views.matrix import DTYPES
from .layers import Layer

Place = tuple[Any, ...]


class Seen(NamedTuple):
    """σ₁ of a layer's matrices, each by itself; or of a convolution as an operator, alone."""

    values: list[float]
    by: str
    """"tracker" or "measured"."""
    of: str = "matrix"
    """Or "operator on 32x32"."""


def seen_norms(layers: Sequence[Layer], optimizer: Optimizer | None) -> list[Seen]:
    """What the tracker's state says, of the weights as the last step left them, where the optimizer reads a layer as
    the same matrices, or as an operator; else a power iteration of our own on the matrices, all of them at once."""
    known = tracked_norms(optimizer) if optimizer is not None else {}
    operators = tracked_operators(optimizer) if optimizer is not None else {}
    found: list[Seen | None] = []
    for layer in layers:
        geometry, operator = operators.get(_place(layer.weight), (None, None))
        if geometry is not None and _is_of(geometry, layer.module):
            found.append(operator)
            continue
        values = [known.get(_place(piece)) for piece in layer.pieces]
        whole = [value for value in values if value is not None]
        found.append(Seen(whole, "tracker") if values and len(whole) == len(values) else None)
    missing = [layer for layer, seen in zip(layers, found, strict=True) if seen is None]
    fresh = iter(measured(missing))
    return [seen if seen is not None else Seen(next(fresh), "measured") for seen in found]


def tracked_norms(optimizer: Optimizer) -> dict[Place, float]:
    """σ₁ after the last step's correction of every matrix that has been tracked, by where it lies in memory.

    Raises:
        TypeError: an optimizer that is not under a rule of ours.
    """
    matrices = [matrix for matrix in _ours(optimizer).matrices(with_grad=False) if has_stats(matrix)]
    if not matrices:
        return {}
    rows = zip(matrices, _stats([matrix.state[STATS] for matrix in matrices]), strict=True)
    return {_place(matrix.piece): top for matrix, (sigma, top, steps) in rows if sigma == sigma and steps > 0}


def tracked_operators(optimizer: Optimizer) -> dict[Place, tuple[Geometry, Seen]]:
    """The norm after the last step's correction of every convolution under ``conv="operator"`` that has been tracked,
    and what it is the norm of, by where its kernel lies in memory.

    Raises:
        TypeError: an optimizer that is not under a rule of ours.
    """
    kernels = [k for k in kernels_of(_ours(optimizer), with_grad=False) if OPERATOR in k.state and STATS in k.state]
    if not kernels:
        return {}
    rows = zip(kernels, _stats([kernel.state[STATS] for kernel in kernels]), strict=True)
    return {
        _place(kernel.whole.values): (
            kernel.geometry,
            Seen([top], "tracker", f"operator on {'x'.join(map(str, kernel.geometry.size))}"),
        )
        for kernel, (sigma, top, steps) in rows
        if sigma == sigma and steps > 0
    }


def _is_of(geometry: Geometry, module: nn.Module) -> bool:
    """Whether a module's convolution, on an input of that size, is the one described: a tied kernel may have others."""
    try:
        return Geometry.of(module, geometry.size) == geometry
    except (TypeError, ValueError):
        return False


def _ours(optimizer: Optimizer) -> SpectralOptimizer:
    if not isinstance(optimizer, SpectralOptimizer):
        raise TypeError(f"optimizer must be one of specopt, or under specopt.wrap, got {type(optimizer).__name__}")
    return optimizer


def _stats(stats: Sequence[Tensor]) -> list[list[float]]:
    """``[sigma, sigma after the correction, steps]`` of each."""
    wanted = [row[[Stat.SIGMA, Stat.TOP, Stat.COUNT]].to("cpu", torch.float64) for row in stats]
    return torch.stack(wanted).tolist()


def _place(piece: Tensor) -> Place:
    return piece.device, piece.dtype, piece.data_ptr(), tuple(piece.shape), piece.stride()


def measured(layers: Sequence[Layer]) -> list[list[float]]:
    """σ₁ of the matrices of each layer by :func:`specopt.tracker.measure.measure`; nan where a weight is not finite."""
    readable = [layer for layer in layers if layer.view is not None and layer.weight.numel() > 0]
    matrices = [_matrices(layer) for layer in readable]
    flat = [matrix for group in matrices for matrix in group]
    sigmas = iter(measure(flat)[:, Stat.SIGMA].tolist() if flat else [])
    values = {id(layer): [next(sigmas) for _ in group] for layer, group in zip(readable, matrices, strict=True)}
    return [values.get(id(layer), [0.0] * len(layer.pieces)) for layer in layers]


def _matrices(layer: Layer) -> list[Matrix]:
    weight = layer.weight.contiguous()
    weight = weight if weight.dtype in DTYPES else weight.float()
    return matrices_of(weight, {**OPTIONS, "view": layer.view}, {}, basis_columns(OPTIONS["block"]))
