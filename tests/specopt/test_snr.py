"""SNRSGD against SGD on the gradient plus autograd of ``λ/2 · Σ σ₁²``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import specopt
from tests.specopt.helpers import clones, exact, gap_of, parameters, set_gradients

LAMBDA = 0.3
BASES: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "weight_decay": 0.05, "maximize": True},
    {"maximize": True, "foreach": True},
]


def penalty_gradient(weight: Tensor, snr_lambda: float) -> Tensor:
    matrix = weight.detach().double().flatten(1).requires_grad_()
    (snr_lambda / 2 * torch.linalg.svdvals(matrix)[0] ** 2).backward()
    assert matrix.grad is not None
    return matrix.grad.view(weight.shape)


@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_step_equals_sgd_on_gradient_plus_autograd_of_half_lambda_sigma_squared(
    dtype: torch.dtype, base: dict[str, Any]
) -> None:
    params = parameters(dtype)
    others = clones(params)
    tight: dict[str, Any] = {"tolerance": 1e-11 if dtype == torch.float64 else 1e-6, "max_passes": 150}
    ours = specopt.SNRSGD(params, lr=0.1, snr_lambda=LAMBDA, **tight, **base)
    theirs = torch.optim.SGD(others, lr=0.1, **base)
    sign = -1 if base.get("maximize") else 1
    for step in range(3):
        set_gradients(params, others, seed=step)
        before = [param.detach().clone() for param in params]
        for param, other in zip(params, others, strict=True):
            with torch.no_grad():
                other.copy_(param)  # rounding must not build up: each step is judged from the same state
            if param.ndim > 1:
                assert other.grad is not None
                other.grad += sign * penalty_gradient(param, LAMBDA).to(dtype)
        ours.step()
        theirs.step()
        for param, other, old in zip(params, others, before, strict=True):
            update = (other - old).detach().norm()
            if param.ndim > 1 and gap_of(exact(old)[1]) < 0.01:
                continue
            allowed = 1e-9 if dtype == torch.float64 else 1e-5 + 2.0**-23 * float(old.norm() / update)
            assert (param - other).norm() <= allowed * update


@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_lambda_zero_is_sgd_bit_for_bit(dtype: torch.dtype, base: dict[str, Any]) -> None:
    params = parameters(dtype)
    others = clones(params)
    ours = specopt.SNRSGD(params, lr=0.1, snr_lambda=0.0, **base)
    theirs = torch.optim.SGD(others, lr=0.1, **base)
    for step in range(4):
        set_gradients(params, others, seed=step)
        ours.step()
        theirs.step()
    assert all(torch.equal(p, o) for p, o in zip(params, others, strict=True))


def test_gradients_are_the_same_tensors_with_the_same_values_after_the_step() -> None:
    params = parameters(torch.float32)
    set_gradients(params, clones(params), seed=0)
    gradients = [param.grad for param in params]
    values = [gradient.clone() for gradient in gradients if gradient is not None]
    specopt.SNRSGD(params, lr=0.1, momentum=0.9).step()
    assert all(param.grad is gradient for param, gradient in zip(params, gradients, strict=True))
    assert all(torch.equal(g, v) for g, v in zip(gradients, values, strict=True) if g is not None)


def test_gradients_are_put_back_when_the_base_step_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters(torch.float32)
    set_gradients(params, clones(params), seed=0)
    gradients = [param.grad for param in params]
    optimizer = specopt.SNRSGD(params, lr=0.1)

    def fail() -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(optimizer, "_base_step", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert all(param.grad is gradient for param, gradient in zip(params, gradients, strict=True))


def test_penalty_is_applied_by_group() -> None:
    params = parameters(torch.float64)[:3]
    others = clones(params)
    groups = [
        {"params": [params[0]], "snr_lambda": 0.0},
        {"params": [params[1]], "spectral": False},
        {"params": [params[2]]},
    ]
    ours = specopt.SNRSGD(groups, lr=0.1, snr_lambda=0.5)
    theirs = torch.optim.SGD(others, lr=0.1)
    set_gradients(params, others, seed=0)
    ours.step()
    theirs.step()
    assert [torch.equal(p, o) for p, o in zip(params, others, strict=True)] == [True, True, False]


def test_channels_last_gradient_and_weight_give_the_same_step() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 6, 3, 3, generator=generator, dtype=torch.float64)
    gradient = torch.randn(8, 6, 3, 3, generator=generator, dtype=torch.float64)
    results = []
    for weight_format in (torch.contiguous_format, torch.channels_last):
        for gradient_format in (torch.contiguous_format, torch.channels_last):
            param = weight.clone(memory_format=weight_format).requires_grad_()
            param.grad = gradient.clone(memory_format=gradient_format)
            specopt.SNRSGD([param], lr=0.1, snr_lambda=0.5, tolerance=1e-12, max_passes=150).step()
            results.append(param.detach().contiguous())
    assert all(torch.allclose(result, results[0], rtol=0, atol=1e-12) for result in results)
