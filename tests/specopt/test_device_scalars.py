"""What a step on a GPU reads there and not on the host: a gradient scaler's flag and scale, a learning rate."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import specopt
from specopt import updates
from specopt.session import Gate
from specopt.tracker.common import BLOCK, RIGHT, STATS
from tests.specopt.device_steps import make, past_the_cold_phase, set_gradients
from tests.specopt.helpers import DEVICE

pytestmark = [
    pytest.mark.filterwarnings("ignore:the first step moves"),
    pytest.mark.usefixtures("triton_backend"),
]


@pytest.mark.parametrize("kind", ["snr", "set"])
def test_where_a_scaler_found_an_infinity_nothing_moves(kind: str) -> None:
    optimizer, params = make(kind, fused=True)
    past_the_cold_phase(optimizer, params)
    key = RIGHT if kind == "snr" else BLOCK
    before = [param.detach().clone() for param in params]
    blocks = [optimizer.state[param][key].clone() for param in params if key in optimizer.state[param]]
    stats = [optimizer.state[param][STATS].clone() for param in params[:3]]
    set_gradients(params, 1)
    optimizer.found_inf, optimizer.grad_scale = torch.ones((), device=DEVICE), torch.ones((), device=DEVICE)
    optimizer.step()
    after = [optimizer.state[param][key] for param in params if key in optimizer.state[param]]
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
    assert len(blocks) == 2 and all(torch.equal(a, b) for a, b in zip(blocks, after, strict=True))
    assert all(torch.equal(a, optimizer.state[p][STATS]) for a, p in zip(stats, params, strict=False))


@pytest.fixture
def undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the device knows whether a step is to be skipped, wherever its flag lies."""
    monkeypatch.setattr(Gate, "is_undecided", property(lambda gate: gate.found_inf is not None))
    monkeypatch.setattr(Gate, "is_shut", property(lambda gate: False))


def scaled_step(optimizer: Any, found_inf: float) -> None:
    """As a gradient scaler makes it with ``fused=True``."""
    optimizer.found_inf = torch.full((), found_inf, device=DEVICE)
    optimizer.grad_scale = torch.ones((), device=DEVICE)
    optimizer.step()


@pytest.mark.usefixtures("undecided")
def test_a_first_step_that_is_skipped_gives_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    weight = torch.nn.init.orthogonal_(torch.empty(72, 72)).to(DEVICE).requires_grad_()
    optimizer = specopt.NormScaleAdamW([weight], lr=1e-3, block=8, max_passes=1, fused=True)
    before = weight.detach().clone()
    set_gradients([weight], 1)
    scaled_step(optimizer, found_inf=1.0)
    scaled_step(optimizer, found_inf=1.0)
    assert torch.equal(before, weight)
    assert not [warning for warning in recwarn if "the first step moves" in str(warning.message)]


FIRST_SGD: dict[str, Callable[[list[Tensor]], Any]] = {
    "snr": lambda params: specopt.SNRSGD(params, lr=0.1, momentum=0.9, block=8, max_passes=1, fused=True),
    "dampening": lambda params: specopt.SNRSGD(
        params, lr=0.1, momentum=0.9, dampening=0.5, block=8, max_passes=1, fused=True
    ),
    "wrapped": lambda params: specopt.wrap(
        torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=True), specopt.NormScale(mode="cap", block=8, max_passes=1)
    ),
}


@pytest.mark.usefixtures("undecided")
@pytest.mark.parametrize("kind", FIRST_SGD)
def test_a_first_step_that_is_skipped_leaves_no_garbage_in_momentum_buffers(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "empty_like", lambda like, **kwargs: torch.full_like(like, torch.nan, **kwargs))
    found = []
    for flags in ([0.0], [1.0], [1.0, 0.0]):
        params = [torch.nn.init.orthogonal_(torch.empty(9, 6)).to(DEVICE).requires_grad_()]
        params.append(torch.ones(5, device=DEVICE, requires_grad=True))
        optimizer = FIRST_SGD[kind](params)
        for flag in flags:
            set_gradients(params, 1)
            scaled_step(optimizer, flag)
        assert all(param.isfinite().all() for param in params)
        found.append([optimizer.state[param]["momentum_buffer"].clone() for param in params])
    first, skipped, second = found
    damped = 0.5 if kind == "dampening" else 1.0
    assert not any(buffer.any() for buffer in skipped)
    assert torch.equal(second[1], damped * first[1])
    assert torch.equal(first[1], params[1].grad)


@pytest.mark.parametrize("kind", ["snr", "set"])
def test_gradients_still_scaled_give_the_step_of_plain_ones(kind: str) -> None:
    results = []
    for scale in (1.0, 1024.0):
        optimizer, params = make(kind, fused=True)
        past_the_cold_phase(optimizer, params)
        set_gradients(params, 1, scale=0.1 * scale)
        optimizer.found_inf = torch.zeros((), device=DEVICE)
        optimizer.grad_scale = torch.full((), scale, device=DEVICE)
        optimizer.step()
        results.append([param.detach().clone() for param in params])
    for plain, scaled in zip(*results, strict=True):
        assert torch.allclose(plain, scaled, rtol=1e-5, atol=1e-6)


TORCH_SGD = sys.modules["torch.optim.sgd"]


def tensor_rate(params: list[Tensor], lr: float | Tensor, **more: Any) -> Any:
    return specopt.SNRSGD(params, lr=lr, momentum=0.9, weight_decay=0.1, block=8, max_passes=1, **more)


def wrapped_rate(params: list[Tensor], lr: float | Tensor, **more: Any) -> Any:
    base = torch.optim.SGD(params, lr=lr, momentum=0.9, nesterov=True, **more)
    return specopt.wrap(base, specopt.NormScale(mode="cap", block=8, max_passes=1))


@pytest.mark.parametrize("make_one", [tensor_rate, wrapped_rate])
def test_a_learning_rate_on_the_device_is_not_read_back(
    make_one: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(updates, "is_on_device", lambda value: isinstance(value, Tensor))
    weight, results = torch.nn.init.orthogonal_(torch.empty(9, 6)), []
    for lr in (0.1, torch.tensor(0.1, device=DEVICE)):
        params = [weight.clone().to(DEVICE).requires_grad_()]
        params.append(torch.ones(5, device=DEVICE, requires_grad=True))
        optimizer = make_one(params, lr)
        for step in range(3):
            set_gradients(params, step)
            with monkeypatch.context() as patch:
                if isinstance(lr, Tensor):
                    for name in ("_single_tensor_sgd", "_multi_tensor_sgd"):
                        patch.setattr(TORCH_SGD, name, reads_back)
                optimizer.step()
        assert optimizer.param_groups[0]["fused"] is None and optimizer.param_groups[0]["foreach"] is None
        results.append([t for param in params for t in (param.detach(), optimizer.state[param]["momentum_buffer"])])
    for plain, on_device in zip(*results, strict=True):
        assert torch.allclose(plain, on_device, rtol=1e-6, atol=1e-7)


def reads_back(*_: Any, **__: Any) -> None:
    raise AssertionError("torch's SGD reads a learning rate in a tensor back")


@pytest.mark.parametrize("asked", [{"foreach": False}, {"fused": False}])
def test_a_base_step_that_was_asked_for_is_made(asked: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "is_on_device", lambda value: isinstance(value, Tensor))
    params = [torch.ones(5, device=DEVICE, requires_grad=True)]
    optimizer = tensor_rate(params, torch.tensor(0.1, device=DEVICE), **asked)
    set_gradients(params, 1)
    monkeypatch.setattr(TORCH_SGD, "_fused_sgd", reads_back)
    optimizer.step()
    assert all(optimizer.param_groups[0][name] is value for name, value in asked.items())
