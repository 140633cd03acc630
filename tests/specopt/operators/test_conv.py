"""The linear map, its adjoint and its derivative by the kernel, against torch's modules and autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from specopt.operators import ConvOperator, Geometry
from tests.specopt.operators.cases import every, operator_of, unrolled

DOUBLE = torch.float64


@pytest.mark.parametrize("dimensions", [1, 2, pytest.param(3, marks=pytest.mark.full)])
def test_map_and_adjoint_are_the_module_s_matrix_and_its_transpose(dimensions: int) -> None:
    for module, size in every(dimensions):
        matrix = unrolled(module, size)
        operator = operator_of(module, size)
        outputs, inputs = matrix.shape
        columns = operator(torch.eye(inputs, dtype=DOUBLE).view(inputs, *operator.input_shape)).flatten(1).mT
        rows = operator.adjoint(torch.eye(outputs, dtype=DOUBLE).view(outputs, *operator.output_shape)).flatten(1)
        torch.testing.assert_close(columns, matrix, msg=str(operator.geometry))
        torch.testing.assert_close(rows, matrix, msg=str(operator.geometry))


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_kernel_gradient_is_autograd_s(dimensions: int) -> None:
    for module, size in every(dimensions):
        module = module.double()
        operator = operator_of(module, size)
        lefts = torch.randn(2, *operator.output_shape, dtype=DOUBLE)
        rights = torch.randn(2, *operator.input_shape, dtype=DOUBLE)
        (expected,) = torch.autograd.grad((module(rights) * lefts).sum(), module.weight)
        torch.testing.assert_close(operator.kernel_gradient(lefts, rights), expected, msg=str(operator.geometry))


def test_half_precision_kernels_compute_in_float32_and_double_ones_in_double() -> None:
    module = nn.Conv2d(2, 3, 3, padding=1)
    geometry = Geometry.of(module, (5, 5))
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (DOUBLE, DOUBLE)):
        operator = ConvOperator.of(module.weight.to(dtype), geometry)
        inputs = torch.randn(2, *operator.input_shape, dtype=wanted)
        outputs = operator(inputs)
        found = {outputs.dtype, operator.adjoint(outputs).dtype, operator.kernel_gradient(outputs, inputs).dtype}
        assert found == {wanted}


def test_nothing_is_recorded_for_autograd_and_no_grad_is_no_hindrance() -> None:
    module = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")
    operator = operator_of(module, (5, 5))
    inputs = torch.randn(2, *operator.input_shape, requires_grad=True)
    outputs = operator(inputs)
    with torch.no_grad():
        again = operator.kernel_gradient(outputs, inputs)
    gradient = operator.kernel_gradient(outputs, inputs)
    assert torch.equal(gradient, again)
    assert not any(t.requires_grad for t in (outputs, gradient, operator.adjoint(outputs)))


def test_autocast_is_of_no_effect() -> None:
    module = nn.Conv2d(2, 3, 3, padding=1)
    operator = operator_of(module, (5, 5))
    inputs = torch.randn(2, *operator.input_shape)
    outputs = operator(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(operator(inputs), outputs)
        assert operator.adjoint(outputs).dtype == operator.kernel_gradient(outputs, inputs).dtype == torch.float32


def test_kernels_of_any_strides_are_taken() -> None:
    module = nn.Conv2d(4, 6, 3, padding=1)
    operator = operator_of(module, (5, 5))
    spread = torch.randn(6, 4, 3, 6)[..., ::2].copy_(module.weight.detach())
    inputs = torch.randn(2, *operator.input_shape)
    for kernel in (module.weight.detach().to(memory_format=torch.channels_last), spread):
        other = ConvOperator.of(kernel, operator.geometry)
        outputs = operator(inputs)
        torch.testing.assert_close(other(inputs), outputs)
        torch.testing.assert_close(other.adjoint(outputs), operator.adjoint(outputs))


def test_a_kernel_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="kernel"):
        ConvOperator.of(torch.zeros(3, 2, 3), Geometry.of(nn.Conv2d(2, 3, 3), (5, 5)))
