"""Saving and loading: what a checkpoint holds, that training goes on bit for bit, and what is refused whole."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import specopt
from specopt.tracker.common import BLOCK, LEFT, PREFIX, PROBE, RIGHT, STATS, STEP, Stat
from specopt.views.parts import parse, pieces, readings
from tests.specopt.helpers import DEVICE, OURS, PLAIN, clones, exact, parameters, train

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")


@pytest.fixture(params=OURS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def trained(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, list[Tensor]]:
    params = parameters(dtype)
    optimizer = OURS[kind](params, **options)
    train(optimizer, params, range(2))
    return optimizer, params


def through_a_file(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(mine: Any, other: Any) -> bool:
    """Equal bit for bit, through dicts, lists and tuples."""
    if isinstance(mine, Tensor):
        alike = isinstance(other, Tensor) and (mine.dtype, mine.shape) == (other.dtype, other.shape)
        return alike and torch.equal(mine.isnan(), other.isnan()) and torch.equal(*map(torch.nan_to_num, (mine, other)))
    if isinstance(mine, dict):
        return mine.keys() == other.keys() and all(same(value, other[key]) for key, value in mine.items())
    if isinstance(mine, list | tuple):
        return len(mine) == len(other) and all(map(same, mine, other))
    return bool(mine == other)


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for item in value.items() for leaf in leaves(item)]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


# --- what it holds ---------------------------------------------------------------------------------------------------
def test_state_dict_holds_plain_tensors_and_primitives_alone(kind: str) -> None:
    optimizer, _ = trained(kind, target="initial") if kind != "snr" else trained(kind)
    saved = optimizer.state_dict()
    found = {type(leaf) for leaf in leaves(saved)}
    assert found <= {Tensor, bool, int, float, str, type(None)}
    assert same(through_a_file(saved), saved)


def test_state_hooks_run_once_each(kind: str) -> None:
    optimizer, params = trained(kind)
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda *_: calls.append("save"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["save", "saved", "load", "loaded"]
    train(optimizer, params, range(1))
    assert calls == ["save", "saved", "load", "loaded"]


# --- going on --------------------------------------------------------------------------------------------------------
def small(dtype: torch.dtype) -> list[Tensor]:
    """One matrix that is tracked at a block of 4, one that is exact, a kernel and a bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(12, 10), (3, 5), (6, 2, 2, 2), (5,)]
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_() for shape in shapes]


def assert_resumes(kind: str, dtype: torch.dtype, steps: int, **options: Any) -> None:
    params = small(dtype)
    optimizer = OURS[kind](params, block=4, **options)
    train(optimizer, params, range(steps))
    saved = through_a_file({"weights": [p.detach() for p in params], "optimizer": optimizer.state_dict()})
    train(optimizer, params, range(steps, 2 * steps))
    others = [weight.requires_grad_() for weight in saved["weights"]]
    resumed = OURS[kind](others, block=4, **options)
    resumed.load_state_dict(saved["optimizer"])
    train(resumed, others, range(steps, 2 * steps))
    assert same([p.detach() for p in params], [p.detach() for p in others])
    assert same(optimizer.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_50_steps_saved_and_50_more_have_the_bits_of_100(kind: str, dtype: torch.dtype) -> None:
    assert_resumes(kind, dtype, 50)


@pytest.mark.parametrize("steps", [2, pytest.param(50, marks=pytest.mark.full)])
@pytest.mark.usefixtures("triton_backend")
def test_a_resumed_run_on_triton_has_the_bits_of_one_that_was_not_cut(kind: str, steps: int) -> None:
    assert_resumes(kind, torch.float32, steps, max_passes=2)  # an interpreter takes its time


def test_float32_state_of_a_bfloat16_weight_is_loaded_bit_for_bit(kind: str) -> None:
    first, params = trained(kind, torch.bfloat16)
    second = OURS[kind](parameters(torch.bfloat16))
    second.load_state_dict(through_a_file(first.state_dict()))
    own = 0
    for param, other in zip(params, second.param_groups[0]["params"], strict=True):
        for key, value in first.state[param].items():
            if key.startswith(PREFIX) and isinstance(value, Tensor):
                own += 1
                assert value.dtype == torch.float32 and same(value, second.state[other][key])
    assert own >= 10


# --- from and to the base --------------------------------------------------------------------------------------------
def test_checkpoint_of_the_base_leaves_the_groups_options_of_ours_as_they_are(kind: str) -> None:
    params, others = parameters(torch.float32), parameters(torch.float32)
    theirs = PLAIN[kind]([{"params": others[:3]}, {"params": others[3:]}])
    train(theirs, others, range(2))
    ours = OURS[kind]([{"params": params[:3], "spectral": False}, {"params": params[3:], "block": 8}])
    ours.load_state_dict(theirs.state_dict())
    assert [(group["spectral"], group["block"]) for group in ours.param_groups] == [(False, 32), (True, 8)]
    train(ours, params, range(2, 3))
    assert STATS not in ours.state[params[0]] and ours.state[params[3]][STEP] == 1


def test_the_base_goes_on_from_a_checkpoint_of_ours_as_from_its_own(kind: str) -> None:
    optimizer, params = trained(kind)
    others, twins = clones(params), clones(params)
    first, second = PLAIN[kind](others), PLAIN[kind](twins)
    first.load_state_dict(optimizer.state_dict())
    own = copy.deepcopy(optimizer.state_dict())
    own["state"] = {i: {k: v for k, v in s.items() if not k.startswith(PREFIX)} for i, s in own["state"].items()}
    second.load_state_dict(own)
    for plain, weights in ((first, others), (second, twins)):
        train(plain, weights, range(2, 5))
    assert same([p.detach() for p in others], [p.detach() for p in twins])


def test_control_finds_its_way_again_after_a_time_under_the_base() -> None:
    optimizer, params = trained("snr")
    plain = PLAIN["snr"](params)
    plain.load_state_dict(optimizer.state_dict())
    train(plain, params, range(2, 8))
    again = OURS["snr"](params)
    again.load_state_dict(plain.state_dict())
    train(again, params, range(8, 10))
    now = [float(exact(param)[1][0]) for param in params if param.ndim > 1]
    train(again, params, range(10, 11))
    found = [float(again.state[param][STATS][Stat.SIGMA]) for param in params if param.ndim > 1]
    assert found == pytest.approx(now, rel=1e-3)
    assert all(again.state[param][STEP] == 5 for param in params if param.ndim > 1)


# --- torch.distributed.checkpoint ------------------------------------------------------------------------------------
DCP: dict[str, dict[str, bool]] = {
    "plain": {},
    "flat": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "offloaded": {"full_state_dict": True, "cpu_offload": True},
}


@pytest.mark.parametrize("form", DCP)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_distributed_checkpoint_moves_no_weight_and_goes_on_bit_for_bit(kind: str, momentum: float, form: str) -> None:
    options = StateDictOptions(**DCP[form])
    more = {"momentum": momentum} if kind == "snr" else {"amsgrad": momentum > 0}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 80), nn.Linear(80, 5))
    optimizer = OURS[kind](model.parameters(), **more)

    def step(net: nn.Module, opt: Any, seed: int) -> None:
        opt.zero_grad()
        net(torch.randn(8, 70, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
        opt.step()

    for seed in range(2):
        step(model, optimizer, seed)
    before = [param.detach().clone() for param in model.parameters()]
    saved = through_a_file(get_optimizer_state_dict(model, optimizer, options=options))
    twin = copy.deepcopy(model)
    resumed = OURS[kind](twin.parameters(), **more)
    set_optimizer_state_dict(twin, resumed, saved, options=options)
    for net in (model, twin):
        assert same(before, [param.detach() for param in net.parameters()])
    assert same(optimizer.state_dict()["state"], resumed.state_dict()["state"])
    step(model, optimizer, 3)
    step(twin, resumed, 3)
    assert same([p.detach() for p in model.parameters()], [p.detach() for p in twin.parameters()])


# --- refused ---------------------------------------------------------------------------------------------------------
def cut(value: Tensor) -> Tensor:
    return value[1:].clone()


def change_state(at: int, **changes: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    def change(saved: dict[str, Any]) -> None:
        for key, new in changes.items():
            saved["state"][at][key] = new(saved["state"][at][key])

    return change


def reverse(saved: dict[str, Any]) -> None:
    states = saved["state"]
    saved["state"] = {i: states[len(states) - 1 - i] for i in states}


def truncate(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["params"].pop()


def set_option(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(saved: dict[str, Any]) -> None:
        saved["param_groups"][0][name] = value

    return change


WRONG: list[tuple[str, str, Callable[[dict[str, Any]], None], str]] = [
    (
        "snr",
        "momentum of another shape",
        change_state(0, momentum_buffer=cut),
        r"momentum_buffer.*0\.0.*\(80, 70\).*79",
    ),
    ("set", "average of another shape", change_state(1, exp_avg_sq=cut), r"exp_avg_sq.*0\.1.*\(70, 130\).*69"),
    ("snr", "right block of another length", change_state(0, **{RIGHT: cut}), rf"{RIGHT}.*0\.0.*70, any.*69"),
    ("snr", "left block of another length", change_state(0, **{LEFT: cut}), rf"{LEFT}.*0\.0.*80, any.*79"),
    ("set", "block of another length", change_state(1, **{BLOCK: cut}), rf"{BLOCK}.*0\.1.*130, any.*129"),
    ("set", "probe of another length", change_state(1, **{PROBE: cut}), rf"{PROBE}.*0\.1.*130, any.*129"),
    ("set", "block that is no matrix", change_state(0, **{BLOCK: torch.flatten}), rf"{BLOCK}.*0\.0"),
    ("set", "block that is no tensor", change_state(0, **{BLOCK: lambda _: "gone"}), rf"{BLOCK}.*0\.0.*'gone'"),
    *[(k, "stats cut", change_state(0, **{STATS: cut}), rf"{STATS}.*0\.0.*7.*6") for k in OURS],
    *[(k, "step below 0", change_state(2, **{STEP: lambda _: -1}), rf"{STEP}.*0\.2.*-1") for k in OURS],
    *[(k, "parameters in another order", reverse, r"0\.0.*\(80, 70\).*another parameter") for k in OURS],
    *[(k, "a parameter less", truncate, "size of optimizer's group") for k in OURS],
    *[(k, "no group", lambda saved: saved["param_groups"].clear(), "number of parameter groups") for k in OURS],
    *[(k, "nonsense for an option", set_option("block", 0), r"block.*got 0") for k in OURS],
    ("set", "a mode there is not", set_option("mode", "clip"), r"mode.*'clip'"),
]


@pytest.mark.parametrize(("which", "what", "spoil", "told"), WRONG, ids=lambda v: v if isinstance(v, str) else "")
def test_a_state_that_cannot_be_meant_is_refused_and_nothing_of_it_taken(
    which: str, what: str, spoil: Callable[[dict[str, Any]], None], told: str
) -> None:
    other, _ = trained(which, lr=0.5)
    saved = copy.deepcopy(other.state_dict())
    spoil(saved)
    optimizer, params = trained(which)
    before, tensors = copy.deepcopy(optimizer.state_dict()), [id(v) for v in leaves(optimizer.state_dict()["state"])]
    with pytest.raises(ValueError, match=told):
        optimizer.load_state_dict(saved)
    assert same(before, optimizer.state_dict()), what
    assert tensors == [id(value) for value in leaves(optimizer.state_dict()["state"])]
    train(optimizer, params, range(2, 3))


@pytest.mark.parametrize(("saved", "loaded", "lacking"), [("snr", "set", "betas, eps"), ("set", "snr", "momentum")])
def test_a_state_of_another_optimizer_is_refused_whole(saved: str, loaded: str, lacking: str) -> None:
    other, _ = trained(saved)
    optimizer, params = trained(loaded)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=f"no {lacking}.*another optimizer"):
        optimizer.load_state_dict(other.state_dict())
    assert same(before, optimizer.state_dict())
    train(optimizer, params, range(2, 3))


def test_what_fails_half_way_is_taken_back() -> None:
    optimizer, params = trained("set")
    before = copy.deepcopy(optimizer.state_dict())
    saved = copy.deepcopy(before)
    del saved["state"][0]["step"]
    saved["param_groups"][0]["lr"] = 0.7
    with pytest.raises(KeyError, match="step"):  # torch's own, when the state is in its place already
        optimizer.load_state_dict(saved)
    assert same(before, optimizer.state_dict())
    train(optimizer, params, range(2, 3))


def test_the_error_of_a_refused_state_has_the_name_of_a_named_parameter() -> None:
    model = nn.Sequential(nn.Linear(80, 70))
    optimizer = specopt.SNRSGD(model.named_parameters(), momentum=0.9)
    model(torch.ones(1, 80)).sum().backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["momentum_buffer"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"momentum_buffer of parameter 0\.weight.*\(70, 80\).*\(3, 3\)"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("block", [8, 64])
def test_a_checkpoint_with_blocks_of_another_width_than_its_option_starts_them_cold(kind: str, block: int) -> None:
    first, params = trained(kind)
    saved = copy.deepcopy(first.state_dict())
    saved["param_groups"][0]["block"] = block
    second = OURS[kind](params)
    second.load_state_dict(saved)
    train(second, params, range(2, 3))
    assert all(bool(param.isfinite().all()) for param in params)
    if kind == "snr":
        assert second.state[params[0]][STEP] == 1  # cold
        assert second.state[params[0]][RIGHT].shape == (70, block)


# --- read otherwise --------------------------------------------------------------------------------------------------
CHANGES = list(itertools.permutations(("flatten", "rows:2", "columns:2", "transposed"), 2))


def penalized_and_capped(params: Any, **options: Any) -> Any:
    rule = specopt.Compose(specopt.SpectralPenalty(0.01, **options), specopt.NormScale(mode="cap"))
    return specopt.wrap(torch.optim.SGD(params, lr=0.1), rule)


TRACKED = {"snr": OURS["snr"], "set": OURS["set"], "both": penalized_and_capped}


def assert_follows(optimizer: Any, param: Tensor) -> None:
    """Sigma of every matrix is that of the weight as it is read now."""
    found = [row.sigma for row in specopt.spectral_report(optimizer)]
    stats = optimizer.state[param][STATS]
    assert stats[..., Stat.TOP].flatten().tolist() == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize(("old", "new"), CHANGES)
@pytest.mark.parametrize("which", TRACKED)
def test_a_checkpoint_whose_view_was_changed_loads_and_is_followed_anew(which: str, old: str, new: str) -> None:
    param = torch.randn(24, 36, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    optimizer = TRACKED[which]([{"params": [param], "view": old}], block=4)
    train(optimizer, [param], range(2))
    saved = through_a_file(optimizer.state_dict())
    saved["param_groups"][0]["view"] = new
    resumed = TRACKED[which]([param], block=4)
    resumed.load_state_dict(saved)
    train(resumed, [param], range(2, 3))
    assert resumed.state[param][STEP] == 1  # cold
    resumed.param_groups[0]["lr"] = 0.0
    train(resumed, [param], range(3, 5))
    assert_follows(resumed, param)


@pytest.mark.parametrize("new", ["columns:2", "transposed"])
@pytest.mark.parametrize("which", TRACKED)
def test_a_weight_without_gradient_since_its_view_was_changed_can_be_saved_and_loaded(which: str, new: str) -> None:
    params = [torch.randn(24, 36, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(2)]
    optimizer = TRACKED[which]([{"params": params, "view": "rows:2"}], block=8)
    train(optimizer, params, range(2))
    optimizer.param_groups[0]["view"] = new
    params[1].grad = None
    train(optimizer, params[:1], range(2, 4))
    resumed = TRACKED[which](clones(params))
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert same(optimizer.state_dict(), resumed.state_dict())
    train(resumed, resumed.param_groups[0]["params"], range(4, 5))


@pytest.mark.parametrize(("old", "new"), [(32, 8), (8, 32)])
def test_rules_together_load_after_a_change_of_block_that_turns_the_matrix(old: int, new: int) -> None:
    param = torch.randn(20, 90, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    optimizer = penalized_and_capped([param], block=old)
    train(optimizer, [param], range(2))
    saved = through_a_file(optimizer.state_dict())
    saved["param_groups"][0]["block"] = new
    resumed = penalized_and_capped([param])
    resumed.load_state_dict(saved)
    train(resumed, [param], range(2, 3))
    resumed.param_groups[0]["lr"] = 0.0
    train(resumed, [param], range(3, 5))
    assert_follows(resumed, param)


@pytest.mark.parametrize("view", ["flatten", "rows:2"])
@pytest.mark.parametrize(("key", "shape"), [(STATS, (5, 7)), (RIGHT, (2, 18, 8)), (LEFT, (24,)), (RIGHT, (36, 8))])
def test_a_state_that_no_view_of_the_weight_leaves_is_refused(key: str, shape: tuple[int, ...], view: str) -> None:
    param = torch.randn(24, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = specopt.SNRSGD([param], lr=0.1, view=view, block=8)
    train(optimizer, [param], range(2))
    before = copy.deepcopy(optimizer.state_dict())
    saved = copy.deepcopy(before)
    saved["state"][0][key] = torch.zeros(shape)
    with pytest.raises(ValueError, match=rf"{key} of parameter 0\.0.*\(24, 32\).*another parameter"):
        optimizer.load_state_dict(saved)
    assert same(before, optimizer.state_dict())


def test_a_state_without_momentum_of_another_parameter_is_refused() -> None:
    param, other = torch.ones(24, 36, requires_grad=True), torch.ones(36, 60, requires_grad=True)
    theirs, ours = (specopt.SNRSGD([weight], lr=0.1, block=8) for weight in (other, param))
    train(theirs, [other], range(1))
    with pytest.raises(ValueError, match=r"spectral_.* of parameter 0\.0.*another parameter"):
        ours.load_state_dict(theirs.state_dict())
    assert not ours.state


@pytest.mark.parametrize("shape", [(6, 10), (12, 6, 3, 3), (4, 6, 5)])
def test_readings_are_those_of_all_views_that_fit(shape: tuple[int, ...]) -> None:
    names = ["flatten", "transposed", "stack", "stack-transposed", "bilinear"]
    names += [f"{kind}:{count}" for kind in ("rows", "columns", "transposed") for count in range(1, 13)]
    found = set()
    for name in names:
        try:
            parts = pieces(torch.zeros(shape), parse(name))
        except ValueError:
            continue
        found.add((len(parts), *parts[0].flatten(1).shape))
    assert readings(shape) == found


# --- with numbers that are none --------------------------------------------------------------------------------------
@pytest.mark.parametrize("key", [BLOCK, PROBE, LEFT, RIGHT])
def test_a_tracker_that_is_loaded_with_a_nan_starts_anew(kind: str, key: str) -> None:
    first, params = trained(kind)
    saved = copy.deepcopy(first.state_dict())
    damaged = [state[key] for state in saved["state"].values() if key in state]
    for value in damaged:
        value.view(-1)[0] = torch.nan
    second = OURS[kind](params)
    second.load_state_dict(saved)
    train(second, params, range(2, 5))
    kept = [value for state in second.state.values() for value in state.values() if isinstance(value, Tensor)]
    assert all(bool(value.isfinite().all()) for value in [*params, *kept] if value.ndim > 1)
    if kind != "frobenius":
        for param in params:
            if STATS in second.state[param]:
                sigma = float(second.state[param][STATS][Stat.SIGMA])
                assert sigma == sigma


# --- older states ----------------------------------------------------------------------------------------------------
def test_setstate_fills_in_the_options_that_an_older_state_lacks(kind: str) -> None:
    optimizer, params = trained(kind)
    older = {"state": optimizer.state, "param_groups": optimizer.param_groups}
    for group in optimizer.param_groups:
        for name in (*optimizer.rule.names, "maximize", "foreach", "fused"):
            group.pop(name, None)
    optimizer.__setstate__(older)
    for name in optimizer.rule.names:
        assert optimizer.param_groups[0][name] == optimizer.defaults[name]
    train(optimizer, params, range(2, 3))
    assert optimizer.state[params[0]][STEP] == 3
