"""wrap() and unwrap(): the same object under a rule, and whoever holds it notices nothing else."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, StepLR

import specopt
from specopt.tracker.common import STATS, STEP
from tests.specopt.helpers import clones, equal, exact, parameters, set_gradients, step_at_scale, train
from tests.specopt.wrapped import PENALTY, SET, Bare

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "base",
    [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, {"maximize": True}],
    ids=str,
)
def test_wrapped_sgd_and_snr_sgd_agree_bit_for_bit(base: dict[str, Any], dtype: torch.dtype) -> None:
    params, others = parameters(dtype), parameters(dtype)
    wrapped = specopt.wrap(SGD(params, lr=0.1, **base), PENALTY)
    ours = specopt.SNRSGD(others, lr=0.1, snr_lambda=0.3, **base)
    train(wrapped, params, range(5))
    train(ours, others, range(5))
    assert equal(params, others)


@pytest.mark.parametrize("base", [{}, {"amsgrad": True, "weight_decay": 0.1}], ids=str)
def test_wrapped_adamw_and_norm_scale_adamw_agree_bit_for_bit(base: dict[str, Any]) -> None:
    params, others = parameters(torch.float32), parameters(torch.float32)
    train(specopt.wrap(AdamW(params, lr=1e-2, **base), SET), params, range(5))
    train(specopt.NormScaleAdamW(others, lr=1e-2, **base), others, range(5))
    assert equal(params, others)


@pytest.mark.parametrize("rule", [PENALTY, SET], ids=str)
@pytest.mark.parametrize("base", [SGD, AdamW])
def test_passes_of_ours_make_the_update_of_torchs_own_classes_alone(
    base: Callable[..., Optimizer], rule: specopt.NormScale | specopt.SpectralPenalty, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    function: Any = getattr(base, "step")  # noqa: B009 -- torch's wrapper of it, whatever its type

    class Own(base):  # type: ignore[misc, valid-type]
        def step(self, closure: Any = None) -> Any:
            seen.append(sum(p.grad is not None for group in self.param_groups for p in group["params"]))
            return function(self, closure)

    params = parameters(torch.float32)
    train(specopt.wrap(Own(params, lr=1e-2), rule), params, range(1))
    assert seen == [len(params)]
    optimizer = specopt.wrap(base(parameters(torch.float32), lr=1e-2), rule)
    assert type(optimizer).base_is_known  # type: ignore[attr-defined]


def test_the_same_object_comes_back_and_is_what_it_was_to_isinstance() -> None:
    plain = AdamW(parameters(torch.float32))
    state, groups, name = plain.state, plain.param_groups, type(plain).__name__
    optimizer = specopt.wrap(plain, SET)
    assert optimizer is plain and isinstance(plain, AdamW) and type(plain).__name__ == name
    assert plain.state is state and plain.param_groups is groups
    assert repr(plain).startswith("AdamW (") and "target: channels" in repr(plain)
    assert plain.rule == SET  # type: ignore[attr-defined]


@pytest.mark.parametrize("before", [True, False])
def test_schedulers_made_before_and_after_work_alike(before: bool) -> None:
    def scheduled(optimizer: Optimizer) -> LRScheduler:
        return LambdaLR(optimizer, lambda epoch: 0.5**epoch)

    params, others = parameters(torch.float32), parameters(torch.float32)
    optimizer: Optimizer = SGD(params, lr=0.1)
    scheduler = scheduled(optimizer) if before else None
    specopt.wrap(optimizer, PENALTY)
    scheduler = scheduler or scheduled(optimizer)
    ours = specopt.SNRSGD(others, lr=0.1, snr_lambda=0.3)
    expected = scheduled(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the scheduler's own, where it has not seen the step
        for step in range(3):
            train(optimizer, params, range(step, step + 1))
            scheduler.step()
            train(ours, others, range(step, step + 1))
            expected.step()
    assert equal(params, others)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0125)


def test_scheduler_still_warns_where_the_step_was_left_out() -> None:
    optimizer = SGD(parameters(torch.float32), lr=0.1)
    scheduler = StepLR(optimizer, 1)
    specopt.wrap(optimizer, PENALTY)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


@pytest.mark.parametrize("before", [True, False])
def test_unwrapped_optimizer_keeps_its_scheduler(before: bool) -> None:
    params = parameters(torch.float32)
    optimizer = SGD(params, lr=0.1)
    if before:
        scheduler: LRScheduler = StepLR(optimizer, 1)
        specopt.wrap(optimizer, PENALTY)
    else:
        specopt.wrap(optimizer, PENALTY)
        scheduler = StepLR(optimizer, 1)
    specopt.unwrap(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, params, range(1))
        scheduler.step()
    assert not any(STATS in state for state in optimizer.state.values())


def test_a_scheduler_keeps_no_wrapped_optimizer_alive() -> None:
    optimizer = SGD(parameters(torch.float32), lr=0.1)
    StepLR(optimizer, 1)
    specopt.wrap(optimizer, PENALTY)
    watch = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert watch() is None


def test_hooks_registered_before_and_after_run_once() -> None:
    params = parameters(torch.float32)
    optimizer = SGD(params, lr=0.1)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    specopt.wrap(optimizer, PENALTY)
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    SGD(parameters(torch.float32))
    train(optimizer, params, range(2))
    assert calls == ["pre", "post"] * 2
    specopt.unwrap(optimizer)
    train(optimizer, params, range(1))
    assert calls == ["pre", "post"] * 3


def test_closure_is_called_once_and_gives_the_gradients_of_the_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 90), nn.Tanh(), nn.Linear(90, 3))
    twin = copy.deepcopy(model)
    images = torch.randn(16, 80)
    optimizer = specopt.wrap(torch.optim.RMSprop(model.parameters(), lr=1e-3), PENALTY)
    other = specopt.wrap(torch.optim.RMSprop(twin.parameters(), lr=1e-3), PENALTY)
    calls: list[float] = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(images).square().mean()
        loss.backward()
        calls.append(loss.item())
        return calls[-1]

    for step in range(3):
        assert optimizer.step(closure) == calls[-1] and len(calls) == step + 1
        other.zero_grad()
        twin(images).square().mean().backward()
        other.step()
    assert equal(list(model.parameters()), list(twin.parameters()))


@pytest.mark.parametrize("rule", [PENALTY, SET], ids=str)
def test_groups_added_later_are_under_the_rule(rule: Any) -> None:
    params = parameters(torch.float32)
    optimizer = specopt.wrap(torch.optim.RMSprop(params[:2], lr=1e-3), rule)
    train(optimizer, params[:2], range(2))
    optimizer.add_param_group({"params": params[2:4]})
    optimizer.add_param_group({"params": params[4:], "spectral": False})
    train(optimizer, params, range(2, 4))
    assert [optimizer.state[param].get(STEP) for param in params[:5]] == [4, 4, 2, 2, None]
    with pytest.raises(ValueError, match="tolerance must be"):
        optimizer.add_param_group({"params": clones(params), "tolerance": -1})


def test_options_that_a_group_has_already_stay() -> None:
    params = parameters(torch.float32)
    groups: list[dict[str, Any]] = [
        {"params": params[:1], "target": 3.0, "mode": "rescale"},
        {"params": params[1:2], "spectral": False},
    ]
    optimizer = specopt.wrap(AdamW([*groups, {"params": params[2:]}], lr=1e-3), SET)
    assert [group["target"] for group in optimizer.param_groups] == [3.0, "channels", "channels"]
    train(optimizer, params, range(1))
    assert float(exact(params[0])[1][0]) == pytest.approx(3.0, rel=1e-3)
    assert STATS not in optimizer.state[params[1]]


def test_report_knows_wrapped_optimizers() -> None:
    model = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 3))
    rows = specopt.spectral_report(specopt.wrap(torch.optim.RMSprop(model.named_parameters()), SET))
    assert [row.name for row in rows] == ["0.weight", "1.weight"]
    assert rows[1].target == pytest.approx((3 / 9) ** 0.5)


@pytest.mark.parametrize("base", [AdamW, torch.optim.RMSprop])
def test_scaler_that_found_inf_changes_nothing(base: Any) -> None:
    for options in ({}, {"fused": True}) if base is AdamW else ({},):
        params = [param for param in parameters(torch.float32) if param.is_contiguous()]
        optimizer = specopt.wrap(base(params, lr=1e-2, **options), PENALTY)
        train(optimizer, params, range(1))
        before, blocks = clones(params), [optimizer.state[p][STATS].clone() for p in params[:3]]
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.ones(()))
        set_gradients(params, clones(params), seed=1)
        assert params[0].grad is not None
        params[0].grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        assert equal(params, before)
        assert equal([optimizer.state[p][STATS] for p in params[:3]], blocks)


def test_scaled_gradients_of_a_fused_base_get_the_penalty_at_their_scale() -> None:
    runs = []
    for scale in (None, 64.0):
        params = parameters(torch.float32)
        rule = specopt.SpectralPenalty(0.5, tolerance=1e-6, max_passes=100)
        optimizer = specopt.wrap(torch.optim.Adagrad(params, lr=0.1, fused=True), rule)
        step_at_scale(optimizer, params, scale)
        runs.append(params)
    for mine, other in zip(*runs, strict=True):
        assert torch.allclose(mine, other, rtol=1e-5, atol=1e-6)


class Watchful(Optimizer):
    """Gradient descent that makes its state where it finds none, each in another way, and trips over any other's."""

    def __init__(self, params: Any, way: str) -> None:
        super().__init__(params, {"lr": 0.1})
        self.way = way

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for param in group["params"]:
                new = param not in self.state if self.way == "absent" else len(self.state[param]) == 0
                if self.way == "replaced":
                    self.state[param] = {"count": self.state[param].get("count", 0)}
                elif new:
                    self.state[param]["count"] = 0
                assert set(self.state[param]) == {"count"}
                self.state[param]["count"] += 1
                param.sub_(param.grad, alpha=group["lr"])
                param.grad.neg_()


@pytest.mark.parametrize("rule", [PENALTY, SET], ids=str)
@pytest.mark.parametrize("way", ["absent", "empty", "replaced"])
def test_base_sees_no_state_but_its_own(way: str, rule: Any) -> None:
    params = parameters(torch.float32)
    optimizer = specopt.wrap(Watchful(params, way), rule)
    train(optimizer, params, range(3))
    for param in params:
        assert optimizer.state[param]["count"] == 3
        assert param.ndim == 1 or optimizer.state[param][STEP] == 3


def test_state_of_ours_is_put_back_when_the_base_fails() -> None:
    params = parameters(torch.float32)
    optimizer = specopt.wrap(Watchful(params, "empty"), PENALTY)
    train(optimizer, params, range(1))
    grads = [param.grad for param in params]
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(TypeError):
        optimizer.step()
    assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))
    assert STATS in optimizer.state[params[0]] and optimizer.state[params[0]]["count"] >= 1


def test_optimizer_without_a_learning_rate_is_under_the_rule() -> None:
    params = parameters(torch.float32)
    optimizer = specopt.wrap(torch.optim.RMSprop(params), specopt.NormScale(mode="rescale"))
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(1e-3)
    train(optimizer, params, range(1))
    bare = specopt.wrap(Bare(params), specopt.NormScale(mode="rescale", target=2.0))
    train(bare, params, range(1))
    assert float(exact(params[0])[1][0]) == pytest.approx(2.0, rel=1e-3)


def test_a_step_that_accelerate_has_put_back_does_not_bypass_the_rule() -> None:
    params = parameters(torch.float32)
    optimizer = SGD(params, lr=0.1)
    optimizer.step = optimizer.step  # type: ignore[method-assign]  # a bound method of the class, on the object
    specopt.wrap(optimizer, PENALTY)
    train(optimizer, params, range(1))
    assert optimizer.state[params[0]][STEP] == 1
