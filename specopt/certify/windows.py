"""Lipschitz constants of pooling, padding, upsampling and (un)folding: what copies, averages or selects entries.

All but max pooling are linear, and a product over the spatial dimensions. A map whose outputs each copy one input has
norm ``√(copies)``, the most outputs that one input has. Averages over windows are a non-negative matrix per dimension:
its norm by Gram iteration where the input size is known, else by Schur's test, ``√(largest row sum · largest column
sum)``, or on the whole line. Max pooling: ``|max a − max b| <= ‖a − b‖``, and an input is in at most ``Π ceil(k / s')``
windows (see :mod:`specopt.certify.axes`), so ``‖Δy‖² <= Π ceil(k / s') ‖Δx‖²``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import padding, pooling

from .axes import NOTHING, Axis, each
from .gram import largest_norm, root, times, up
from .known import Call, NotKnown


def _axes(module: Any, call: Call, count: int, stride: Any) -> list[Axis]:
    names = (module.kernel_size, stride, getattr(module, "dilation", 1), module.padding)
    settings = zip(*(each(value, count) for value in names), strict=True)
    axes = [Axis(k, s, d, p, p) for k, s, d, p in settings]
    if call.input is None or call.output is None:
        return axes
    sizes = zip(call.input.shape[-count:], call.output.shape[-count:], strict=True)
    return [
        Axis(axis.kernel, axis.stride, axis.dilation, axis.before, axis.after, size=n, outputs=o)
        for axis, (n, o) in zip(axes, sizes, strict=True)
    ]


def _max_pool(count: int) -> Callable[[Any, Call], float]:
    def gain(module: Any, call: Call) -> float:
        if module.return_indices:
            raise NotKnown("returns indices")
        return times(*(root(axis.most_reads) for axis in _axes(module, call, count, module.stride)))

    return gain


# --- averages -------------------------------------------------------------------------------------------------------


def _avg_pool(count: int) -> Callable[[Any, Call], float]:
    def gain(module: Any, call: Call) -> float:
        axes = _axes(module, call, count, module.stride)
        fixed = getattr(module, "divisor_override", None)
        if fixed is not None:
            scale = up(math.prod(axis.kernel for axis in axes) / abs(fixed))
            return times(*(_average(axis, padded=True, clipped=False) for axis in axes), scale)
        return times(*(_average(axis, module.count_include_pad, module.ceil_mode) for axis in axes))

    return gain


def _average(axis: Axis, padded: bool, clipped: bool) -> float:
    """Of one dimension. ``padded``: zeros of the padding count; ``clipped``: a window may end behind the padding."""
    if axis.size is not None:
        return _norm_of_averages(_averages(axis, padded, clipped))
    if clipped or (not padded and axis.before):
        return root(axis.folds)  # row sums are 1, column sums at most one per window
    # on the whole line the symbol is largest at frequency 0: the row of what each residue class of inputs is taken by
    classes = [len(range(rho, axis.kernel, axis.stride)) for rho in range(min(axis.stride, axis.kernel))]
    return up(root(sum(number**2 for number in classes)) / axis.kernel)


def _averages(axis: Axis, padded: bool, clipped: bool) -> Tensor:
    """The matrix (outputs, size)."""
    assert axis.size is not None and axis.outputs is not None
    there = axis.reads != NOTHING
    counts = there.sum(1)
    if padded:
        counts = torch.full_like(counts, axis.kernel)
        if clipped:
            ends = torch.arange(axis.outputs) * axis.stride - axis.before + axis.kernel
            counts = counts - (ends - axis.size - axis.after).clamp_min(0)
    matrix = torch.zeros(axis.outputs, axis.size, dtype=torch.float64)
    rows = torch.arange(axis.outputs)[:, None].expand_as(axis.reads)
    matrix[rows[there], axis.reads[there]] = (1 / counts.clamp_min(1).double())[:, None].expand_as(axis.reads)[there]
    return matrix


def _norm_of_averages(matrix: Tensor) -> float:
    """Its entries are rounded once each."""
    return up(largest_norm(matrix, 1e-6))


def _windows(size: int, outputs: int) -> list[range]:
    """Of adaptive pooling."""
    return [range(i * size // outputs, -(-(i + 1) * size // outputs)) for i in range(outputs)]


def _adaptive(count: int, of_windows: Callable[[int, list[range]], float]) -> Callable[[Any, Call], float]:
    def gain(module: Any, call: Call) -> float:
        if getattr(module, "return_indices", False):
            raise NotKnown("returns indices")
        targets = each(module.output_size, count)
        if call.input is None:
            if all(target in (1, None) for target in targets):
                return 1.0  # a mean, or a largest entry, of everything
            raise NotKnown("sizes are not known; give inputs=")
        sizes = call.input.shape[-count:]
        return times(*(of_windows(n, _windows(n, o or n)) for n, o in zip(sizes, targets, strict=True)))

    return gain


def _adaptive_average(size: int, windows: list[range]) -> float:
    matrix = torch.zeros(len(windows), size, dtype=torch.float64)
    for row, window in enumerate(windows):
        matrix[row, window.start : window.stop] = 1 / len(window)
    return _norm_of_averages(matrix)


def _adaptive_max(size: int, windows: list[range]) -> float:
    return root(max(sum(i in window for window in windows) for i in range(size)))


def _lp_pool(count: int) -> Callable[[Any, Call], float]:
    def gain(module: Any, call: Call) -> float:
        if module.norm_type != 2:
            raise NotKnown(f"has norm_type={module.norm_type}, of which no constant is known")
        if module.ceil_mode:
            raise NotKnown("has ceil_mode, which scales windows at the border up")
        settings = zip(each(module.kernel_size, count), each(module.stride or module.kernel_size, count), strict=True)
        return times(*(root(Axis(k, s).folds) for k, s in settings))

    return gain


# --- copies ---------------------------------------------------------------------------------------------------------


def _padding(mode: str) -> Callable[[Any, Call], float]:
    def gain(module: Any, call: Call) -> float:
        pairs = list(zip(module.padding[::2], module.padding[1::2], strict=True))  # the last dimension first
        sizes = reversed(call.input.shape[-len(pairs) :]) if call.input is not None else [None] * len(pairs)
        axes = [
            Axis(1, before=max(before, 0), after=max(after, 0), mode=mode, size=size)
            for (before, after), size in zip(pairs, sizes, strict=True)
        ]
        return times(*(root(axis.copies) for axis in axes))

    return gain


def _constant_padding(module: Any, call: Call) -> float:
    return 1.0


def _upsample(module: nn.Upsample, call: Call) -> float:
    given = call.example()
    count = given.ndim - 2
    scales, sizes = each(module.scale_factor, count), each(module.size, count)
    gains = []
    for n, scale, size in zip(given.shape[2:], scales, sizes, strict=True):
        options = {"size": size, "scale_factor": scale, "recompute_scale_factor": module.recompute_scale_factor}
        if module.mode in ("nearest", "nearest-exact"):
            gains.append(root(max(_copies(n, dtype, module.mode, options) for dtype in (torch.float32, torch.float64))))
        elif module.mode in ("linear", "bilinear", "trilinear"):
            align = module.align_corners
            unit = torch.eye(n, dtype=torch.float64)[:, None]
            rows = F.interpolate(unit, mode="linear", align_corners=align, **options)[:, 0]
            # two weights an output, each wrong by some ulps of a position below n
            gains.append(up(largest_norm(rows, 1e-6) + math.sqrt(rows.shape[1]) * n * 2.0**-46))
        else:
            raise NotKnown(f"has mode={module.mode!r}, of which no constant is known")
    return times(*gains)


def _copies(n: int, dtype: torch.dtype, mode: str, options: dict[str, Any]) -> int:
    """How often the nearest of n entries is taken at most. The scale by which it is found is of the input's precision,
    or of float32 where that is less."""
    places = F.interpolate(torch.arange(n, dtype=dtype)[None, None], mode=mode, **options)
    return int(places.flatten().long().bincount().max())


def _unfold(module: Any, call: Call) -> float:
    names = (module.kernel_size, module.stride, module.dilation)
    return times(*(root(Axis(*axis).folds) for axis in zip(*(each(value, 2) for value in names), strict=True)))


WINDOWS: dict[type[nn.Module], Callable[[Any, Call], float]] = {
    **{kind: _max_pool(n) for n, kind in enumerate((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), 1)},
    **{kind: _avg_pool(n) for n, kind in enumerate((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), 1)},
    **{
        kind: _adaptive(n, _adaptive_average)
        for n, kind in enumerate((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), 1)
    },
    **{
        kind: _adaptive(n, _adaptive_max)
        for n, kind in enumerate((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), 1)
    },
    **{kind: _lp_pool(n) for n, kind in enumerate((nn.LPPool1d, nn.LPPool2d, pooling.LPPool3d), 1)},
    padding._ConstantPadNd: _constant_padding,
    padding._ReflectionPadNd: _padding("reflect"),
    padding._ReplicationPadNd: _padding("replicate"),
    padding._CircularPadNd: _padding("circular"),
    nn.Upsample: _upsample,
    nn.Unfold: _unfold,
    nn.Fold: _unfold,
}
