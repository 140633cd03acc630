"""Targets and strengths that change while training runs: from the next step on, without a cold restart."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import specopt
from specopt.tracker.common import STEP
from tests.specopt.target_net import SHAPES, Net, norms, of_shape, step, weights

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")
SHORT_ON_THE_REFERENCE = pytest.mark.parametrize(
    "backend", ["reference", pytest.param("triton", marks=pytest.mark.full)], indirect=True
)
FEW: dict[str, Any] = {"block": 4}


def sigma(optimizer: Any) -> list[float]:
    return list(norms(optimizer).values())


def counts(optimizer: Any) -> list[int]:
    return [optimizer.state[param][STEP] for group in optimizer.param_groups for param in group["params"]]


def objects(optimizer: Any) -> list[int]:
    """The tracker's tensors: the same ones while it goes on."""
    states = [optimizer.state[param] for group in optimizer.param_groups for param in group["params"]]
    return [id(state[key]) for state in states for key in sorted(state) if key.startswith("spectral_") and key != STEP]


@SHORT_ON_THE_REFERENCE
def test_scheduled_targets_hold_from_the_next_step_on_without_a_cold_restart(backend: str) -> None:
    optimizer = specopt.NormScaleAdamW(weights(), lr=1e-4, mode="rescale", **FEW)
    (group,) = optimizer.param_groups
    channels, fan = [math.sqrt(m / n) for m, n in SHAPES], [math.sqrt(m / n) for m, n in SHAPES]
    schedule: list[tuple[Any, list[float]]] = [
        ("channels", channels),
        (0.7, [0.7, 0.7]),
        (0.9, [0.9, 0.9]),
        ([0.5, 0.6], [0.5, 0.6]),
        ("fan", fan),
        ([2.0, [3.0]], [2.0, 3.0]),
    ]
    kept: list[int] = []
    for done, (target, expected) in enumerate(schedule):
        group["target"] = target
        step(optimizer, done)
        assert sigma(optimizer) == pytest.approx(expected, rel=1e-3), target
        assert counts(optimizer) == [done + 1] * 2
        kept = kept or objects(optimizer)
        assert objects(optimizer) == kept
    group["target"][0] = 4.0
    step(optimizer, 6)
    assert sigma(optimizer) == pytest.approx([4.0, 3.0], rel=1e-3) and objects(optimizer) == kept


@SHORT_ON_THE_REFERENCE
def test_switching_from_initial_to_others_and_back_returns_to_the_norm_of_the_start(backend: str) -> None:
    optimizer = specopt.NormScaleAdamW(weights(), lr=1e-4, mode="rescale", target="initial", **FEW)
    start = sigma(optimizer)
    for seed, (target, expected) in enumerate([("initial", start), (0.7, [0.7, 0.7]), ([0.5, 0.6], [0.5, 0.6])] * 2):
        optimizer.param_groups[0]["target"] = target
        step(optimizer, seed)
        assert sigma(optimizer) == pytest.approx(expected, rel=2e-3), target


@SHORT_ON_THE_REFERENCE
def test_scheduled_lambda_holds_from_the_next_step_on_without_a_cold_restart(backend: str) -> None:
    params = weights()
    optimizer = specopt.SNRSGD(params, lr=1.0, snr_lambda=0.1, **FEW)
    kept: list[int] = []
    for done, strength in enumerate([0.1, 0.3, 0.05]):
        optimizer.param_groups[0]["snr_lambda"] = strength
        exact = [torch.linalg.svd(param.detach().double()) for param in params]
        before = [param.detach().double() for param in params]
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
        for param, old, (u, s, vh) in zip(params, before, exact, strict=True):
            change = strength * s[0] * torch.outer(u[:, 0], vh[0])
            assert float((old - param.detach() - change).norm()) <= 2e-2 * float(change.norm())
        kept = kept or objects(optimizer)
        assert objects(optimizer) == kept and counts(optimizer) == [done + 1] * 2


@SHORT_ON_THE_REFERENCE
def test_schedules_leave_the_batches_of_a_step_as_they_are_until_control_is_switched_off(backend: str) -> None:
    for optimizer, option in (
        (specopt.NormScaleAdamW(weights(), lr=1e-3, mode="cap", max_passes=1, **FEW), "target"),
        (specopt.SNRSGD(weights(), lr=1e-3, max_passes=1, **FEW), "snr_lambda"),
    ):
        made = []
        for done in range(5):
            optimizer.param_groups[0][option] = 0.1 + done
            step(optimizer, done)
            made.append(id(optimizer.__dict__["_workspace"]["batches"]))
        assert len(set(made[2:])) == 1
        optimizer.param_groups[0]["spectral"] = False
        step(optimizer, 5)
        assert optimizer.__dict__["_workspace"]["batches"] == []


@SHORT_ON_THE_REFERENCE
@pytest.mark.parametrize("kind", [specopt.SNRSGD, specopt.NormScaleAdamW])
def test_the_bases_numbers_too_leave_the_batches_as_they_are_and_count_at_once(kind: type, backend: str) -> None:
    """OneCycleLR cycles SGD's momentum and AdamW's first beta; weight decay may have a schedule as well."""
    ends = []
    for anew in (False, True):
        options: dict[str, Any] = {"momentum": 0.9} if kind is specopt.SNRSGD else {}
        optimizer: Any = kind(weights(), lr=1e-2, weight_decay=0.1, max_passes=1, **options, **FEW)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=8)
        made, cycled = [], set()
        for done in range(6):
            (group,) = optimizer.param_groups
            group["weight_decay"] = 0.1 + done
            cycled.add(group.get("momentum", group.get("betas")))
            if anew:
                optimizer.__dict__.get("_workspace", {}).pop("signature", None)
            step(optimizer, done)
            scheduler.step()
            made.append(id(optimizer.__dict__["_workspace"]["batches"]))
        ends.append([param.detach().clone() for param in group["params"]])
        assert len(cycled) >= 5 and (len(set(made[2:])) == 1) is not anew
    assert all(map(torch.equal, *ends))


def test_lambda_of_0_is_off_and_back_on_finds_its_way_again() -> None:
    params = weights()
    optimizer = specopt.SNRSGD(params, lr=1.0, **FEW)
    for done, strength in enumerate([0.1, 0.1, 0.1, 0.0, 0.0, 0.2]):
        optimizer.param_groups[0]["snr_lambda"] = strength
        before, exact = params[0].detach().double(), float(torch.linalg.matrix_norm(params[0].detach().double(), 2))
        step(optimizer, done)
        plain = before - params[0].grad.double()  # type: ignore[union-attr]
        assert float((plain - params[0].detach()).norm()) == pytest.approx(strength * exact, rel=2e-2, abs=1e-6)
    assert counts(optimizer) == [1, 1]


def test_a_lambda_of_0_in_one_group_of_composed_rules_counts_for_that_group_alone() -> None:
    params = [weights()[1], nn.Parameter(weights()[1].detach().clone())]
    rule = specopt.Compose(specopt.SpectralPenalty(0.5), specopt.NormScale(mode="rescale", block=4, target=of_shape))
    optimizer: Any = specopt.wrap(torch.optim.SGD([{"params": [param]} for param in params], lr=0.5), rule)
    first, second = optimizer.param_groups
    for done, target in enumerate([0.5, [0.6], 0.7, 0.8]):
        first["target"], second["target"] = target, 0.9
        first["snr_lambda"] = 0.0 if done == 3 else 0.5
        before = [param.detach().double() for param in params]
        step(optimizer, done)
        assert sigma(optimizer) == pytest.approx([0.5 + done / 10, 0.9], rel=1e-3)
    moved = []
    for param, old, wanted in zip(params, before, (0.8, 0.9), strict=True):
        assert param.grad is not None
        plain = old - 0.5 * param.grad.double()
        moved.append(float((param.detach() - plain * (wanted / torch.linalg.matrix_norm(plain, 2))).norm()))
    assert moved[0] <= 1e-5 and moved[1] >= 0.1


def test_target_in_a_tensor_is_refused_with_a_word_on_what_to_give() -> None:
    optimizer = specopt.NormScaleAdamW(weights())
    optimizer.param_groups[0]["target"] = torch.tensor(0.7)
    with pytest.raises(ValueError, match=r"target must be .* got tensor\(0\.7000\) \(give float\(target\)"):
        step(optimizer, 0)


def test_lambda_lr_like_code_drives_targets() -> None:
    optimizer = specopt.NormScaleAdamW(Net(), target=of_shape, mode="cap")
    start = [copy.deepcopy(group["target"]) for group in optimizer.param_groups]
    assert start[0] == [1.5, 0.75]
    for done in range(3):
        for group in optimizer.param_groups:
            if group["spectral"]:
                group["mode"] = "rescale"
                group["target"] = [[t / 2 for t in e] if isinstance(e, list) else e / 2 for e in group["target"]]
        step(optimizer, done)
        assert norms(optimizer)["conv.weight"] == pytest.approx(1.5 / 2 ** (done + 1), rel=1e-3)
