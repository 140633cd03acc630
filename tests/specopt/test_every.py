"""``every=n``: a look and a correction in the first of n steps, the base optimizer alone in the others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

import specopt
from specopt.tracker.common import BLOCK, PROBE, STATS, STEP, WAIT, Stat
from tests.specopt.helpers import DEVICE, clones, equal, exact, parameters, set_gradients, train

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")
MAKE: dict[str, Callable[..., Any]] = {
    "set": lambda params, **kw: specopt.NormScaleAdamW(params, lr=1e-2, **kw),
    "rank 4": lambda params, **kw: specopt.NormScaleAdamW(params, lr=1e-2, mode="cap", target=0.9, rank=4, **kw),
    "full": lambda params, **kw: specopt.NormScaleAdamW(params, lr=1e-2, mode="cap", target=0.9, rank="full", **kw),
    "rescale": lambda params, **kw: specopt.NormScaleAdamW(params, lr=1e-2, mode="rescale", **kw),
    "frobenius": lambda params, **kw: specopt.NormScaleAdamW(params, lr=1e-2, norm="frobenius", **kw),
    "SGD": lambda params, **kw: specopt.wrap(SGD(params, lr=0.05, momentum=0.9), specopt.NormScale(**kw)),
}


OF_TRACKER = {STATS, BLOCK, PROBE}


def plain(kind: str, params: list[Tensor]) -> Optimizer:
    return SGD(params, lr=0.05, momentum=0.9) if kind == "SGD" else AdamW(params, lr=1e-2)


def base_state(state: dict[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in state.items() if not str(key).startswith("spectral_")}
    return copy.deepcopy(own)


@pytest.mark.parametrize("kind", MAKE)
def test_between_looks_a_step_is_the_base_optimizers_alone(kind: str) -> None:
    params = parameters(torch.float32)
    ours = MAKE[kind](params, every=3)
    for step in range(7):
        others = clones(params)
        base = plain(kind, others)
        for param, other in zip(params, others, strict=True):
            if base_state(ours.state[param]):
                base.state[other] = base_state(ours.state[param])
        kept = [copy.deepcopy(dict(ours.state[param])) for param in params]
        set_gradients(params, others, seed=step)
        ours.step()
        base.step()
        looks = step % 3 == 0
        for param, other, before in zip(params, others, kept, strict=True):
            state = ours.state[param]
            is_like_base = torch.allclose(param, other, rtol=0, atol=2e-7)
            if param.ndim == 1:
                assert is_like_base
                continue
            assert state[WAIT] == 2 - step % 3
            assert state[STEP] == step // 3 + 1
            if not looks:
                assert is_like_base
                kept_up = [(state[key].nan_to_num(), before[key].nan_to_num()) for key in OF_TRACKER & set(state)]
                assert all(torch.equal(now, then) for now, then in kept_up)
            elif ours.param_groups[0]["mode"] != "cap":
                assert not is_like_base


@pytest.mark.parametrize("rank", [1, 4, "full"])
def test_a_cap_holds_after_each_look_and_is_left_between_them(rank: int | str) -> None:
    params = parameters(torch.float32)
    optimizer = specopt.NormScaleAdamW(params, lr=1e-2, mode="cap", target=0.9, rank=rank, every=3)
    tops = []
    for step in range(7):
        train(optimizer, params, range(step, step + 1))
        tops.append(max(float(exact(param)[1][0]) for param in params if param.ndim > 1))
    if rank == "full":
        assert [top <= 0.9 * (1 + 1e-5) for top in tops] == [True, False, False, True, False, False, True]
    assert all(tops[at] < min(tops[at + 1], tops[at + 2]) for at in (0, 3))


def test_sigma_is_followed_over_the_steps_between_looks() -> None:
    """Weights that drift, of which every fifth is looked at: sigma as found there, against exact SVD."""
    params = parameters(torch.float32)
    optimizer = specopt.NormScaleAdamW(params, lr=2e-3, mode="cap", target=100.0, every=5)
    errors = []
    for step in range(200):
        train(optimizer, params, range(step, step + 1))
        for param in params if step % 5 == 0 else ():
            if param.ndim > 1:
                found = float(optimizer.state[param][STATS][Stat.SIGMA])
                errors.append(abs(found / float(exact(param)[1][0]) - 1))
    errors.sort()
    assert errors[len(errors) // 2] <= 1e-3
    assert errors[-1] <= 0.02


def test_training_goes_on_from_a_state_between_looks_bit_by_bit() -> None:
    params = parameters(torch.float32)
    through = clones(params)
    first, whole = (MAKE["set"](these, every=4) for these in (params, through))
    train(first, params, range(6))
    train(whole, through, range(12))
    resumed = clones(params)
    second = MAKE["set"](resumed, every=4)
    second.load_state_dict(first.state_dict())
    train(second, resumed, range(6, 12))
    assert equal(resumed, through)


def looks(optimizer: Any, params: list[Tensor], steps: range) -> list[list[int]]:
    """Of each step, the places of the parameters that were looked at in it."""
    found = []
    for step in steps:
        before = [copy.deepcopy(optimizer.state.get(param, {}).get(STATS)) for param in params]
        train(optimizer, params, range(step, step + 1))
        after = [optimizer.state[param].get(STATS) for param in params]
        pairs = enumerate(zip(after, before, strict=True))
        found.append([i for i, (new, old) in pairs if old is None or not torch.equal(new, old)])
    return found


def test_every_may_change_between_steps() -> None:
    params = parameters(torch.float32)[:1]
    optimizer = MAKE["set"](params, every=4)
    assert looks(optimizer, params, range(2)) == [[0], []]
    optimizer.param_groups[0]["every"] = 2
    assert looks(optimizer, params, range(2, 6)) == [[], [0], [], [0]]
    optimizer.param_groups[0]["every"] = 1
    assert looks(optimizer, params, range(6, 8)) == [[0], [0]]
    optimizer.param_groups[0]["every"] = 3
    assert looks(optimizer, params, range(8, 13)) == [[0], [], [], [0], []]


def test_a_weight_is_looked_at_in_its_own_first_step_and_where_its_tracker_starts_anew() -> None:
    params = parameters(torch.float32)[:2]
    optimizer = specopt.NormScaleAdamW(params, lr=1e-2, every=3)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert looks(optimizer, params, range(4)) == [[1], [], [0], [1]]
    optimizer.param_groups[0]["block"] = 16
    assert looks(optimizer, params, range(4, 6)) == [[0, 1], []]


def test_groups_have_their_own() -> None:
    params = parameters(torch.float32)[:3]
    groups = [{"params": [param], "every": n} for param, n in zip(params, (1, 2, 3), strict=True)]
    optimizer = specopt.NormScaleAdamW(groups, lr=1e-2)
    assert looks(optimizer, params, range(7)) == [[0, 1, 2], [0], [0, 1], [0, 2], [0, 1], [0], [0, 1, 2]]


def test_the_parts_of_a_parameter_are_looked_at_together() -> None:
    param = torch.randn(60, 20, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    optimizer = specopt.NormScaleAdamW([param], lr=1e-2, view="rows:3", every=2, mode="cap", target=0.5, rank="full")
    tops = []
    for step in range(4):
        param.grad = torch.randn(60, 20, generator=torch.Generator().manual_seed(step)).to(param)
        optimizer.step()
        tops.append([float(exact(part)[1][0]) <= 0.5 * (1 + 1e-5) for part in param.detach().split(20)])
    assert tops == [[True] * 3, [False] * 3, [True] * 3, [False] * 3]


def test_a_step_that_is_skipped_is_none() -> None:
    params = parameters(torch.float32)[:1]
    optimizer = MAKE["set"](params, every=2)
    assert looks(optimizer, params, range(2)) == [[0], []]
    optimizer.found_inf = torch.ones(())
    assert looks(optimizer, params, range(2, 4)) == [[], []]
    optimizer.found_inf = torch.zeros(())
    assert looks(optimizer, params, range(4, 6)) == [[0], []]


def test_chances_of_rounding_are_others_in_each_step() -> None:
    param = torch.ones(64, 64, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    optimizer = specopt.NormScaleAdamW(
        [param], lr=1e-5, weight_decay=0, mode="cap", target=1e3, every=8, stochastic_rounding=True
    )
    moved = []
    for _ in range(4):
        before = param.detach().clone()
        param.grad = torch.ones_like(param)
        optimizer.step()
        moved.append(before != param.detach())
    assert all(bool(each.any()) for each in moved[1:])
    assert all(not torch.equal(a, b) for a, b in pairwise(moved[1:]))


def test_what_cannot_be_is_said() -> None:
    weight = torch.ones(4, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"every must be 1 with capturable=True, got 2"):
        specopt.NormScaleAdamW([weight], every=2, capturable=True)
    with pytest.raises(ValueError, match=r"every must be 1 with rank=1 beside other rules, got 3"):
        specopt.Compose(specopt.SpectralPenalty(0.1), specopt.NormScale(every=3))
    first = specopt.NormScaleAdamW([weight], every=2)
    weight.grad = torch.ones_like(weight)
    first.step()
    state = first.state_dict()
    state["state"][0][WAIT] = -1
    with pytest.raises(ValueError, match=r"spectral_wait of parameter 0\.0 must be a count of steps, got -1"):
        first.load_state_dict(state)


def test_kernels_that_are_operators_are_at_their_norm_after_the_first_of_n_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 5)).to(DEVICE)
    groups = specopt.param_groups(model, conv="operator", inputs=torch.randn(1, 3, 8, 8, device=DEVICE), target=0.5)
    optimizer = specopt.NormScaleAdamW(groups, lr=1e-2, mode="rescale", every=3)
    kernel, weight = model[0].weight, model[2].weight
    geometry = specopt.operators.Geometry.of(model[0], (8, 8))
    norms = []
    for _ in range(7):
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator).to(param)
        optimizer.step()
        norms.append(float(specopt.operators.operator_norm(kernel, geometry)))
        assert optimizer.state[kernel][WAIT] == optimizer.state[weight][WAIT]
    assert [abs(norm / 0.5 - 1) < 2e-3 for norm in norms] == [True, False, False, True, False, False, True]
    optimizer.param_groups[0]["every"] = optimizer.param_groups[1]["every"] = 1
    optimizer.step()
    assert WAIT not in optimizer.state[kernel] and WAIT not in optimizer.state[weight]
