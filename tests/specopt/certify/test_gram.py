"""Gram bounds: never below the norm, within the tolerance above it, whatever the scale, shape and spectrum."""

from __future__ import annotations

import math
from decimal import Context, Decimal, localcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from specopt.certify.gram import gamma, in_double, largest_norm, root, times, total, up

SVD_ERROR = 1e-13
"""What float64's own svdvals may be wrong by, relatively."""


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2).max())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30, 1e-300, 1e300])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (30, 20), (20, 30), (64, 300), (128, 128)])
def test_bound_is_never_below_svd_and_at_most_a_thousandth_above(shape: tuple[int, int], scale: float) -> None:
    matrix = random(*shape)
    bound = largest_norm(matrix * scale) / scale
    assert 1 - SVD_ERROR <= bound / norm(matrix) <= 1.001


@pytest.mark.parametrize("tolerance", [0.5, 1e-2, 1e-5])
def test_tolerance_is_kept_also_where_two_values_are_close(tolerance: float) -> None:
    u, _, vh = torch.linalg.svd(random(60, 60))
    values = torch.linspace(1 - 1e-4, 1, 60, dtype=torch.float64)
    assert 1 - SVD_ERROR <= largest_norm((u * values) @ vh, tolerance) <= 1 + tolerance


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6), st.floats(-20, 20))
def test_bound_holds_for_random_matrices_with_graded_columns(rows: int, columns: int, seed: int, spread: float) -> None:
    matrix = random(rows, columns, seed=seed) * torch.logspace(0, spread, columns, dtype=torch.float64)
    assert 1 - SVD_ERROR <= largest_norm(matrix) / norm(matrix) <= 1.001


def test_bound_holds_against_sixty_digits() -> None:
    """Where the matrix is rank one its norm is known to any number of digits, and no float64 SVD is needed."""
    with localcontext(Context(prec=60)):
        for seed in range(20):
            row = random(1, 17, seed=seed)
            exact = sum((Decimal(x) ** 2 for x in row[0].tolist()), Decimal(0)).sqrt()
            for matrix in (row, row.mT):
                assert exact <= Decimal(largest_norm(matrix)) <= exact * (1 + Decimal("1e-10"))


def test_orthogonal_matrices_are_tight() -> None:
    q = torch.linalg.qr(random(150, 150))[0]
    assert 1 - SVD_ERROR <= largest_norm(q) <= 1 + 1e-9


@pytest.mark.parametrize("complex_", [False, True])
def test_of_several_matrices_the_largest_norm_is_bounded(complex_: bool) -> None:
    stack = random(40, 12, 18) * torch.logspace(-200, 0, 40, dtype=torch.float64)[:, None, None]
    if complex_:
        stack = torch.complex(stack, random(40, 12, 18, seed=1) * 0.5)
    assert 1 - SVD_ERROR <= largest_norm(stack) / norm(stack) <= 1.001


def test_floor_leaves_out_what_is_below_it_only() -> None:
    stack = torch.stack([random(10, 10), 3 * random(10, 10, seed=1)])
    assert largest_norm(stack, floor=1.0) == pytest.approx(norm(stack), rel=1e-3)
    assert largest_norm(stack, floor=100.0) <= 100.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_entries_have_an_infinite_bound(value: float) -> None:
    matrix = random(5, 6)
    matrix[2, 3] = value
    assert largest_norm(matrix) == math.inf


def test_zero_and_empty_matrices_have_bound_zero() -> None:
    for shape in ((3, 4), (0, 4), (3, 0), (0, 3, 4)):
        assert largest_norm(torch.zeros(shape, dtype=torch.float64)) == 0


def test_largest_and_smallest_float64_numbers_are_bounded() -> None:
    huge = torch.full((4, 4), torch.finfo(torch.float64).max, dtype=torch.float64)
    assert largest_norm(huge) == math.inf
    assert largest_norm(huge / 8) >= float(huge[0, 0]) / 8 * 4
    tiny = torch.full((1, 4), 5e-324, dtype=torch.float64)
    assert largest_norm(tiny) >= 1e-323


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes_are_converted_without_rounding(dtype: torch.dtype) -> None:
    weight = random(30, 20).to(dtype)
    assert torch.equal(in_double(weight).to(dtype), weight)
    assert 1 - SVD_ERROR <= largest_norm(in_double(weight)) / norm(weight.double()) <= 1.001


def test_transposed_and_strided_matrices_have_the_same_bound() -> None:
    matrix = random(24, 40)
    assert largest_norm(matrix.mT) == pytest.approx(largest_norm(matrix), rel=1e-12)
    assert 1 - SVD_ERROR <= largest_norm(matrix[::2, ::3]) / norm(matrix[::2, ::3]) <= 1.001


@given(st.lists(st.floats(1e-100, 1e100), min_size=1, max_size=5))
def test_arithmetic_of_bounds_never_rounds_down(values: list[float]) -> None:
    with localcontext(Context(prec=2000)):
        exact = [Decimal(value) for value in values]
        assert Decimal(total(values)) >= sum(exact)
        assert Decimal(times(*values)) >= math.prod(exact)
        assert Decimal(root(values[0])) ** 2 >= exact[0]
        assert Decimal(up(values[0])) > exact[0]


def test_products_that_underflow_stay_above_zero() -> None:
    assert times(1e-200, 1e-200, 0.5) > 0
    assert times(1e-200, 0.0) == 0
    assert up(5e-324) > 5e-324 and up(0.0) == 0
    assert total([1.7e308, 1.7e308]) == math.inf


def test_infinity_outweighs_zero_and_gamma_exceeds_n_roundings() -> None:
    assert times(0.0, math.inf) == math.inf
    assert gamma(1000) >= 1000 * 2.0**-53 / (1 - 1000 * 2.0**-53)
