"""Small convolutions of all kinds, and their matrices written out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from specopt.operators import ConvOperator, Geometry

SIZES = [(11,), (6, 5), (3, 4, 3)]
LARGER = [(37,), (9, 8), (5, 4, 5)]
"""Sizes at which a basis is not all there is."""
KERNELS = [(2,), (3, 2), (2, 3, 2)]
MODES = ("zeros", "reflect", "replicate", "circular")
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

Case = tuple[nn.Module, tuple[int, ...]]


def direct(dimensions: int, size: tuple[int, ...]) -> Iterator[Case]:
    """Every stride, padding, dilation, mode and grouping (4 groups of 4 channels: depthwise) that torch takes here."""
    kernel = KERNELS[dimensions - 1]
    grid = itertools.product((1, 2, 3), (0, 1, 2, "same"), (1, 2), MODES)
    for number, (stride, padding, dilation, mode) in enumerate(grid):
        if padding == "same" and stride > 1:
            continue
        groups, inputs, outputs = ((1, 3, 4), (2, 4, 6), (4, 4, 4))[number % 3]
        options = {"stride": stride, "padding": padding, "dilation": dilation, "padding_mode": mode}
        module = CONVS[dimensions - 1](inputs, outputs, kernel, groups=groups, bias=False, **options)
        if _fits(module, size):
            yield module, size


def transposed(dimensions: int, size: tuple[int, ...]) -> Iterator[Case]:
    kernel = KERNELS[dimensions - 1]
    grid = itertools.product((1, 2, 3), (0, 1), (1, 2, 3), (0, 1, 2))
    for number, (stride, padding, dilation, added) in enumerate(grid):
        groups, inputs, outputs = ((1, 3, 4), (2, 4, 6), (4, 4, 4))[number % 3]
        options = {"stride": stride, "padding": padding, "dilation": dilation, "output_padding": added}
        module = TRANSPOSED[dimensions - 1](inputs, outputs, kernel, groups=groups, bias=False, **options)
        if added < max(stride, dilation) and _fits(module, size):
            yield module, size


def every(dimensions: int, sizes: list[tuple[int, ...]] = SIZES) -> list[Case]:
    torch.manual_seed(dimensions)
    size = sizes[dimensions - 1]
    return [*direct(dimensions, size), *transposed(dimensions, size)]


def _fits(module: nn.Module, size: tuple[int, ...]) -> bool:
    """Whether torch takes an input of that size."""
    try:
        module(torch.zeros(1, module.in_channels, *size))
    except RuntimeError:
        return False
    return True


def unrolled(module: nn.Module, size: tuple[int, ...]) -> Tensor:
    """The matrix of a module's map in float64, column by column from unit inputs."""
    module = module.double()
    count = module.in_channels * math.prod(size)
    unit = torch.eye(count, dtype=torch.float64).view(count, module.in_channels, *size)
    with torch.no_grad():
        return module(unit).flatten(1).mT


def dense(operator: ConvOperator) -> Tensor:
    """The matrix of an operator in float64."""
    exact = ConvOperator(operator.kernel.double(), operator.geometry)
    count = math.prod(exact.input_shape)
    return exact(torch.eye(count, dtype=torch.float64).view(count, *exact.input_shape)).flatten(1).mT


def norm(operator: ConvOperator) -> float:
    """The exact operator norm."""
    return float(torch.linalg.matrix_norm(dense(operator), ord=2))


def operator_of(module: nn.Module, size: tuple[int, ...]) -> ConvOperator:
    return ConvOperator.of(module.weight, Geometry.of(module, size))
