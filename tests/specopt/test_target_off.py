"""A target for what is off is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import specopt
from tests.specopt.target_net import Net, of_shape, step

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")


@pytest.mark.parametrize("target", [2.0, of_shape, [2.0]], ids=["number", "callable", "list"])
def test_target_of_its_own_for_a_group_that_is_off_is_refused(target: Any) -> None:
    group = {"params": [nn.Parameter(torch.ones(2, 2))], "spectral": False, "target": target}
    with pytest.raises(ValueError, match=r"target must not be given to a group that is off.*spectral=False"):
        specopt.NormScaleAdamW([group])
    optimizer = specopt.NormScaleAdamW([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(ValueError, match="group that is off"):
        optimizer.add_param_group(group)
    with pytest.raises(ValueError, match="group that is off"):
        specopt.wrap(torch.optim.SGD([group], lr=0.1), specopt.NormScale())


def test_target_of_all_groups_does_not_mean_those_that_are_off() -> None:
    off: dict[str, Any] = {"params": [nn.Parameter(torch.ones(2, 2))], "spectral": False}
    for target in (2.0, of_shape, "fan"):
        on: dict[str, Any] = {"params": [nn.Parameter(torch.ones(2, 2))]}
        optimizer = specopt.NormScaleAdamW([on, dict(off)], target=target)
        again = specopt.NormScaleAdamW(optimizer.param_groups)
        assert [group["spectral"] for group in again.param_groups] == [True, False]
        specopt.NormScaleAdamW(specopt.param_groups(Net(), target=target, overrides={"head": {"spectral": False}}))


def test_control_that_is_switched_on_without_a_target_is_refused_by_name() -> None:
    off = {"params": [nn.Parameter(torch.ones(2, 2))], "spectral": False}
    optimizer = specopt.NormScaleAdamW([off], target=of_shape)
    step(optimizer, 0)
    optimizer.param_groups[0]["spectral"] = True
    with pytest.raises(ValueError, match=r"target of 0\.0 must be .* got None; it was off"):
        step(optimizer, 1)
    optimizer.param_groups[0]["target"] = [2.0]
    step(optimizer, 1)


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ({"head": {"spectral": False, "target": 2.0}}, r"overrides\['head'\].*target=2\.0 and spectral=False"),
        ({"norm": {"target": 2.0}}, r"overrides\['norm'\].*target=2\.0 for norm\.weight, norm\.bias"),
        ({"head.bias": {"target": 2.0}}, r"target=2\.0 for head\.bias"),
        ({nn.Embedding: {"target": of_shape}}, r"for tokens\.weight"),
        ({"head": {"target": 2.0}, "*": {"spectral": False}}, r"for head\.weight, head\.bias"),
    ],
)
def test_override_with_a_target_for_what_is_not_controlled_is_refused(overrides: Any, match: str) -> None:
    model = Net()
    model.tokens = nn.Embedding(3, 3)
    with pytest.raises(ValueError, match=match):
        specopt.param_groups(model, overrides=overrides)


def test_override_that_reaches_what_is_on_and_what_is_off_is_meant_for_the_former() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    overrides: dict[Any, dict[str, Any]] = {nn.Linear: {"target": 2.0}, "1": {"spectral": False}}
    targets = {one.name: one.target for one in specopt.param_groups(model, overrides=overrides).decisions}
    assert targets == {"0.weight": 2.0, "0.bias": None, "1.weight": None, "1.bias": None}
