"""What a wrapped optimizer keeps, saves and gives back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import SGD, AdamW

import specopt
from specopt.tracker.common import PREFIX, STATS, STEP
from specopt.wrapping import class_of
from tests.specopt.helpers import equal, parameters, train
from tests.specopt.wrapped import PENALTY, SET

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")


@pytest.mark.parametrize("rule", [PENALTY, SET], ids=str)
def test_checkpoints_of_the_plain_and_of_the_wrapped_optimizer_load_into_one_another(rule: Any) -> None:
    params, others = parameters(torch.float32), parameters(torch.float32)
    plain, wrapped = AdamW(params, lr=1e-2), specopt.wrap(AdamW(others, lr=1e-2), rule)
    train(plain, params, range(2))
    wrapped.load_state_dict(copy.deepcopy(plain.state_dict()))
    train(wrapped, others, range(2))
    assert wrapped.state[others[0]][STEP] == 2 and float(wrapped.state[others[0]]["step"]) == 4
    plain.load_state_dict(copy.deepcopy(wrapped.state_dict()))
    train(plain, params, range(1))
    assert float(plain.state[params[0]]["step"]) == 5


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_of_every_protocol_keeps_the_rule(protocol: int) -> None:
    params = parameters(torch.float32)
    rule = specopt.NormScale(target="initial", mode="cap")
    optimizer = specopt.wrap(torch.optim.RMSprop(params), rule)
    train(optimizer, params, range(1))
    twin = pickle.loads(pickle.dumps(optimizer, protocol))
    assert twin.rule == rule and type(twin) is type(optimizer)
    assert STATS in twin.state[twin.param_groups[0]["params"][0]]


def test_state_of_bf16_weights_stays_float32_through_a_checkpoint() -> None:
    params, others = parameters(torch.bfloat16), parameters(torch.bfloat16)
    first, second = (specopt.wrap(torch.optim.RMSprop(p), PENALTY) for p in (params, others))
    train(first, params, range(2))
    second.load_state_dict(first.state_dict())
    kept = {name: value for name, value in second.state[others[0]].items() if name.startswith(PREFIX)}
    assert {value.dtype for value in kept.values() if isinstance(value, Tensor)} == {torch.float32}


@pytest.mark.parametrize("rule", [PENALTY, specopt.SpectralDecay(0.3), SET], ids=str)
@pytest.mark.parametrize("base", [SGD, AdamW, torch.optim.RMSprop, torch.optim.Adafactor])
def test_distributed_checkpoint_state_round_trips_and_changes_no_weight(base: Any, rule: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 90), nn.Linear(90, 85))
    optimizer = specopt.wrap(base(model.parameters(), lr=1e-2), rule)
    params: list[Tensor] = list(model.parameters())
    train(optimizer, params, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    twin = copy.deepcopy(model)
    others: list[Tensor] = list(twin.parameters())
    resumed = specopt.wrap(base(others, lr=1e-2), rule)
    set_optimizer_state_dict(twin, resumed, saved)
    assert equal(params, others)
    train(optimizer, params, range(3, 5))
    train(resumed, others, range(3, 5))
    assert equal(params, others)


def test_the_class_of_a_wrapped_optimizer_builds_wrapped_ones() -> None:
    params, others = parameters(torch.float32), parameters(torch.float32)
    optimizer = specopt.wrap(torch.optim.RMSprop(params, lr=1e-3), PENALTY)
    second = type(optimizer)(others, **optimizer.defaults)
    train(optimizer, params, range(2))
    train(second, others, range(2))
    assert equal(params, others) and second.state[others[0]][STEP] == 2


def test_unwrap_leaves_nothing_behind() -> None:
    params = parameters(torch.float32)
    optimizer = SGD(params, lr=0.1)
    attributes, keys = set(vars(optimizer)), set(optimizer.param_groups[0])
    specopt.wrap(optimizer, PENALTY)
    train(optimizer, params, range(2))
    assert specopt.unwrap(optimizer) is optimizer
    assert type(optimizer) is SGD and set(vars(optimizer)) == attributes
    assert set(optimizer.param_groups[0]) == keys and not optimizer.state
    train(specopt.wrap(optimizer, SET), params, range(1))
    assert optimizer.state[params[0]][STEP] == 1


def test_classes_are_shared_by_base_and_rule_and_let_go() -> None:
    assert class_of(SGD, specopt.SpectralPenalty(0.3)) is class_of(SGD, specopt.SpectralPenalty(0.3))
    assert class_of(SGD, PENALTY) is not class_of(SGD, SET)


def test_unwrap_leaves_the_options_that_groups_had_before() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.MultiheadAttention(4, 2))
    optimizer = torch.optim.RMSprop(specopt.param_groups(model))
    before = [dict(group) for group in optimizer.param_groups]
    specopt.wrap(optimizer, SET)
    optimizer.add_param_group({"params": [("more", torch.zeros(3, 3))], "mode": "cap"})
    optimizer = pickle.loads(pickle.dumps(optimizer))
    specopt.unwrap(optimizer)
    for old, new in zip(before, optimizer.param_groups[:-1], strict=True):
        assert old.keys() == new.keys()
        assert all(old[name] == new[name] for name in ("spectral", "view") if name in old)
    assert optimizer.param_groups[-1]["mode"] == "cap" and "tolerance" not in optimizer.param_groups[-1]


def test_a_group_that_was_taken_back_does_not_disturb_unwrap() -> None:
    optimizer = specopt.wrap(torch.optim.RMSprop([torch.zeros(4, 4, requires_grad=True)]), SET)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False))
    optimizer.param_groups[0]["params"].append(model[1].weight)  # so that the model's last group is refused
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": nn.ModuleList([nn.LayerNorm(3), model])})
    optimizer.add_param_group({"params": [torch.zeros(3, 3)], "mode": "cap"})
    specopt.unwrap(optimizer)
    assert ["mode" in group for group in optimizer.param_groups] == [False, True]
    assert not any("tolerance" in group for group in optimizer.param_groups)


class Counting(torch.optim.SGD):
    """Keeps state under a key that is no string."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param][0] = self.state[param].get(0, 0) + 1
        return super().step(closure)


def test_state_keys_that_are_no_strings_are_loaded() -> None:
    params = parameters(torch.float32)[:2]
    optimizer = specopt.wrap(Counting(params, lr=0.1), SET)
    train(optimizer, params, range(2))
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, params, range(2, 3))
    assert [optimizer.state[param][0] for param in params] == [3, 3]
