"""The flattened bound: never below the operator norm, and reached where its proof says so."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from specopt.operators import ConvOperator, Geometry, flattened_bound, flattened_factors
from tests.specopt.operators.cases import every, norm

ROUNDING = 1 + 1e-10


def adversarial(kernel: Tensor) -> dict[str, Tensor]:
    """Random, of one sign (all taps add up), and of one tap at the edge (that reads the padding most)."""
    edge = torch.zeros_like(kernel)
    edge[(..., *(0,) * (kernel.ndim - 2))] = 1.0
    return {"random": kernel, "one sign": torch.ones_like(kernel), "edge": edge}


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_bound_is_never_below_the_operator_norm(dimensions: int) -> None:
    for module, size in every(dimensions):
        geometry = Geometry.of(module, size)
        for name, kernel in adversarial(module.weight.detach().double()).items():
            exact = norm(ConvOperator(kernel, geometry))
            assert exact <= float(flattened_bound(kernel, geometry)) * ROUNDING, (str(geometry), name)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_each_side_s_factor_holds_by_itself(dimensions: int) -> None:
    for module, size in every(dimensions)[::3]:
        geometry = Geometry.of(module, size)
        for name, kernel in adversarial(module.weight.detach().double()).items():
            exact = norm(ConvOperator(kernel, geometry))
            sides = kernel.unflatten(0, (geometry.groups, -1)).unbind()
            by_first = max(float(torch.linalg.matrix_norm(side.flatten(1), ord=2)) for side in sides)
            by_second = max(float(torch.linalg.matrix_norm(side.transpose(0, 1).flatten(1), ord=2)) for side in sides)
            of_output, of_input = (by_second, by_first) if geometry.transposed else (by_first, by_second)
            by_output, by_input = flattened_factors(geometry, tuple(kernel.shape))
            assert exact <= by_output * of_output * ROUNDING, (str(geometry), name)
            assert exact <= by_input * of_input * ROUNDING, (str(geometry), name)


@pytest.mark.parametrize(("stride", "factor"), [(1, 3.0), (2, 2.0), (3, 1.0)])
def test_factor_is_the_root_of_the_product_of_ceil_kernel_over_stride(stride: int, factor: float) -> None:
    geometry = Geometry.of(nn.Conv2d(2, 5, 3, stride=stride), (13, 13))
    assert flattened_factors(geometry, (5, 2, 3, 3))[0] == pytest.approx(factor)


def test_bound_allows_for_the_rounding_of_its_singular_value_decomposition() -> None:
    geometry = Geometry.of(nn.Conv2d(1, 64, 1), (4, 4))
    for seed in range(20):
        kernel = torch.randn(64, 1, 1, 1, generator=torch.Generator().manual_seed(seed)).double()
        exact = sum(Fraction(x) ** 2 for x in kernel.flatten().tolist())
        assert Fraction(float(flattened_bound(kernel, geometry))) ** 2 >= exact


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bound_of_a_kernel_that_is_not_finite_is_infinite(bad: float) -> None:
    kernel = torch.ones(2, 3, 3, 3).index_fill(0, torch.tensor([1]), bad)
    assert flattened_bound(kernel, Geometry.of(nn.Conv2d(3, 2, 3), (5, 5))) == math.inf


def test_dilation_that_shares_a_divisor_with_the_stride_brings_its_taps_together() -> None:
    apart = Geometry.of(nn.Conv1d(1, 1, 4, stride=2, dilation=3), (31,))
    together = Geometry.of(nn.Conv1d(1, 1, 4, stride=2, dilation=2), (31,))
    assert flattened_factors(apart, (1, 1, 4))[0] == pytest.approx(math.sqrt(2))
    assert flattened_factors(together, (1, 1, 4))[0] == pytest.approx(2)


def test_bound_is_reached_by_a_circular_kernel_of_ones() -> None:
    kernel = torch.ones(1, 1, 3, 3)
    geometry = Geometry.of(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), (6, 6))
    assert norm(ConvOperator(kernel, geometry)) == pytest.approx(9)
    assert float(flattened_bound(kernel, geometry)) == pytest.approx(9)


def test_padding_with_copies_needs_a_greater_factor_than_zeros() -> None:
    """A tap at the edge of the kernel reads a replicated border pixel p + 1 times."""
    kernel = torch.zeros(1, 1, 5, dtype=torch.float64)
    kernel[..., 0] = 1
    geometry = Geometry.of(nn.Conv1d(1, 1, 5, padding=2, padding_mode="replicate"), (8,))
    assert norm(ConvOperator(kernel, geometry)) == pytest.approx(math.sqrt(3))
    ones = torch.ones_like(kernel)
    without = Geometry.of(nn.Conv1d(1, 1, 5, padding=2), (8,))
    assert norm(ConvOperator(ones, geometry)) > float(flattened_bound(ones, without)) * ROUNDING
    assert norm(ConvOperator(ones, geometry)) <= float(flattened_bound(ones, geometry)) * ROUNDING
