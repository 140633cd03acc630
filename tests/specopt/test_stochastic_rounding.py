"""Half-precision weights rounded by chance: small steps count on average, and the chance is the same in every run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import specopt
from specopt.kernels.passes.rounding import random_bits, rounded_like, stochastic
from tests.specopt.helpers import DEVICE

OURS: dict[str, Any] = {
    "snr": lambda params, **kw: specopt.SNRSGD(params, lr=1.0, snr_lambda=1e-12, **kw),
    "cap": lambda params, **kw: specopt.NormScaleAdamW(
        params, lr=1e-4, weight_decay=0, mode="cap", target=1e6, eps=1e-12, **kw
    ),
}


def drift(kind: str, dtype: torch.dtype, chance: bool, steps: int = 20) -> tuple[float, Tensor]:
    """How far all weights have gone on average over how far they were asked to, by steps of a fiftieth of a place."""
    torch.manual_seed(0)
    weight = (1 + torch.rand(96, 80)).to(dtype).requires_grad_()  # in [1, 2] places are alike
    before = weight.detach().float()
    optimizer = OURS[kind]([weight], stochastic_rounding=chance)
    place = torch.finfo(dtype).eps
    for _ in range(steps):
        weight.grad = torch.full_like(weight, place / 50 if kind == "snr" else 1.0)
        if kind == "cap":
            optimizer.param_groups[0]["lr"] = place / 50
        optimizer.step()
    asked = steps * place / 50
    return float((before - weight.detach().float()).mean() / asked), weight.detach()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", OURS)
def test_steps_below_the_last_place_count_on_average(kind: str, dtype: torch.dtype) -> None:
    assert drift(kind, dtype, chance=False)[0] == 0
    mean, first = drift(kind, dtype, chance=True)
    assert abs(mean - 1) < 0.1
    assert torch.equal(first, drift(kind, dtype, chance=True)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", OURS)
def test_weights_that_need_no_rounding_take_the_same_step_with_it(kind: str, dtype: torch.dtype) -> None:
    results = []
    for chance in (False, True):
        weight = torch.ones(96, 80, dtype=dtype).requires_grad_()
        weight.grad = torch.randn(96, 80, generator=torch.Generator().manual_seed(0), dtype=dtype)
        OURS[kind]([weight], stochastic_rounding=chance).step()
        results.append(weight.detach())
    assert torch.equal(*results)


def test_a_small_correction_counts_on_average() -> None:
    torch.manual_seed(0)
    weight = (torch.ones(96, 80) + 0.01 * torch.randn(96, 80)).bfloat16().requires_grad_()
    sigma = float(torch.linalg.matrix_norm(weight.detach().double(), 2))
    optimizer = specopt.NormScaleAdamW(
        [weight], lr=1e-12, weight_decay=0, target=sigma * (1 - 1e-3), stochastic_rounding=True
    )
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    after = float(torch.linalg.matrix_norm(weight.detach().double(), 2))
    assert abs(after / sigma - (1 - 1e-3)) < 2e-4


@pytest.mark.parametrize("across", [False, True])
def test_rows_of_a_matrix_are_rounded_as_the_whole_is(across: bool) -> None:
    matrix = torch.zeros(7, 5, dtype=torch.bfloat16)
    new = torch.randn(7, 5)
    index = torch.arange(35).view(7, 5)
    whole = stochastic(new, random_bits(torch.tensor(3.0), 2, index), torch.bfloat16)
    turned = (lambda x: x.mT) if across else (lambda x: x)
    part = rounded_like(matrix, turned(new)[1:4], 3.0, 2, rows=(1, 4), across=across)
    assert torch.equal(part, turned(whole)[1:4])


def kernels_step(chances: list[bool]) -> list[Tensor]:
    """Bfloat16 weights, a group each, after two steps by the kernels."""
    torch.manual_seed(0)
    weights = [torch.randn(40, 30).bfloat16().to(DEVICE).requires_grad_() for _ in chances]
    groups = [{"params": [w], "stochastic_rounding": chance} for w, chance in zip(weights, chances, strict=True)]
    optimizer = specopt.SNRSGD(groups, lr=0.1, block=8, max_passes=1)
    for _ in range(2):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    return [weight.detach() for weight in weights]


@pytest.mark.usefixtures("triton_backend")
def test_a_group_beside_one_that_is_rounded_by_chance_is_rounded_to_nearest() -> None:
    alone, beside = kernels_step([False, False]), kernels_step([False, True])
    assert torch.equal(alone[0], beside[0])
    assert not torch.equal(alone[1], beside[1])


ROUNDED_TO_NEAREST: dict[str, Any] = {
    "rank": lambda params: specopt.NormScaleAdamW(params, mode="cap", rank=2, stochastic_rounding=True),
    "full": lambda params: specopt.NormScaleAdamW(params, mode="cap", rank="full", stochastic_rounding=True),
    "frobenius": lambda params: specopt.NormScaleAdamW(params, norm="frobenius", stochastic_rounding=True),
    "composed": lambda params: specopt.wrap(
        torch.optim.SGD(params, lr=0.1),
        specopt.Compose(specopt.SpectralPenalty(stochastic_rounding=True), specopt.NormScale(mode="cap")),
    ),
}


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("kind", ROUNDED_TO_NEAREST)
def test_what_a_device_rounds_to_nearest_is_refused_by_chance(kind: str) -> None:
    weight = torch.ones(40, 30, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    optimizer = ROUNDED_TO_NEAREST[kind]([weight])
    with pytest.raises(ValueError, match=r"stochastic_rounding must be False for 0\.0 .*rank=1"):
        optimizer.step()
    assert bool((weight == 1).all()) and not optimizer.state[weight]


@pytest.mark.usefixtures("triton_backend")
def test_corrections_behind_a_wrapped_update_are_rounded_otherwise_in_every_step() -> None:
    start = torch.eye(64, device=DEVICE)
    weight = start.bfloat16().requires_grad_()
    rule = specopt.NormScale(mode="rescale", target=1.003, block=8, max_passes=1, stochastic_rounding=True)
    optimizer = specopt.wrap(torch.optim.RMSprop([weight], lr=1e-8), rule)
    raised = []
    for _ in range(3):
        with torch.no_grad():
            weight.copy_(start)
        weight.grad = torch.full_like(weight, 1e-3)
        optimizer.step()
        raised.append(weight.detach().diagonal() > 1)
    assert all(0 < int(found.sum()) < 64 for found in raised)
    assert not torch.equal(raised[0], raised[1]) and not torch.equal(raised[1], raised[2])
