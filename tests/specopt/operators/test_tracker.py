"""The tracked operator norm against the SVD of the unrolled operator."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from specopt.operators import COLD, START, WARM, ConvOperator, Found, Geometry, follow, start
from tests.specopt.operators.cases import LARGER, dense, every, norm, operator_of

Sized = tuple[nn.Module, tuple[int, ...]]


def error(found: Found, operator: ConvOperator) -> float:
    exact = norm(operator)
    return abs(float(found.sigma) - exact) / exact


@pytest.mark.parametrize("orthogonal", [False, True], ids=["default", "orthogonal"])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_cold_start_finds_the_operator_norm_to_a_thousandth(dimensions: int, orthogonal: bool) -> None:
    for module, size in every(dimensions, LARGER)[:: (1, 3, 5)[dimensions - 1]]:
        if orthogonal:
            nn.init.orthogonal_(module.weight)
        operator = operator_of(module, size)
        found = follow([operator], start([operator]), START)
        assert error(found, operator) < 1e-3, str(operator.geometry)


TRAINED: dict[str, Sized] = {
    "zeros": (nn.Conv2d(3, 5, 3, padding=1), (9, 9)),
    "circular": (nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"), (9, 9)),
    "strided": (nn.Conv2d(3, 6, 5, stride=2, padding=2, padding_mode="reflect"), (11, 10)),
    "as long as the stride": (nn.Conv2d(3, 8, 3, stride=3), (12, 12)),
    "dilated": (nn.Conv2d(3, 4, 3, dilation=2, padding="same", padding_mode="replicate"), (9, 9)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (9, 9)),
    "depthwise": (nn.Conv2d(4, 4, 5, groups=4, padding=2), (9, 9)),
    "1d": (nn.Conv1d(3, 4, 5, padding=2, padding_mode="circular"), (48,)),
    "3d": (nn.Conv3d(2, 3, 3, padding=1), (5, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1), (6, 6)),
}


@pytest.mark.parametrize("name", TRAINED)
def test_norm_is_followed_to_a_thousandth_while_the_kernel_trains(name: str) -> None:
    """Adam at 1e-3 on random targets: nearly every kernel's spectrum has several peaks that grow and shrink."""
    module, size = TRAINED[name]
    torch.manual_seed(0)
    module.reset_parameters()
    with torch.no_grad():
        inputs = torch.randn(16, module.in_channels, *size)
        wanted = torch.randn_like(module(inputs))
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    block, errors = start([operator_of(module, size)]), []
    for step in range(60):
        optimizer.zero_grad()
        (module(inputs) - wanted).square().mean().backward()
        optimizer.step()
        operator = operator_of(module, size)
        found = follow([operator], block, START if step == 0 else COLD if step < 20 else WARM, step)
        errors.append(error(found, operator))
    assert max(errors) < 1e-3


def test_a_learning_rate_that_remakes_the_kernel_leaves_it_found_at_the_median() -> None:
    module, size = TRAINED["zeros"]
    torch.manual_seed(0)
    module.reset_parameters()
    block, errors = start([operator_of(module, size)]), []
    for step in range(30):
        with torch.no_grad():
            module.weight += 0.1 * module.weight.norm() / module.weight.numel() ** 0.5 * torch.randn_like(module.weight)
        operator = operator_of(module, size)
        errors.append(error(follow([operator], block, START if step == 0 else WARM, step), operator))
    assert sorted(errors)[15] < 1e-3


def test_a_peak_that_overtakes_another_frequency_is_found() -> None:
    """A circular convolution keeps frequencies apart, so nothing in the basis leads from the lowest to the highest."""
    low = torch.tensor([1.0, 2.0, 1.0]) / 4
    high = torch.tensor([-1.0, 2.0, -1.0]) / 4
    geometry = Geometry.of(nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular"), (64,))

    def operator(weight: float) -> ConvOperator:
        return ConvOperator.of((low + weight * high).view(1, 1, 3), geometry)

    block = start([operator(0.98)])
    follow([operator(0.98)], block, START)
    for step in range(1, 16):
        found = follow([operator(1.02)], block, WARM, step)
    assert norm(operator(1.02)) == pytest.approx(1.02)
    assert float(found.sigma) == pytest.approx(1.02, rel=1e-3)


def test_triplet_is_one_of_the_operator() -> None:
    operator = operator_of(nn.Conv2d(4, 6, 3, padding=1, groups=2), (8, 8))
    found = follow([operator], start([operator]), START)
    (left,), (right,) = found.lefts, found.rights
    matrix = dense(operator).float()
    sigma = float(found.sigma)
    for vector in (left, right):
        assert float(vector.norm()) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(matrix @ right.flatten(), sigma * left.flatten(), rtol=0, atol=1e-5 * sigma)
    off = float((matrix.mT @ left.flatten() - sigma * right.flatten()).norm()) / sigma
    assert off == pytest.approx(float(found.residual), abs=1e-4)
    assert off < START.residual


def test_kernel_gradient_of_the_triplet_is_that_of_the_norm() -> None:
    operator = operator_of(nn.Conv2d(3, 4, 3, padding=1, stride=2).double(), (7, 7))
    found = follow([operator], start([operator]), START._replace(residual=1e-10))
    kernel = operator.kernel.clone().requires_grad_()
    unit = torch.eye(147, dtype=torch.float64).view(147, 3, 7, 7)
    matrix = torch.nn.functional.conv2d(unit, kernel, stride=2, padding=1).flatten(1)
    (expected,) = torch.autograd.grad(torch.linalg.matrix_norm(matrix, ord=2), kernel)
    torch.testing.assert_close(operator.kernel_gradient(*found.lefts, *found.rights), expected, rtol=0, atol=1e-7)


def test_several_operators_at_once_are_as_each_alone() -> None:
    pairs = [(nn.Conv2d(2, 3, 3), (8, 8)), (nn.Conv1d(1, 4, 3), (9,)), (nn.Conv2d(4, 4, 3, groups=4), (9, 9))]
    operators = [operator_of(*pair) for pair in pairs]
    together = follow(operators, start(operators), START)
    for i, operator in enumerate(operators):
        alone = follow([operator], start([operator]), START)
        assert torch.equal(together.sigma[i], alone.sigma[0])
        assert torch.equal(together.lefts[i], alone.lefts[0])


@pytest.mark.full
def test_a_device_s_fixed_number_of_pairs_finds_the_same(triton_backend: None) -> None:
    pairs = [(nn.Conv1d(2, 3, 3, padding=1), (16,)), (nn.Conv1d(1, 4, 3), (9,)), (nn.Conv1d(4, 4, 3, groups=2), (8,))]
    operators = [operator_of(*pair) for pair in pairs]
    found = follow(operators, start(operators), START._replace(fixed=8))
    exact = torch.tensor([norm(operator) for operator in operators])
    torch.testing.assert_close(found.sigma, exact, rtol=1e-3, atol=0)
    assert found.pairs.tolist() == [8, 8, 8]


def test_the_same_bits_again_and_the_global_random_state_untouched() -> None:
    operator = operator_of(nn.Conv2d(2, 3, 3, padding=1), (8, 8))
    before = torch.get_rng_state()
    first, second = (follow([operator], start([operator]), START) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.sigma, second.sigma)
    assert torch.equal(first.rights[0], second.rights[0])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_kernels_of_extreme_size_are_followed(scale: float) -> None:
    operator = operator_of(nn.Conv2d(3, 4, 3, padding=1), (8, 8))
    scaled = ConvOperator(operator.kernel * scale, operator.geometry)
    found = follow([scaled], start([scaled]), START)
    assert float(found.sigma) / scale == pytest.approx(norm(operator), rel=1e-3)
    assert float(found.lefts[0].norm()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("module", "size"),
    [
        (nn.Conv1d(1, 3, 3), (12,)),
        (nn.Conv1d(1, 3, 3), (13,)),
        (nn.Conv1d(1, 1, 1), (1,)),
        (nn.Conv2d(5, 1, 7), (7, 7)),
        (nn.Conv2d(8, 8, 3, groups=8), (4, 4)),
        (nn.ConvTranspose1d(14, 1, 3), (1,)),
    ],
    ids=["all of a basis", "one more", "a number", "one output", "many groups", "one pixel"],
)
def test_operators_of_few_dimensions_are_exact(module: nn.Module, size: tuple[int, ...]) -> None:
    operator = operator_of(module, size)
    block = start([operator])
    for step in range(3):
        assert error(follow([operator], block, WARM if step else START, step), operator) < 1e-5


def test_operators_of_hardly_more_dimensions_than_columns_are_found_to_a_thousandth() -> None:
    """Nineteen: the search has room beside twelve columns, and pairs end at their tolerance, not at rounding."""
    for seed in range(40):
        torch.manual_seed(seed)
        operator = operator_of(nn.Conv1d(1, 3, 3), (19,))
        block = start([operator])
        for step in range(3):
            assert error(follow([operator], block, WARM if step else START, step), operator) < 1e-3, seed


def test_a_zero_kernel_has_norm_zero_and_leaves_a_basis_to_go_on_from() -> None:
    operator = operator_of(nn.Conv2d(3, 4, 3, padding=1), (8, 8))
    zero = ConvOperator(torch.zeros_like(operator.kernel), operator.geometry)
    block = start([zero])
    found = follow([zero], block, START)
    assert float(found.sigma) == 0
    assert not found.lefts[0].any()
    assert error(follow([operator], block, START), operator) < 1e-3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_kernel_that_is_not_finite_shows_it_and_leaves_its_block(bad: float) -> None:
    operator = operator_of(nn.Conv2d(3, 4, 3, padding=1), (8, 8))
    block = start([operator])
    follow([operator], block, START)
    kernel: Tensor = operator.kernel.clone()
    kernel[0, 0, 1, 1] = bad
    before = block[0].clone()
    found = follow([ConvOperator(kernel, operator.geometry)], block, WARM, 1)
    assert not found.sigma.isfinite().any()
    assert torch.equal(block[0], before)
    assert error(follow([operator], block, WARM, 2), operator) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_kernels_of_other_precision_are_followed(dtype: torch.dtype) -> None:
    module = nn.Conv2d(3, 4, 3, padding=1).to(dtype)
    operator = operator_of(module, (8, 8))
    found = follow([operator], start([operator]), START)
    assert found.sigma.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert error(found, operator) < 1e-3
