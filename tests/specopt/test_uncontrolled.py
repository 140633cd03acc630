"""What param_groups and optimizers leave uncontrolled, and what they say of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as hooked_spectral_norm

import specopt
from tests.specopt import modules
from tests.specopt.modules import OPTIMIZERS, Odd, controlled, everything

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")


@pytest.fixture(params=OPTIMIZERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class LowRank(nn.Module):
    """LoRA as a parametrization: ``W + B A``."""

    def __init__(self, out: int, columns: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(columns, 2, bias=False), nn.Parameter(torch.zeros(out, 2))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a.weight


def parametrized(how: str) -> nn.Module:
    linear = nn.Linear(6, 5)
    if how == "low rank":
        parametrize.register_parametrization(linear, "weight", LowRank(5, 6))
        return linear
    if how == "prune":
        return prune.l1_unstructured(linear, "weight", amount=0.5)  # type: ignore[no-any-return, no-untyped-call]
    if how == "old spectral_norm":
        return hooked_spectral_norm(linear)
    if how == "old weight_norm":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return nn.utils.weight_norm(linear)
    return getattr(parametrizations, how)(linear)  # type: ignore[no-any-return]


PARAMETRIZED = [
    "weight_norm",
    "spectral_norm",
    "orthogonal",
    "low rank",
    "prune",
    "old spectral_norm",
    "old weight_norm",
]


@pytest.mark.parametrize("how", PARAMETRIZED)
def test_parametrized_weights_are_never_controlled_and_named_once(how: str) -> None:
    model = nn.Sequential(parametrized(how), nn.Linear(5, 4))
    with pytest.warns(UserWarning, match="computed from|parametrized by") as caught:
        optimizer = specopt.NormScaleAdamW(model)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert [row.name for row in specopt.spectral_report(optimizer)] == ["1.weight"]
    model(torch.ones(3, 6)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="cannot be controlled"):
        specopt.param_groups(model, overrides={nn.Linear: {"spectral": True}})
    with pytest.raises(ValueError, match="before it is parametrized"):
        specopt.init.scaled_orthogonal_(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        specopt.param_groups(model, overrides={"0*": {"spectral": False}})


def test_an_adapter_of_two_linears_is_two_matrices_whose_second_is_only_capped() -> None:
    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(12, 10).requires_grad_(False)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(12, 4, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(4, 10, bias=False)})
            nn.init.zeros_(self.lora_B.get_parameter("default.weight"))

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Adapter()
    optimizer = specopt.NormScaleAdamW(model, lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 12)).square().sum().backward()
        optimizer.step()
    rows = {row.name: row for row in specopt.spectral_report(optimizer)}
    a, b = rows["lora_A.default.weight"], rows["lora_B.default.weight"]
    assert a.target is not None and b.target is not None
    assert a.target * b.target == pytest.approx(math.sqrt(10 / 12))
    assert b.capped and 0 < b.sigma < 0.05


def test_unknown_modules_stay_uncontrolled_and_are_named_once(kind: str) -> None:
    with pytest.warns(UserWarning) as caught:
        optimizer = OPTIMIZERS[kind](nn.Sequential(Odd(), nn.Linear(3, 3)))
    assert len(caught) == 1 and caught[0].filename == modules.__file__
    message = str(caught[0].message)
    for name, shape in (("position", "(1, 6, 4)"), ("experts", "(3, 5, 4)"), ("table", "(5, 4)")):
        assert f"0.{name} {shape}: nothing is known of {name} in Odd" in message
    assert "relative_position_bias" in message and "scale" not in message
    assert [row.name for row in specopt.spectral_report(optimizer)] == ["1.weight"]


def test_bare_tensors_of_unclear_shape_are_named_once_with_their_shapes(kind: str) -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Conv2d(1, 4, 3), nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.warns(UserWarning, match="does not tell how to read") as caught:
        optimizer = OPTIMIZERS[kind](model.named_parameters())
    assert len(caught) == 1 and caught[0].filename == modules.__file__
    assert "2 parameter(s)" in str(caught[0].message)
    assert "0.weight (4, 3, 3), 1.weight (4, 1, 3, 3)" in str(caught[0].message)
    with pytest.warns(UserWarning, match=r"late \(3, 3, 3\)") as caught:
        optimizer.add_param_group({"params": [("late", nn.Parameter(torch.zeros(3, 3, 3)))]})
    assert len(caught) == 1 and caught[0].filename == __file__


def test_clear_vouched_for_and_uncontrolled_tensors_are_not_warned_of(kind: str) -> None:
    odd = nn.Parameter(torch.zeros(3, 3, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OPTIMIZERS[kind](everything())
        OPTIMIZERS[kind]([odd], view="flatten")
        OPTIMIZERS[kind]([{"params": [odd], "spectral": False}, {"params": [nn.Parameter(torch.zeros(3))]}])
        OPTIMIZERS[kind]([nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(4, 3, 2, 2))])


@pytest.mark.parametrize("make", [specopt.SNRSGD, specopt.param_groups, specopt.init.scaled_orthogonal_])
def test_lazy_modules_are_refused_by_name_until_they_have_seen_an_input(make: Callable[[nn.Module], Any]) -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyConv1d(3, 2))
    with pytest.raises(ValueError, match=r"0\.weight is not initialized.*run the model"):
        make(model)
    model(torch.zeros(2, 3, 5))
    make(model)


def test_a_bare_lazy_parameter_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="not initialized"):
        OPTIMIZERS[kind](nn.LazyLinear(4).parameters())


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_empty_weights_and_those_of_other_dtypes_are_left_to_the_base(kind: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3, dtype=torch.complex64), nn.Linear(3, 3), nn.Linear(0, 3))
    assert controlled(model) == {"1.weight"}
    optimizer = OPTIMIZERS[kind](model)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert all(bool(param.isfinite().all()) for param in model.parameters())
