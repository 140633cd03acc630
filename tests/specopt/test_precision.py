"""Autocast, gradient scaling and half-precision weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import specopt
from specopt.session import Gate
from specopt.tracker.common import PREFIX, STEP
from tests.specopt.helpers import DEVICE, clones, exact, set_gradients
from tests.specopt.test_state import leaves, same, small

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")
OURS: dict[str, Callable[..., Any]] = {
    "snr": lambda params, **kw: specopt.SNRSGD(params, **{"lr": 0.05, "momentum": 0.9, "block": 4, **kw}),
    "set": lambda params, **kw: specopt.NormScaleAdamW(params, **{"lr": 1e-2, "block": 4, **kw}),
    "rescale": lambda params, **kw: OURS["set"](params, mode="rescale", **kw),
    "frobenius": lambda params, **kw: OURS["set"](params, norm="frobenius", **kw),
}


SEEN = [False, True] if DEVICE.type == "cpu" else [False]
"""``fused`` where the host sees what a scaler has found."""


@pytest.fixture(params=OURS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def scaler_of(scale: float = 1024.0) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=scale)
    scaler.scale(torch.ones((), device=DEVICE))  # it is set up by its first loss
    return scaler


def give_gradients(params: list[Tensor], seed: int, scale: float = 1.0, bad: float | None = None) -> None:
    set_gradients(params, clones(params), seed)
    for param in params:
        assert param.grad is not None
        param.grad.mul_(scale)
    if bad is not None and params[0].grad is not None:
        params[0].grad[0, 0] = bad


# --- gradient scaling ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscaled", [False, True], ids=["", "unscale_ and clip"])
def test_step_under_a_scaler_equals_the_step_without_one(kind: str, unscaled: bool, fused: bool) -> None:
    results = []
    for scaler in (None, scaler_of()):
        params = small(torch.float32)
        optimizer = OURS[kind](params, fused=fused)
        for step in range(3):
            give_gradients(params, step, 1.0 if scaler is None else 1024.0)
            if scaler is not None and unscaled:
                scaler.unscale_(optimizer)
            if unscaled:
                nn.utils.clip_grad_norm_(params, 1.0)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
        results.append([param.detach() for param in params])
    assert results[0][0].isfinite().all()
    for plain, scaled in zip(*results, strict=True):  # a power of two scales without rounding
        assert torch.allclose(plain, scaled, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", SEEN)
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("unscaled", [False, True])
def test_a_step_that_a_scaler_skips_leaves_no_trace(kind: str, unscaled: bool, bad: float, fused: bool) -> None:
    results = []
    for skips in (False, True):
        params, scaler = small(torch.float32), scaler_of()
        optimizer = OURS[kind](params, fused=fused)
        for step in range(3):
            if skips:  # also before the first step, when there is no state
                give_gradients(params, 9, bad=bad)
                before = copy.deepcopy([[param.detach() for param in params], optimizer.state_dict()])
                if unscaled:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update(new_scale=1024.0)
                assert same(before, [[param.detach() for param in params], optimizer.state_dict()])
            give_gradients(params, step, 1024.0)
            scaler.step(optimizer)
            scaler.update()
        results.append([[param.detach() for param in params], optimizer.state_dict()])
    assert same(*results)


@pytest.mark.parametrize("kind", ["snr", "set"])
@pytest.mark.parametrize("fused", SEEN)
@pytest.mark.usefixtures("triton_backend")
def test_a_step_that_a_scaler_skips_leaves_no_trace_on_triton(kind: str, fused: bool) -> None:
    params, scaler = small(torch.float32)[:2], scaler_of()
    optimizer = OURS[kind](params, fused=fused, max_passes=2)
    for _ in range(2):
        give_gradients(params, 9, bad=torch.inf)
        before = copy.deepcopy([[param.detach() for param in params], optimizer.state_dict()])
        scaler.step(optimizer)
        scaler.update(new_scale=1024.0)
        assert same(before, [[param.detach() for param in params], optimizer.state_dict()])
        give_gradients(params, 0, 1024.0)
        scaler.step(optimizer)
        scaler.update()


def test_where_only_the_device_knows_that_a_step_is_skipped_nothing_moves_but_counts_on_the_host(
    kind: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = small(torch.float32)[:2]
    optimizer = OURS[kind](params, fused=True, max_passes=2)
    give_gradients(params, 0)
    optimizer.step()
    if DEVICE.type == "cpu":  # stands for a device whose numbers the host does not see
        monkeypatch.setattr(Gate, "is_shut", False)
        monkeypatch.setattr(Gate, "is_undecided", property(lambda gate: gate.found_inf is not None))
        monkeypatch.setattr(specopt.updates, "is_plain", lambda matrix: backend == "triton")
    give_gradients(params, 9, bad=torch.inf)
    before = copy.deepcopy([[param.detach() for param in params], optimizer.state_dict()["state"]])
    optimizer.found_inf, optimizer.grad_scale = (torch.ones((), device=DEVICE) for _ in range(2))
    optimizer.step()
    for state in optimizer.state.values():
        state[STEP] -= 1
        if backend == "triton" and kind in ("set", "rescale") and state["step"].device.type == "cpu":
            state["step"] -= 1  # with fused=True it lives on the device, where there is one
    assert same(before, [[param.detach() for param in params], optimizer.state_dict()["state"]])


@pytest.mark.usefixtures("triton_backend")
def test_a_momentum_buffer_made_in_a_skipped_step_holds_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    (param,) = params = small(torch.float32)[:1]
    optimizer = OURS["snr"](params, momentum=0.0, fused=True, max_passes=2)
    give_gradients(params, 0)
    optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.9
    monkeypatch.setattr(Gate, "is_shut", False)
    optimizer.found_inf, optimizer.grad_scale = (torch.ones((), device=DEVICE) for _ in range(2))
    torch.full((12, 10), torch.nan, device=DEVICE)  # what an unwritten buffer would be likely to hold
    optimizer.step()
    assert not bool(optimizer.state[param]["momentum_buffer"].any())


# --- autocast --------------------------------------------------------------------------------------------------------
def test_training_under_autocast_keeps_float32_weights_and_their_norms(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 10)).to(DEVICE)
    images, labels = torch.randn(64, 20, device=DEVICE), torch.randint(10, (64,), device=DEVICE)
    optimizer, scaler = OURS[kind](model.parameters(), block=8), scaler_of()
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(images), labels)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)  # inside, as some do
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(param.dtype == torch.float32 for param in model.parameters())
    assert_norms(kind, list(model.parameters()), torch.float32)


# --- half-precision weights ------------------------------------------------------------------------------------------
def assert_norms(kind: str, params: list[Tensor], dtype: torch.dtype) -> None:
    """One singular value at the target, up to half the tracker's tolerance of 1 %, and to what rounding the weight once
    can move it by: entries by half a last place, so singular values by no more than ``eps/2 · ‖W‖_F`` (Weyl)."""
    for weight in (param for param in params if param.ndim > 1):
        target, values = (weight.shape[0] / weight.shape[1]) ** 0.5, exact(weight)[1]
        rounding = torch.finfo(dtype).eps / 2 * float(values.norm()) + 5e-3 * target
        if kind in ("set", "rescale"):
            error = float((values - target).abs().min()) if kind == "set" else abs(float(values[0]) - target)
            assert error <= rounding
        elif kind == "frobenius":
            assert abs(float(values.norm()) - target * min(weight.flatten(1).shape) ** 0.5) <= rounding


@pytest.mark.parametrize("chance", [False, True], ids=["", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_learn_with_norms_at_their_targets(kind: str, dtype: torch.dtype, chance: bool) -> None:
    if kind == "frobenius" and chance and DEVICE.type != "cpu":
        pytest.skip("refused on a device")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 10)).to(DEVICE, dtype)
    images, labels = torch.randn(64, 20, device=DEVICE, dtype=dtype), torch.randint(10, (64,), device=DEVICE)
    more: dict[str, Any] = {} if kind == "snr" else {"eps": 1e-4}  # 1e-8 is 0 in float16
    optimizer = OURS[kind](model.parameters(), block=8, stochastic_rounding=chance, **more)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert_norms(kind, list(model.parameters()), dtype)
    own = [v for s in optimizer.state.values() for k, v in s.items() if k.startswith(PREFIX) and torch.is_tensor(v)]
    assert own and all(value.dtype == torch.float32 for value in own)
    assert all(leaf.isfinite().all() for leaf in leaves([list(model.parameters())]))


# --- TF32 ------------------------------------------------------------------------------------------------------------
def products_in() -> Any:
    """What torch makes float32 products in."""
    matmul = torch.backends.cuda.matmul
    return getattr(matmul, "fp32_precision", None) or ("tf32" if matmul.allow_tf32 else "ieee")


def test_tf32_is_for_the_base_optimizer_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, bases = [], []

    def noted(function: Callable[..., Any], notes: list[Any]) -> Callable[..., Any]:
        def noting(*args: Any, **kwargs: Any) -> Any:
            notes.append(products_in())
            return function(*args, **kwargs)

        return noting

    params = small(torch.float32)
    optimizer = OURS[kind](params)
    cls = specopt.control.SpectralOptimizer
    monkeypatch.setattr(cls, "_sessions", noted(cls._sessions, ours))
    monkeypatch.setattr(cls, "_finish", noted(cls._finish, ours))
    monkeypatch.setattr(specopt.control, "base_updates_", noted(specopt.control.base_updates_, ours))
    monkeypatch.setattr(specopt.control, "penalized", noted(specopt.control.penalized, ours))
    monkeypatch.setattr(cls, "_base_step", noted(cls._base_step, bases))
    torch.set_float32_matmul_precision("high")
    try:
        give_gradients(params, 0)
        optimizer.step()
        after = products_in()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(ours) >= 3 and set(ours) == {"ieee"}
    assert bases == ["tf32"] and after == "tf32"
