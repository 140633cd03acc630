"""Targets by list, and what they meet: switches, checkpoints, shards."""

from __future__ import annotations

import copy
import io
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import specopt
from specopt.settling import settle
from specopt.tracker.common import STATS, Stat
from tests.specopt.target_net import Net, entries, norms, of_shape, step, weights

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")


def reported(optimizer: Any) -> dict[str, float | None]:
    return {row.name: row.target for row in specopt.spectral_report(optimizer)}


def lstm() -> Any:
    return specopt.NormScaleAdamW(specopt.param_groups(nn.LSTM(4, 5)), mode="rescale")


def test_list_has_a_number_for_each_parameter_or_for_each_of_its_matrices() -> None:
    optimizer = lstm()
    optimizer.param_groups[0]["target"] = [[0.5, 1.0, 1.5, 2.0], 0.7]
    step(optimizer, 0)
    found = norms(optimizer)
    assert [found[f"weight_ih_l0[{gate}]"] for gate in range(4)] == pytest.approx([0.5, 1.0, 1.5, 2.0], rel=1e-4)
    assert [found[f"weight_hh_l0[{gate}]"] for gate in range(4)] == pytest.approx([0.7] * 4, rel=1e-4)
    assert reported(optimizer) == {name: pytest.approx(sigma, rel=1e-4) for name, sigma in found.items()}


def test_override_gives_a_number_to_each_matrix_of_a_parameter() -> None:
    groups = specopt.param_groups(nn.LSTM(4, 5), overrides={"weight_ih*": {"target": [0.5, 1.0, 1.5, 2]}})
    (decision, *_) = groups.decisions
    assert decision.target == (0.5, 1.0, 1.5, 2.0) and "0.5, 1, 1.5, 2" in str(groups)
    assert groups[0]["target"] == [[0.5, 1.0, 1.5, 2.0]]
    with pytest.raises(ValueError, match=r"weight_ih_l0 must have a number for each of its 4 matrices, got \[1.0\]"):
        specopt.param_groups(nn.LSTM(4, 5), overrides={"weight_ih*": {"target": [1.0]}})


WRONG_LISTS: list[tuple[Any, str]] = [
    ([1.0], r"entry for each parameter of its group, 2 \(the last is weight_hh_l0\), got 1"),
    ([1.0, 1.0, 1.0], "got 3"),
    ([], "got 0"),
    ([1.0, [1.0, 1.0]], r"target of weight_hh_l0 must have a number for each of its 4 matrices, got \[1.0, 1.0\]"),
    ([1.0, 0.0], r"target of weight_hh_l0 must be .* got 0\.0"),
    ([math.nan, 1.0], "target of weight_ih_l0 must be .* got nan"),
    (["fan", 1.0], "target of weight_ih_l0 must be .* got 'fan'"),
    ([None, 1.0], "target of weight_ih_l0 must be .* got None"),
    ([True, 1.0], "target of weight_ih_l0 must be .* got True"),
    ([[1.0, 1.0, 1.0, -1.0], 1.0], "target of weight_ih_l0 must hold .* got -1.0"),
    ([torch.tensor(1.0), 1.0], r"target of weight_ih_l0 must be .* got tensor\(1\.\)"),
]


@pytest.mark.parametrize(("target", "match"), WRONG_LISTS)
def test_wrong_list_is_refused_by_name_wherever_it_is_given_and_nothing_has_changed(target: Any, match: str) -> None:
    optimizer = lstm()
    step(optimizer, 0)
    before = [param.detach().clone() for group in optimizer.param_groups for param in group["params"]]
    optimizer.param_groups[0]["target"] = target
    with pytest.raises(ValueError, match=match):
        step(optimizer, 1)
    after = [param for group in optimizer.param_groups for param in group["params"]]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    (group, *_) = specopt.param_groups(nn.LSTM(4, 5))
    with pytest.raises(ValueError, match=match):
        specopt.NormScaleAdamW([{**group, "target": target}])
    saved = lstm().state_dict()
    saved["param_groups"][0]["target"] = target
    other = lstm()
    with pytest.raises(ValueError, match=match):
        other.load_state_dict(saved)
    assert other.param_groups[0]["target"] == "channels"


def test_a_step_looks_at_the_lists_of_many_parameters_without_asking_for_names(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [nn.Parameter(torch.eye(4).repeat(3, 1)) for _ in range(100)]
    group = {"params": params, "view": "rows:3", "target": [[0.5, 1.0, 1.5]] * 100}
    optimizer = specopt.NormScaleAdamW([group], lr=1e-3)
    names, asked = optimizer.names, []
    monkeypatch.setattr(type(optimizer), "names", lambda _: asked.append(1) or names())
    settle(optimizer.param_groups[0], optimizer.names)
    assert not asked
    step(optimizer, 0)  # its warning of a first step far from the target names once
    assert len(asked) <= 1
    asked.clear()
    step(optimizer, 1)
    assert not asked
    optimizer.param_groups[0]["target"][97] = [0.5, 1.0, -1.0]
    with pytest.raises(ValueError, match=r"target of 0\.97 must hold positive finite numbers, got -1\.0"):
        step(optimizer, 2)
    assert len(asked) == 1


def test_list_stays_where_control_is_switched_off_and_on_again() -> None:
    optimizer = lstm()
    (group, *_) = optimizer.param_groups
    group["target"] = [[0.5, 1.0, 1.5, 2.0], 0.7]
    for seed, spectral in enumerate((True, False, True)):
        group["spectral"] = spectral
        step(optimizer, seed)
    assert norms(optimizer)["weight_ih_l0[2]"] == pytest.approx(1.5, rel=1e-4)


def test_groups_hold_plain_floats_whatever_numbers_were_given() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    for given in ((np.float64(2.0),), [np.float32(2.0)], [2], [Fraction(2)]):
        (entry,) = specopt.NormScaleAdamW([{"params": [weight], "target": given}]).param_groups[0]["target"]
        assert type(entry) is float and entry == 2.0
    group = {"params": [weight, nn.Parameter(torch.ones(2))], "target": [2.0, np.float64("nan")]}
    off = specopt.NormScaleAdamW([group]).param_groups[0]["target"][1]
    assert type(off) is float and math.isnan(off)


def test_list_as_the_default_of_a_rule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a list in a group alone.*\[1\.0\]"):
        specopt.NormScale(target=[1.0])


def test_optimizers_from_the_same_groups_have_lists_of_their_own() -> None:
    groups = specopt.param_groups(nn.Linear(3, 3, bias=False), target=lambda matrix: 2.0)
    first, second = specopt.NormScaleAdamW(groups), specopt.NormScaleAdamW(groups)
    first.param_groups[0]["target"][0] = 5.0
    assert second.param_groups[0]["target"] == groups[0]["target"] == [2.0]


def test_targets_travel_with_state_dict_deepcopy_and_a_weights_only_file() -> None:
    model = Net()
    optimizer = specopt.NormScaleAdamW(model, target=of_shape, mode="rescale")
    step(optimizer, 0)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = specopt.NormScaleAdamW(specopt.param_groups(copy.deepcopy(model)), mode="rescale")
    resumed.load_state_dict(saved)
    for other in (resumed, copy.deepcopy(optimizer)):
        assert entries(other) == entries(optimizer)
        step(other, 1)
        assert norms(other)["grouped.weight[1]"] == pytest.approx(0.9375, rel=1e-4)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("target", [None, lambda matrix: 7.0], ids=["named", "callable"])
@pytest.mark.parametrize("flat", [False, True])
def test_targets_travel_with_torch_distributed_checkpoint(flat: bool, target: Any, tmp_path: Path) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = Net()
    optimizer = specopt.NormScaleAdamW(model, target=of_shape)
    step(optimizer, 0)
    saved = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
    state_dict_saver.save(saved, checkpoint_id=tmp_path)
    resumed = specopt.NormScaleAdamW(model, **({} if target is None else {"target": target}))
    loaded = {"optimizer": get_optimizer_state_dict(model, resumed, options=options)}
    state_dict_loader.load(loaded, checkpoint_id=tmp_path)
    set_optimizer_state_dict(model, resumed, loaded["optimizer"], options=options)
    assert entries(resumed) == entries(optimizer)


def test_a_list_leaves_a_matrix_with_a_non_finite_entry_as_the_base_left_it() -> None:
    params = weights()
    with torch.no_grad():
        params[0][0, 0] = math.nan
    optimizer = specopt.NormScaleAdamW(params, mode="rescale", target=[0.5, 0.6])
    step(optimizer, 0)
    assert float(optimizer.state[params[0]][STATS][Stat.VALID]) == 0 and int(params[0].isnan().sum()) == 1
    assert float(torch.linalg.svdvals(params[1].detach())[0]) == pytest.approx(0.6, rel=1e-4)
