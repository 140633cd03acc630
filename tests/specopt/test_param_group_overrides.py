"""Overrides of what a model's module types say."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import specopt
from tests.specopt.modules import OPTIMIZERS, Odd, controlled, decisions

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")


@pytest.fixture(params=OPTIMIZERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_overrides_by_type_pattern_and_predicate_the_last_one_winning() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 2))
    groups = specopt.param_groups(
        model,
        lr=0.5,
        overrides={
            nn.Linear: {"target": 2.0},
            "1": {"lr": 0.1},
            "1.1.*": {"target": 3.0},
            (lambda name, module, param: isinstance(module, nn.Linear) and len(param) == 2): {"spectral": False},
            (nn.Conv1d, nn.Conv2d): {"mode": "cap"},
        },
    )
    found = {name: {**group, "params": None} for group in groups for name, _ in group["params"]}
    assert found["0.weight"]["mode"] == "cap" and "target" not in found["0.weight"]
    assert (found["1.0.weight"]["target"], found["1.0.weight"]["lr"]) == (2.0, 0.1)
    assert (found["1.1.weight"]["target"], found["1.1.bias"]["lr"]) == (3.0, 0.1)
    assert found["2.weight"]["spectral"] is False and found["2.weight"]["lr"] == 0.5
    optimizer = specopt.NormScaleAdamW(groups)
    assert {row.name: row.target for row in specopt.spectral_report(optimizer)}["1.1.weight"] == 3.0


def test_an_override_of_a_module_type_counts_for_all_that_is_inside() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 1, 4), nn.Linear(4, 4))
    assert controlled(model, overrides={nn.TransformerEncoderLayer: {"spectral": False}}) == {"1.weight"}


def test_a_view_in_an_override_controls_what_nothing_is_known_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decisions(
            Odd(),
            overrides={
                "experts": {"view": "stack"},
                "table": {"view": "transposed"},
                "position": {"spectral": False},
                "relative*": {"spectral": False},
            },
        )
    assert found["experts"].matrices == (3, (5, 4)) and found["table"].matrices == (1, (4, 5))
    assert found["position"].view is found["scale"].view is None
    packed = nn.Linear(4, 12)
    assert decisions(packed, overrides={"weight": {"view": "rows:3"}})["weight"].matrices == (3, (4, 4))


def test_overrides_that_make_no_sense_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Odd())
    wrong: list[tuple[dict[Any, Any], type[Exception], str]] = [
        ({"haed.*": {"lr": 1.0}}, ValueError, r"'haed\.\*'.*matches no"),
        ({3: {}}, TypeError, "pattern or a predicate, got 3"),
        ({"0": 0.1}, TypeError, "dict of group options, got 0.1"),
        ({"1.table": {"spectral": True}}, ValueError, "1.table.*give a view"),
        ({"0.weight": {"view": "rows:3"}}, ValueError, "0.weight: view='rows:3' needs"),
        ({"0.weight": {"view": "row"}}, ValueError, "got 'row'"),
    ]
    for overrides, error, match in wrong:
        with pytest.raises(error, match=match):
            specopt.param_groups(model, overrides=overrides)
    with pytest.raises(TypeError, match="Module, got list"):
        specopt.param_groups([nn.Parameter(torch.zeros(2))])  # type: ignore[arg-type]


def test_model_wide_options_and_control_switched_off() -> None:
    groups = specopt.param_groups(nn.LSTM(3, 4), spectral=False)
    assert specopt.spectral_report(specopt.SNRSGD(groups)) == []
    assert decisions(nn.Linear(4, 3), target=1.5)["weight"].target == 1.5
    assert decisions(nn.Linear(4, 3), target="initial")["weight"].target == "initial"
