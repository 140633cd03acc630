"""All of torch's schedulers, and averages of weights, on a controlled optimizer."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler, swa_utils

import specopt
from tests.specopt.helpers import DEVICE, exact, set_gradients

pytestmark = [
    pytest.mark.filterwarnings("ignore:the first step moves"),
    pytest.mark.filterwarnings("ignore:The epoch parameter in"),  # SequentialLR's own call
]
KINDS = ["snr", "set"]
EPOCHS = 12
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda e: 0.9**e, lambda e: 0.5]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda e: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=1e-8),  # a warm-up from next to nothing
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),  # to 0, and up again
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 0.05, step_size_up=3, cycle_momentum=True),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.05], total_steps=EPOCHS + 1),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=4),
}


def params_of(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(12, 10), (9, 14), (6, 2, 2, 2), (5,)]
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_() for shape in shapes]


def groups(params: list[Tensor]) -> list[dict[str, Any]]:
    return [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]


def ours(kind: str, params: Any, lr: Any = 0.05, **more: Any) -> Any:
    if kind == "snr":
        return specopt.SNRSGD(params, lr=lr, momentum=0.9, **more)
    return specopt.NormScaleAdamW(params, lr=lr, mode="rescale", **more)


def plain(kind: str, params: Any, lr: Any = 0.05, **more: Any) -> Optimizer:
    if kind == "snr":
        return torch.optim.SGD(params, lr=lr, momentum=0.9, **more)
    return torch.optim.AdamW(params, lr=lr, **more)


def at_target(param: Tensor) -> bool:
    return float(exact(param)[1][0]) == pytest.approx((param.shape[0] / param.shape[1]) ** 0.5, rel=1e-4)


def test_no_scheduler_of_torch_is_left_out() -> None:
    abstract = {"LRScheduler", "_LRScheduler"}
    kinds = (lr_scheduler.LRScheduler, lr_scheduler.ReduceLROnPlateau)
    found = {name for name, c in vars(lr_scheduler).items() if inspect.isclass(c) and issubclass(c, kinds)} - abstract
    assert found <= SCHEDULERS.keys()


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tensor", [False, True], ids=["", "tensor lr"])
def test_learning_rates_run_as_on_the_base_and_weights_stay_controlled(kind: str, name: str, tensor: bool) -> None:
    lr = torch.tensor(0.05) if tensor else 0.05
    params, others = params_of(), params_of()
    optimizers = (
        ours(kind, groups(params), lr, foreach=False),
        plain(kind, groups(others), copy.deepcopy(lr), foreach=False),
    )
    schedulers = [SCHEDULERS[name](optimizer) for optimizer in optimizers]
    for epoch in range(EPOCHS):
        set_gradients(params, others, seed=epoch)
        before = [param.detach().clone() for param in params]
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            *_, rate = [float(group["lr"]) for group in optimizer.param_groups]
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        first, second = ([dict(group, params=[]) for group in optimizer.param_groups] for optimizer in optimizers)
        assert all(
            mine[key] == value for mine, other in zip(first, second, strict=True) for key, value in other.items()
        )
        if kind == "set":
            moved = [not torch.equal(param, old) for param, old in zip(params, before, strict=True)]
            assert at_target(params[2]) if rate > 0 else not moved[2]
    assert all(bool(param.isfinite().all()) for param in params)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scheduler_goes_on_after_both_states_were_loaded(kind: str) -> None:
    params = params_of()
    optimizer = ours(kind, params)
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)
    for step in range(5):
        set_gradients(params, params_of(), seed=step)
        optimizer.step()
        scheduler.step()
    others = [param.detach().clone().requires_grad_() for param in params]
    resumed = ours(kind, others)
    after = lr_scheduler.OneCycleLR(resumed, 0.1, total_steps=20)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    after.load_state_dict(scheduler.state_dict())
    for step in range(5, 9):
        set_gradients(params, others, seed=step)
        for each, its in ((optimizer, scheduler), (resumed, after)):
            each.step()
            its.step()
    assert optimizer.param_groups[0]["lr"] == resumed.param_groups[0]["lr"]
    assert all(torch.equal(param, other) for param, other in zip(params, others, strict=True))


# --- averages of weights ---------------------------------------------------------------------------------------------
def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 80), nn.BatchNorm1d(80), nn.Tanh(), nn.Linear(80, 75)).to(DEVICE)


def epoch(model: nn.Module, optimizer: Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(16, 20, generator=generator).to(DEVICE)).square().mean().backward()
        optimizer.step()


AVERAGES: dict[str, Callable[[nn.Module], swa_utils.AveragedModel]] = {
    "SWA": swa_utils.AveragedModel,
    "EMA": lambda model: swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9)),
}


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_averaging_sees_controlled_weights_and_leaves_training_alone(kind: str, average: str) -> None:
    results = []
    for averaged in (False, True):
        model = model_of()
        optimizer = ours(kind, model.parameters())
        scheduler = swa_utils.SWALR(optimizer, swa_lr=0.01)
        follower = AVERAGES[average](model)
        for step in range(4):
            epoch(model, optimizer, step)
            if averaged:
                follower.update_parameters(model)
                scheduler.step()
            else:
                scheduler.step()
        if averaged:
            data = torch.randn(32, 20, generator=torch.Generator().manual_seed(9)).to(DEVICE)
            swa_utils.update_bn([data[:16], data[16:]], follower)
            assert bool(follower(data).isfinite().all())
            weight = follower.module[0].weight
            assert kind == "snr" or float(exact(weight)[1][0]) <= 2.0 * 1.001  # an average is no longer than its parts
        results.append([param.detach() for param in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_tracker_follows_when_averaged_weights_are_swapped_in_and_out(kind: str) -> None:
    model = model_of()
    optimizer = ours(kind, model.parameters())
    follower = AVERAGES["EMA"](model)
    for step in range(3):
        epoch(model, optimizer, step)
        follower.update_parameters(model)
        kept = copy.deepcopy(model.state_dict())
        model.load_state_dict(follower.module.state_dict())
        if step == 1:
            epoch(model, optimizer, 10)  # on the averaged weights
            rows = specopt.spectral_report(optimizer)
            for row, layer in zip(rows, (model[0], model[3]), strict=True):
                assert row.sigma == pytest.approx(float(exact(layer.weight)[1][0]), rel=1e-3)
                assert kind == "snr" or row.sigma == pytest.approx(row.target, rel=1e-3)
        model.load_state_dict(kept)
    epoch(model, optimizer, 3)
    assert kind == "snr" or (at_target(model[0].weight) and at_target(model[3].weight))
