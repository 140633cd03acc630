"""Bad input and odd parameters, in a warm step whose base update is fused."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import specopt
from specopt import updates
from specopt.tracker.common import STATS, Stat
from tests.specopt.device_steps import make, past_the_cold_phase, set_gradients
from tests.specopt.helpers import DEVICE, exact

pytestmark = [
    pytest.mark.filterwarnings("ignore:the first step moves"),
    pytest.mark.usefixtures("triton_backend"),
]
KINDS = ["snr", "set", "cap", "rescale"]


def plain_step(kind: str, params: list[Tensor], optimizer: Any) -> list[Tensor]:
    """The weights after the base optimizer's step from the same state."""
    others = [param.detach().clone().requires_grad_() for param in params]
    base: Any = torch.optim.SGD if kind == "snr" else torch.optim.AdamW
    names = inspect.signature(base).parameters
    plain = base(others, **{k: v for k, v in optimizer.param_groups[0].items() if k in names and k != "params"})
    for param, other in zip(params, others, strict=True):
        keys = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
        plain.state[other] = {k: v.clone() for k, v in optimizer.state[param].items() if k in keys}
        other.grad = param.grad
    plain.step()
    return [other.detach() for other in others]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_gradient_spreads_no_further_than_under_the_base(kind: str, bad: float) -> None:
    optimizer, params = make(kind)
    past_the_cold_phase(optimizer, params)
    set_gradients(params, 1)
    assert params[0].grad is not None and params[2].grad is not None
    params[0].grad[3, 4] = bad
    params[2].grad[1, 0, 1, 1] = bad
    expected = plain_step(kind, params, optimizer)
    optimizer.step()
    for param, other in zip(params, expected, strict=True):
        assert torch.equal(param.isfinite(), other.isfinite())
    for i in (0, 2) if kind != "snr" else ():
        assert float(optimizer.state[params[i]][STATS][Stat.VALID]) == 0
        assert torch.allclose(params[i], expected[i], rtol=1e-5, atol=1e-6, equal_nan=True)
    set_gradients(params, 2)
    optimizer.step()  # goes on
    assert float(optimizer.state[params[1]][STATS][Stat.VALID]) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_at_learning_rate_zero_changes_no_weight(kind: str) -> None:
    optimizer, params = make(kind, weight_decay=0.1)
    past_the_cold_phase(optimizer, params)
    optimizer.param_groups[0]["lr"] = 0.0
    before = [param.detach().clone() for param in params]
    set_gradients(params, 1)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))


@pytest.mark.parametrize("scale", [pytest.param(1e-30, marks=pytest.mark.full), 1e30])
@pytest.mark.parametrize("kind", ["snr", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("rescale", "cap"))])
def test_weights_out_of_all_scale_stay_finite(kind: str, scale: float) -> None:
    optimizer, params = make(kind)
    past_the_cold_phase(optimizer, params)
    with torch.no_grad():
        for param in params[:2]:
            param.mul_(scale)
            for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                if name in optimizer.state[param]:
                    optimizer.state[param][name].zero_()
    for param in params:
        param.grad = torch.zeros_like(param)
    for _ in range(5):  # a leap by thirty orders of magnitude takes some steps to follow
        found = [exact(param)[1][0] for param in params[:2]]
        optimizer.step()
    for param, sigma in zip(params, found, strict=False):
        assert bool(param.isfinite().all())
        assert abs(optimizer.state[param][STATS][Stat.SIGMA] / sigma - 1) < 0.01
    if kind == "rescale":
        assert abs(exact(params[0])[1][0] / (40 / 30) ** 0.5 - 1) < 0.01


@pytest.mark.parametrize("kind", ["set", "rescale"])
def test_a_zero_weight_stays_zero(kind: str) -> None:
    optimizer, params = make(kind)
    with torch.no_grad():
        params[0].zero_()
    for param in params:
        param.grad = torch.zeros_like(param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECOPT_BACKEND", "reference")
        optimizer.step()
    past_the_cold_phase(optimizer, params[1:])
    state = optimizer.state[params[0]]
    with torch.no_grad():
        params[0].zero_()
    for name in ("exp_avg", "exp_avg_sq"):
        state[name].zero_()
    params[0].grad = torch.zeros_like(params[0])
    optimizer.param_groups[0]["max_passes"] = 2
    optimizer.step()
    assert not bool(params[0].any())


def test_gradients_in_another_order_in_memory() -> None:
    results = []
    for transposed in (False, True):
        optimizer, params = make("set")
        past_the_cold_phase(optimizer, params)
        set_gradients(params, 1)
        for param in params[:2]:
            assert param.grad is not None
            if transposed:
                param.grad = param.grad.mT.contiguous().mT
        optimizer.step()
        results.append([param.detach().clone() for param in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_weight_with_gaps_in_memory_takes_the_step_of_its_copy(momentum: float) -> None:
    results = []
    for gaps in (False, True):
        wide = torch.randn(40, 70, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        weight = wide[:, 3:63:2] if gaps else wide[:, 3:63:2].contiguous()
        param = weight.detach().requires_grad_()
        optimizer = specopt.SNRSGD([param], lr=0.1, snr_lambda=0.3, block=8)
        past_the_cold_phase(optimizer, [param])
        optimizer.param_groups[0]["momentum"] = momentum  # a buffer that our pass makes
        for step in range(1, 3):
            param.grad = None
            set_gradients([param], step)
            optimizer.step()
        results.append(param.detach().clone())
        assert not gaps or not param.is_contiguous()
    assert torch.allclose(*results, rtol=1e-5, atol=1e-6)


def test_a_frozen_weight_and_a_group_without_control() -> None:
    optimizer, params = make("set")
    free = torch.randn(12, 10, device=DEVICE).requires_grad_()
    optimizer.add_param_group({"params": [free], "spectral": False})
    past_the_cold_phase(optimizer, [*params, free])
    set_gradients([*params, free], 1)
    params[1].grad = None
    frozen, before = params[1].detach().clone(), free.detach().clone()
    optimizer.step()
    assert torch.equal(params[1], frozen) and not torch.equal(free, before)
    set_gradients([*params, free], 2)
    optimizer.step()
    assert not torch.equal(params[1], frozen)


def test_tied_weights_are_controlled_once() -> None:
    layer = torch.nn.Linear(30, 40, bias=False, device=DEVICE)
    other = torch.nn.Linear(30, 40, bias=False, device=DEVICE)
    other.weight = layer.weight
    optimizer = specopt.SNRSGD(torch.nn.ModuleList([layer, other]).parameters(), lr=0.1, momentum=0.9, block=8)
    past_the_cold_phase(optimizer, [layer.weight])
    set_gradients([layer.weight], 1)
    optimizer.step()
    assert len(optimizer._workspace["batches"][0].matrices) == 1


def test_state_tensors_put_elsewhere_are_followed() -> None:
    results = []
    for moved in (False, True):
        optimizer, params = make("set")
        past_the_cold_phase(optimizer, params)
        for step in range(1, 3):
            if moved:
                for state in optimizer.state.values():
                    state.update({k: v.clone() for k, v in state.items() if isinstance(v, Tensor)})
            set_gradients(params, step)
            optimizer.step()
        results.append([param.detach().clone() for param in params])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_a_learning_rate_on_the_device_decides_there(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, params = make("set")
    past_the_cold_phase(optimizer, params)
    monkeypatch.setattr(updates, "is_on_device", lambda value: isinstance(value, Tensor) and value.ndim == 0)
    monkeypatch.setattr(updates, "is_plain", lambda matrix: fused)
    for rate, moves in ((0.0, False), (1e-2, True)):
        optimizer.param_groups[0]["lr"] = torch.tensor(rate)
        before = [param.detach().clone() for param in params[:3]]
        set_gradients(params, 1)
        optimizer.step()
        assert all(torch.equal(a, b) != moves for a, b in zip(before, params, strict=False))
