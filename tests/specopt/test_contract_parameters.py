"""Parameters and groups of every kind that torch.optim takes: what is controlled, and what is left to the base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import specopt
from specopt.tracker.common import PREFIX, STATS, STEP
from tests.specopt.helpers import DEVICE, clones, equal, exact, parameters, set_gradients

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")
OURS: dict[str, Callable[..., Any]] = {
    "snr": lambda params, **kw: specopt.SNRSGD(params, **{"lr": 0.1, "momentum": 0.9, "block": 4, **kw}),
    "rescale": lambda params, **kw: specopt.NormScaleAdamW(params, **{"lr": 1e-2, "mode": "rescale", "block": 4, **kw}),
}
PLAIN: dict[str, Callable[..., Optimizer]] = {
    "snr": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "rescale": lambda params: torch.optim.AdamW(params, lr=1e-2),
}


@pytest.fixture(params=OURS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def random(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(DEVICE)


def several(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = [(12, 10), (9, 14), (6, 2, 2, 2), (3, 4), (5,)]
    return [random(shape, i).to(dtype).requires_grad_() for i, shape in enumerate(shapes)]


def at_target(param: Tensor, rel: float = 1e-4) -> bool:
    return float(exact(param)[1][0]) == pytest.approx((param.shape[0] / param.shape[1]) ** 0.5, rel=rel)


# --- what is left to the base ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters_are_the_bases_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    mine, other = ([random((6, 5), 1, dtype).requires_grad_(), random((4,), 2, dtype).requires_grad_()] for _ in "ab")
    optimizer, plain = OURS[kind](mine), PLAIN[kind](other)
    for step in range(3):
        for params in (mine, other):
            for param in params:
                param.grad = random(tuple(param.shape), 10 + step, dtype)
        optimizer.step()
        plain.step()
    assert equal(mine, other)
    assert specopt.spectral_report(optimizer) == []


def test_a_sparse_gradient_of_a_controlled_weight_is_refused_before_anything_moves() -> None:
    table, layer = nn.Embedding(10, 4, sparse=True).to(DEVICE), nn.Linear(4, 3).to(DEVICE)
    optimizer = OURS["snr"]([*table.parameters(), *layer.parameters()])
    layer(table(torch.tensor([1, 2], device=DEVICE))).sum().backward()
    before = [p.detach().clone() for p in (*table.parameters(), *layer.parameters())]
    with pytest.raises(RuntimeError, match=r"shape \(10, 4\).*sparse gradient.*spectral=False"):
        optimizer.step()
    assert equal(before, [p.detach() for p in (*table.parameters(), *layer.parameters())])
    assert not any(key.startswith(PREFIX) for state in optimizer.state.values() for key in state)


@pytest.mark.parametrize("off", [{"spectral": False}, {"snr_lambda": 0.0}], ids=str)
def test_a_sparse_gradient_outside_control_is_handled_as_the_base_handles_it(off: dict[str, Any]) -> None:
    results = []
    for ours in (False, True):
        torch.manual_seed(0)
        table, layer = nn.Embedding(10, 4, sparse=True).to(DEVICE), nn.Linear(4, 3).to(DEVICE)
        groups = [{"params": table.parameters(), **off}, {"params": layer.parameters(), "snr_lambda": 0.0}]
        optimizer = OURS["snr"](groups) if ours else torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        for step in range(3):
            optimizer.zero_grad()
            layer(table(torch.tensor([step, 2], device=DEVICE))).square().sum().backward()
            optimizer.step()
        results.append([param.detach() for param in (*table.parameters(), *layer.parameters())])
    assert equal(*results)
    adamw = OURS["rescale"]([{"params": table.parameters(), "spectral": False}])
    with pytest.raises(RuntimeError, match="Adam does not support sparse gradients"):
        adamw.step()


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,), (0, 3, 2, 2)])
def test_empty_parameters_are_taken_along(kind: str, shape: tuple[int, ...]) -> None:
    empty, weight = torch.zeros(shape, device=DEVICE).requires_grad_(), several()[0]
    optimizer = OURS[kind]([empty, weight])
    for step in range(2):
        set_gradients([empty, weight], [empty, weight], step)
        optimizer.step()
    assert empty.shape == shape and STATS not in optimizer.state[empty]
    assert optimizer.state[weight][STEP] == 2 and (kind == "snr" or at_target(weight))


# --- what the weights may be -----------------------------------------------------------------------------------------
def test_tied_weights_are_controlled_once(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10, bias=False), nn.Tanh(), nn.Linear(10, 12, bias=False)).to(DEVICE)
    model[2].weight = nn.Parameter(model[0].weight.detach().clone().T.contiguous())
    tied = nn.ModuleList([model, nn.Linear(12, 10, bias=False)])
    tied[1].weight = model[0].weight
    optimizer = OURS[kind](tied.named_parameters())
    model(random((8, 12))).square().mean().backward()
    optimizer.step()
    assert [row.name for row in specopt.spectral_report(optimizer)] == ["0.0.weight", "0.2.weight"]
    assert optimizer.state[model[0].weight][STEP] == 1


def test_a_part_frozen_and_thawed_during_training(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 12)).to(DEVICE)
    optimizer = OURS[kind](model.parameters())
    counts = []
    for step in range(6):
        model[0].requires_grad_(step not in (2, 3))
        frozen = model[0].weight.detach().clone()
        optimizer.zero_grad()
        model(random((8, 12), step)).square().mean().backward()
        optimizer.step()
        assert torch.equal(frozen, model[0].weight) == (step in (2, 3))
        counts.append(optimizer.state[model[0].weight][STEP])
    assert counts == [1, 2, 2, 2, 3, 4]
    assert kind == "snr" or at_target(model[0].weight)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.bfloat16, torch.float32, torch.float16)])
def test_dtypes_side_by_side_take_the_steps_they_take_alone(kind: str, dtypes: tuple[torch.dtype, ...]) -> None:
    more = {} if kind == "snr" else {"eps": 1e-3}  # float16 has no 1e-8
    together, alone = ([several(dtype) for dtype in dtypes] for _ in "ab")
    first = [OURS[kind]([param for params in together for param in params], **more)]
    each = [OURS[kind](params, **more) for params in alone]
    for step in range(3):
        for params, others in zip(together, alone, strict=True):
            set_gradients(params, others, step)
        for optimizer in (*first, *each):
            optimizer.step()
    assert all(equal(params, others) for params, others in zip(together, alone, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device beside the CPU")
def test_two_devices_side_by_side_take_the_steps_they_take_alone(kind: str) -> None:
    def split() -> tuple[list[Tensor], list[Tensor]]:
        return [p.detach().cpu().requires_grad_() for p in several()], several()

    together, alone = split(), split()
    first, each = OURS[kind]([*together[0], *together[1]]), [OURS[kind](params) for params in alone]
    for step in range(3):
        for params, others in zip(together, alone, strict=True):
            for param, other in zip(params, others, strict=True):
                param.grad = random(tuple(param.shape), step).to(param)
                other.grad = param.grad.clone()
        for optimizer in (first, *each):
            optimizer.step()
    assert all(equal(params, others) for params, others in zip(together, alone, strict=True))


def test_parameters_replaced_in_their_group_are_controlled_from_then_on(kind: str) -> None:
    params, others = several(), several()
    optimizer = OURS[kind](params)  # as wrappers do that shard a model after its optimizer was built
    for step in range(4):
        set_gradients(params, others, step)
        if step == 2:
            optimizer.param_groups[0]["params"] = others
        optimizer.step()
    assert optimizer.state[params[0]][STEP] == optimizer.state[others[0]][STEP] == 2
    assert kind == "snr" or at_target(others[0])


def test_a_state_that_was_cleared_starts_cold(kind: str) -> None:
    params = several()
    optimizer = OURS[kind](params)
    for step in range(4):
        if step == 2:
            optimizer.state.clear()
        set_gradients(params, params, step)
        optimizer.step()
    assert optimizer.state[params[0]][STEP] == 2


def test_a_step_without_any_gradient_changes_nothing(kind: str) -> None:
    params = several()
    optimizer = OURS[kind](params)
    before = [param.detach().clone() for param in params]
    optimizer.step()
    assert equal(before, [param.detach() for param in params]) and not optimizer.state


# --- groups ----------------------------------------------------------------------------------------------------------
def test_groups_with_options_of_their_own_take_the_steps_they_take_alone(kind: str) -> None:
    options: list[dict[str, Any]] = [
        {"lr": 0.02, "weight_decay": 0.1, "block": 3},
        {"maximize": True, "tolerance": 1e-3, "snr_lambda": 0.5} if kind == "snr" else {"mode": "cap", "target": 1.5},
        {"spectral": False},
        {"nesterov": True} if kind == "snr" else {"norm": "frobenius", "mode": "set", "amsgrad": True},
    ]
    together, alone = several()[:4], several()[:4]
    groups = [{"params": [param], **more} for param, more in zip(together, options, strict=True)]
    first = OURS[kind](groups)
    each = [OURS[kind]([param], **more) for param, more in zip(alone, options, strict=True)]
    for step in range(3):
        set_gradients(together, alone, step)
        for optimizer in (first, *each):
            optimizer.step()
    assert equal(together, alone)


def test_options_changed_between_steps_hold_from_the_next_step_on(kind: str) -> None:
    params, others = several(), several()
    optimizer, twin = OURS[kind](params), OURS[kind](others)
    change: dict[str, Any] = {"snr_lambda": 0.7, "momentum": 0.5} if kind == "snr" else {"target": 2.0, "lr": 0.05}
    for step in range(4):
        set_gradients(params, others, step)
        if step == 2:
            optimizer.param_groups[0].update(change)
            state = twin.state_dict()
            twin = OURS[kind](others, **change)
            twin.load_state_dict({**state, "param_groups": twin.state_dict()["param_groups"]})
        optimizer.step()
        twin.step()
    assert equal(params, others)


@pytest.mark.parametrize("to_none", [False, True])
def test_zero_grad_leaves_the_same_steps_either_way(kind: str, to_none: bool) -> None:
    results = []
    for setting in (True, to_none):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 12)).to(DEVICE)
        optimizer = OURS[kind](model.parameters())
        for step in range(4):
            optimizer.zero_grad(set_to_none=setting)
            assert all((param.grad is None) == setting or step == 0 for param in model.parameters())
            model(random((8, 12), step)).square().mean().backward()
            optimizer.step()
        results.append([param.detach() for param in model.parameters()])
    assert equal(*results)


# --- the object ------------------------------------------------------------------------------------------------------
def test_repr_and_defaults_show_every_option_of_ours(kind: str) -> None:
    optimizer = OURS[kind](several())
    for name in optimizer.rule.names:
        assert name in optimizer.defaults and f"{name}: {optimizer.defaults[name]}" in repr(optimizer)


def test_hooks_of_all_optimizers_run_once_a_step(kind: str) -> None:
    params = several()
    optimizer, calls = OURS[kind](params), []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("post")),
    ]
    try:
        set_gradients(params, params, 0)
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["pre", "post"]


def test_a_hook_that_clamps_weights_after_each_step_is_followed() -> None:
    params = several()
    optimizer = OURS["snr"](params)
    optimizer.register_step_post_hook(lambda *_: [p.detach().clamp_(-0.5, 0.5) for p in params])
    for step in range(6):
        before = [float(exact(param)[1][0]) for param in params[:4]]
        set_gradients(params, params, step)
        optimizer.step()
    found = [float(optimizer.state[param][STATS][0]) for param in params[:4]]
    assert found == pytest.approx(before, rel=1e-2)


def test_a_closure_runs_once_with_gradients_on_and_its_loss_is_returned(kind: str) -> None:
    params = several()
    optimizer, calls = OURS[kind](params), []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = torch.stack([param.square().sum() for param in params]).sum()
        loss.backward()
        return loss

    expected = sum(float(param.detach().square().sum()) for param in params)
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True] and float(loss.detach()) == pytest.approx(expected)
    assert optimizer.state[params[0]][STEP] == 1


def test_what_is_no_parameter_is_refused_as_the_base_refuses_it(kind: str) -> None:
    weight = several()[0]
    named = [("a", several()[0])]
    wrong: list[Any] = [weight, [weight * 2], ["weight"], [], [{"params": named}, {"params": [weight]}]]
    for params in wrong:
        told = []
        for build in (OURS[kind], PLAIN[kind]):
            with pytest.raises((TypeError, ValueError)) as error:
                build(params)
            told.append((error.type, str(error.value)))
        assert told[0] == told[1]


def test_a_parameter_in_two_groups_is_refused(kind: str) -> None:
    params = several()
    optimizer = OURS[kind](params)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": params[:1]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("kind", OURS)
def test_a_group_replaced_by_another_counts_from_the_next_step_on(kind: str) -> None:
    param = parameters(torch.float32)[0]
    optimizer = OURS[kind]([param])
    for step in range(3):
        set_gradients([param], clones([param]), seed=step)
        optimizer.step()
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.0}
    before = param.detach().clone()
    optimizer.step()
    assert torch.equal(param, before)


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("change", [lambda w: w.t(), lambda w: w[:50]], ids=["turned", "cut"])
def test_a_weight_that_changes_its_layout_in_place_is_read_anew(kind: str, change: Callable[[Tensor], Tensor]) -> None:
    param, other = (torch.eye(66).mul(0.5).add(0.01).requires_grad_() for _ in range(2))
    runs = []
    for weight, forget in ((param, False), (other, True)):
        optimizer = OURS[kind]([weight])
        for step in range(3):
            set_gradients([weight], clones([weight]), seed=step)
            optimizer.step()
        weight.grad = None
        weight.data = change(weight.data)
        optimizer.state.clear()
        if forget:
            optimizer._workspace.clear()
        set_gradients([weight], clones([weight]), seed=3)
        optimizer.step()
        runs.append(weight.detach().clone())
    assert torch.equal(*runs)


@pytest.mark.parametrize("kind", OURS)
def test_group_keys_that_nobody_knows_are_not_looked_at(kind: str) -> None:
    param = parameters(torch.float32)[0]
    optimizer = OURS[kind]([{"params": [param], "mask": [torch.ones(4)]}])
    for step in range(3):
        set_gradients([param], clones([param]), seed=step)
        optimizer.step()
        optimizer.param_groups[0]["mask"] = [torch.ones(4)]


@pytest.mark.parametrize("kind", OURS)
def test_the_warning_of_a_first_step_points_at_its_caller_also_under_a_scheduler(kind: str) -> None:
    param = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).mul_(100).requires_grad_()
    optimizer = specopt.NormScaleAdamW([param])
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    param.grad = torch.ones_like(param)
    with pytest.warns(UserWarning, match="the first step moves") as caught:
        optimizer.step()
    assert [warning.filename for warning in caught] == [__file__]
