"""What every torch.optim user relies on, as far as the wrapping could break it."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import specopt
from specopt.session import Gate
from specopt.tracker.common import STATS, STEP
from tests.specopt.helpers import DEVICE, OURS, PLAIN, clones, equal, parameters, set_gradients, step_at_scale, train

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")


@pytest.fixture(params=OURS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(
    ("ours", "base"), [(specopt.SNRSGD, torch.optim.SGD), (specopt.NormScaleAdamW, torch.optim.AdamW)]
)
def test_signature_is_the_bases_then_keywords_of_ours(ours: type, base: type) -> None:
    mine, theirs = (list(inspect.signature(cls.__init__).parameters.values()) for cls in (ours, base))
    assert [(p.name, p.default, p.kind) for p in mine[: len(theirs)]] == [(p.name, p.default, p.kind) for p in theirs]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in mine[len(theirs) :])
    assert issubclass(ours, base)


def test_same_bits_in_two_runs_and_global_random_state_untouched(kind: str) -> None:
    runs = []
    for _ in range(2):
        params = parameters(torch.float32)
        optimizer = OURS[kind](params)
        state = torch.get_rng_state()
        train(optimizer, params, range(8))
        assert torch.equal(state, torch.get_rng_state())
        runs.append(params)
    assert equal(*runs)


def test_closure_gives_the_gradients_of_the_step(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 90), nn.Tanh(), nn.Linear(90, 3))
    images = torch.randn(16, 80)
    twin = copy.deepcopy(model)
    first, second = OURS[kind](model.parameters()), OURS[kind](twin.parameters())

    def closure() -> Tensor:
        first.zero_grad()
        loss = model(images).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        loss = first.step(closure)
        second.zero_grad()
        twin(images).square().mean().backward()
        second.step()
        assert loss is not None and float(loss.detach()) >= 0
    assert equal(list(model.parameters()), list(twin.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_resume_is_bit_exact(kind: str, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = OURS[kind](params)
    train(optimizer, params, range(5))
    file = io.BytesIO()
    torch.save({"weights": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
    train(optimizer, params, range(5, 10))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others = [weight.requires_grad_() for weight in saved["weights"]]
    resumed = OURS[kind](others)
    resumed.load_state_dict(saved["optimizer"])
    train(resumed, others, range(5, 10))
    assert equal(params, others)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_keep_their_rule_and_go_on_bit_for_bit(kind: str, copied: Callable[[Any], Any]) -> None:
    params = parameters(torch.float32)
    optimizer = OURS[kind](params)
    train(optimizer, params, range(3))
    twin = copied(optimizer)
    others = [param for group in twin.param_groups for param in group["params"]]
    train(optimizer, params, range(3, 6))
    train(twin, others, range(3, 6))
    assert equal(params, others)


def test_checkpoint_of_the_base_loads_into_ours_and_ours_into_the_base(kind: str) -> None:
    params, others = parameters(torch.float32), parameters(torch.float32)
    ours, theirs = OURS[kind](params), PLAIN[kind](others)
    train(theirs, others, range(2))
    ours.load_state_dict(theirs.state_dict())
    train(ours, params, range(3))
    assert ours.state[params[0]][STEP] == 3
    theirs.load_state_dict(ours.state_dict())
    train(theirs, others, range(2))


def test_state_is_complete_or_absent(kind: str) -> None:
    params = parameters(torch.float32)
    optimizer = OURS[kind](params)
    specopt.spectral_report(optimizer)
    assert not optimizer.state and not optimizer.state_dict()["state"]
    train(optimizer, params, range(1))
    for param in params:
        own = {name for name in optimizer.state[param] if name.startswith("spectral")}
        assert (param.ndim > 1) == (STATS in own)
        assert not own or STEP in own


def test_step_hooks_run_once_even_after_a_plain_optimizer_was_built(kind: str) -> None:
    PLAIN[kind](parameters(torch.float32))
    params = parameters(torch.float32)
    optimizer = OURS[kind](params)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    train(optimizer, params, range(2))
    assert calls == ["pre", "post", "pre", "post"]


def test_groups_added_during_training_are_controlled(kind: str) -> None:
    params = parameters(torch.float32)
    optimizer = OURS[kind](params[:2])
    train(optimizer, params[:2], range(3))
    optimizer.add_param_group({"params": params[2:], "lr": 1e-4})
    train(optimizer, params, range(3, 6))
    assert optimizer.state[params[0]][STEP] == 6
    assert optimizer.state[params[5]][STEP] == 3


def test_named_parameters_give_their_names_to_the_report(kind: str) -> None:
    model = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 3))
    rows = specopt.spectral_report(OURS[kind](model.named_parameters()))
    assert [row.name for row in rows] == ["0.weight", "1.weight"]


def test_a_parameter_put_into_a_named_group_by_hand_is_controlled_and_its_group_told_by_place(kind: str) -> None:
    model = nn.Sequential(nn.Linear(8, 9, bias=False), nn.Linear(9, 3, bias=False)).to(DEVICE)
    optimizer = OURS[kind](list(model.named_parameters())[:1])
    optimizer.param_groups[0]["params"].append(model[1].weight)
    train(optimizer, list(model.parameters()), range(2))
    assert [row.name for row in specopt.spectral_report(optimizer)] == ["0.0", "0.1"]


def test_schedulers_and_repr(kind: str) -> None:
    params = parameters(torch.float32)
    optimizer = OURS[kind](params)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    for step in range(5):
        train(optimizer, params, range(step, step + 1))
        scheduler.step()
    assert ("snr_lambda" if kind == "snr" else "target") in repr(optimizer)


def test_step_inside_autocast_equals_step_outside(kind: str) -> None:
    runs = []
    for enabled in (False, True):
        params = parameters(torch.float32)
        optimizer = OURS[kind](params)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            train(optimizer, params, range(3))
        runs.append(params)
    assert equal(*runs)


def test_versions_of_changed_weights_move() -> None:
    for kind in OURS:
        params = parameters(torch.float32)
        optimizer = OURS[kind](params)
        set_gradients(params, clones(params), seed=0)
        versions = [param._version for param in params]
        optimizer.step()
        assert all(param._version > version for param, version in zip(params, versions, strict=True))


def test_scaler_that_found_inf_changes_no_weight(kind: str) -> None:
    for fused in (False, True):
        params = [param for param in parameters(torch.float32) if param.is_contiguous()]
        optimizer = OURS[kind](params, fused=fused)
        before = [param.detach().clone() for param in params]
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.ones(()))  # a scaler is set up by its first loss
        set_gradients(params, clones(params), seed=0)
        assert params[0].grad is not None
        params[0].grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        assert equal([p.detach() for p in params], before), fused


def test_fused_step_under_a_scaler_equals_the_unscaled_step() -> None:
    runs = []
    for scale in (None, 64.0):
        params = parameters(torch.float32)
        optimizer = specopt.SNRSGD(params, lr=0.1, snr_lambda=0.5, fused=True, tolerance=1e-6, max_passes=100)
        step_at_scale(optimizer, params, scale)
        runs.append(params)
    for mine, other in zip(*runs, strict=True):
        assert torch.allclose(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kind_", ["snr", "set", "frobenius"])
def test_distributed_checkpoint_state_round_trips_and_changes_no_weight(kind_: str, momentum: float) -> None:
    options = {"momentum": momentum} if kind_ == "snr" else {}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 90), nn.Linear(90, 85))
    optimizer = OURS[kind_](model.parameters(), **options)

    def step(net: nn.Module, opt: Any, seed: int) -> None:
        opt.zero_grad()
        net(torch.randn(8, 80, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
        opt.step()

    for seed in range(3):
        step(model, optimizer, seed)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    twin = copy.deepcopy(model)
    resumed = OURS[kind_](twin.parameters(), **options)
    set_optimizer_state_dict(twin, resumed, saved)
    assert equal(list(model.parameters()), list(twin.parameters()))
    step(model, optimizer, 3)
    step(twin, resumed, 3)
    assert equal(list(model.parameters()), list(twin.parameters()))


@pytest.mark.parametrize(("saved", "loaded"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_checkpoint_of_another_dtype_is_taken_in_the_dtype_of_the_weights(
    kind: str, saved: torch.dtype, loaded: torch.dtype
) -> None:
    params, others = parameters(saved), parameters(loaded)
    first, second = OURS[kind](params), OURS[kind](others)
    train(first, params, range(2))
    second.load_state_dict(first.state_dict())
    train(second, others, range(2, 4))
    assert all(bool(param.isfinite().all()) for param in others)
    assert second.state[others[0]][STATS].dtype == loaded


def test_load_hooks_of_the_user_are_respected(kind: str) -> None:
    params, others = parameters(torch.bfloat16), parameters(torch.bfloat16)
    first, second = OURS[kind](params), OURS[kind](others)
    train(first, params, range(2))
    second.register_load_state_dict_pre_hook(lambda _, state: state["wrapped"])
    seen: list[torch.dtype] = []
    second.register_load_state_dict_post_hook(lambda opt: seen.append(opt.state[others[0]][STATS].dtype))
    second.load_state_dict({"wrapped": first.state_dict()})
    assert seen == [torch.float32]


def test_default_device_elsewhere_does_not_matter(kind: str) -> None:
    params = parameters(torch.float32)
    optimizer = OURS[kind](params, foreach=False)
    set_gradients(params, clones(params), seed=0)
    torch.set_default_device("meta")
    try:
        if kind == "snr":
            optimizer.step()
        else:
            optimizer.rule.begin(list(optimizer.matrices())[:2], Gate()).finish()
    finally:
        torch.set_default_device(None)
    assert all(bool(param.isfinite().all()) for param in params)


def test_parameter_group_that_cannot_be_controlled_is_not_added(kind: str) -> None:
    optimizer = OURS[kind](parameters(torch.float32))
    gapped = torch.randn(8, 8, 16, 16)[:, :, ::2, :].requires_grad_()
    with pytest.raises(ValueError, match="contiguous"):
        optimizer.add_param_group({"params": [gapped]})
    assert len(optimizer.param_groups) == 1
