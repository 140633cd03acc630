"""Functions and tensor methods in a traced ``forward``: the module that each of them amounts to, or its own rule."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Maker = Callable[..., nn.Module]
"""From the arguments of a call behind the input, the module that does the same."""


def _pool(kind: type[nn.Module]) -> Maker:
    """Of arguments that have the names and the order of the module's."""
    return lambda *args, **kwargs: kind(*args, **kwargs)


def _softmax(kind: type[nn.Module]) -> Maker:
    return lambda dim=None, *rest, **kwargs: kind(kwargs.get("dim", dim))


def _dropout(p: float = 0.5, training: bool = True, inplace: bool = False) -> nn.Module:
    return nn.Dropout(p).train(training)


def _pad(pad: Any, mode: str = "constant", value: float | None = None) -> nn.Module:
    kinds = {
        "constant": nn.ConstantPad2d,
        "reflect": nn.ReflectionPad2d,
        "replicate": nn.ReplicationPad2d,
        "circular": nn.CircularPad2d,
    }
    made = nn.ConstantPad2d(0, 0.0) if mode == "constant" else kinds[mode](0)
    made.padding = tuple(pad)
    return made


def _max_pool(kind: type[nn.Module]) -> Maker:
    def make(
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> nn.Module:
        return kind(kernel_size, stride or None, padding, dilation, return_indices, ceil_mode)

    return make


def _interpolate(
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> nn.Module:
    named = "antialiased " + mode if antialias else mode
    return nn.Upsample(size, scale_factor, named, align_corners, recompute_scale_factor)


AS_MODULE: dict[Any, Maker] = {}
"""By function, or by the name of a tensor's method."""


def _add(maker: Maker, *calls: Any) -> None:
    AS_MODULE.update(dict.fromkeys(calls, maker))


_add(lambda inplace=False: nn.ReLU(), F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
_add(lambda inplace=False: nn.ReLU6(), F.relu6)
_add(lambda approximate="none": nn.GELU(approximate), F.gelu)
_add(lambda inplace=False: nn.SiLU(), F.silu)
_add(lambda inplace=False: nn.Mish(), F.mish)
_add(lambda inplace=False: nn.SELU(), F.selu, torch.selu)
_add(lambda alpha=1.0, inplace=False: nn.ELU(alpha), F.elu)
_add(lambda alpha=1.0, inplace=False: nn.CELU(alpha), F.celu, torch.celu)
_add(lambda negative_slope=0.01, inplace=False: nn.LeakyReLU(negative_slope), F.leaky_relu)
_add(lambda beta=1, threshold=20: nn.Softplus(beta, threshold), F.softplus)
_add(lambda *bounds, **named: nn.Hardtanh(), F.hardtanh)
_add(lambda inplace=False: nn.Hardswish(), F.hardswish)
_add(lambda inplace=False: nn.Hardsigmoid(), F.hardsigmoid)
_add(lambda: nn.LogSigmoid(), F.logsigmoid)
_add(lambda: nn.Softsign(), F.softsign)
_add(lambda: nn.Tanhshrink(), F.tanhshrink)
_add(lambda lambd=0.5: nn.Softshrink(lambd), F.softshrink)
_add(lambda: nn.Tanh(), F.tanh, torch.tanh, "tanh", "tanh_")
_add(lambda: nn.Sigmoid(), F.sigmoid, torch.sigmoid, "sigmoid", "sigmoid_")
_add(_softmax(nn.Softmax), F.softmax, torch.softmax, "softmax")
_add(_softmax(nn.Softmin), F.softmin)
_add(_softmax(nn.LogSoftmax), F.log_softmax, torch.log_softmax, "log_softmax")
_add(_dropout, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout)
_add(_max_pool(nn.MaxPool1d), F.max_pool1d, torch.max_pool1d)
_add(_max_pool(nn.MaxPool2d), F.max_pool2d, torch.max_pool2d)
_add(_max_pool(nn.MaxPool3d), F.max_pool3d, torch.max_pool3d)
_add(_pool(nn.AvgPool1d), F.avg_pool1d)
_add(_pool(nn.AvgPool2d), F.avg_pool2d)
_add(_pool(nn.AvgPool3d), F.avg_pool3d)
_add(_pool(nn.AdaptiveAvgPool1d), F.adaptive_avg_pool1d)
_add(_pool(nn.AdaptiveAvgPool2d), F.adaptive_avg_pool2d)
_add(_pool(nn.AdaptiveAvgPool3d), F.adaptive_avg_pool3d)
_add(_pool(nn.AdaptiveMaxPool1d), F.adaptive_max_pool1d)
_add(_pool(nn.AdaptiveMaxPool2d), F.adaptive_max_pool2d)
_add(_pool(nn.AdaptiveMaxPool3d), F.adaptive_max_pool3d)
_add(_pad, F.pad)
_add(_interpolate, F.interpolate)
_add(_pool(nn.PixelShuffle), F.pixel_shuffle, torch.pixel_shuffle)
_add(_pool(nn.PixelUnshuffle), F.pixel_unshuffle, torch.pixel_unshuffle)

REARRANGED: frozenset[Any] = frozenset(
    [
        *(torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.clone),
        *(torch.movedim, torch.swapaxes, torch.flip, torch.roll, torch.unflatten, torch.t, torch.narrow),
        *(torch.chunk, torch.split, torch.tensor_split, torch.unbind, torch.neg, torch.abs, operator.neg, abs),
        *("flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "clone", "contiguous"),
        *("movedim", "swapaxes", "flip", "roll", "unflatten", "t", "narrow", "chunk", "split", "tensor_split"),
        *("unbind", "neg", "abs", "float", "double", "half", "bfloat16", "to", "type", "cpu", "cuda", "view_as"),
        *("reshape_as", "type_as", "select", torch.select, "requires_grad_", "detach", torch.detach),
    ]
)
"""Entries in other places, some of them left out or with another sign or sizes: nothing grows. (Rounding to another
dtype is no part of the map that is bounded.)"""

CLAMPED = frozenset([torch.clamp, torch.clip, "clamp", "clamp_", "clip", "clip_"])
"""Held between bounds, which may be tensors that show an entry more than once."""

CASTS = frozenset(["to", "type", "type_as"])
"""Some of these, which may take a dtype from a tensor."""

SUMS = frozenset([operator.add, operator.iadd, torch.add, "add", "add_"])
DIFFERENCES = frozenset([operator.sub, operator.isub, torch.sub, "sub", "sub_"])
PRODUCTS = frozenset([operator.mul, operator.imul, torch.mul, "mul", "mul_"])
QUOTIENTS = frozenset([operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div", "div_"])
JOINED = frozenset([torch.cat, torch.concat, torch.concatenate, torch.stack, torch.hstack, torch.vstack])
MEANS = frozenset([torch.mean, "mean", torch.sum, "sum"])
EXPANDED = frozenset(["expand", "expand_as", "repeat", torch.broadcast_to, torch.tile])
SHAPES = frozenset(["size", "dim", "numel", "ndimension", "stride", "is_contiguous", "new_zeros", "new_ones"])
TRANSPOSES = frozenset(["T", "mT"])
SHAPES_OF = frozenset(["shape", "ndim", "dtype", "device", "is_cuda"])
"""What tells of a tensor without its values."""
MATRIX_PRODUCTS = frozenset([F.linear, torch.matmul, torch.mm, operator.matmul, "matmul", "mm"])
