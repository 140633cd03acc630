"""Rules are values; what no rule can go by is refused, and stays as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

import specopt
from tests.specopt.helpers import parameters
from tests.specopt.wrapped import PENALTY, SET, Bare

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")


def test_rules_are_immutable_comparable_values_with_short_reprs() -> None:
    assert specopt.SpectralPenalty(0.1) == specopt.SpectralPenalty(lam=0.1) != specopt.SpectralPenalty(0.2)
    assert len({specopt.NormScale(), specopt.NormScale(mode="set"), specopt.NormScale(mode="cap")}) == 2
    assert repr(specopt.NormScale(mode="cap", block=16)) == "NormScale(block=16, mode='cap')"
    with pytest.raises(dataclasses.FrozenInstanceError):
        PENALTY.lam = 1.0  # type: ignore[misc]
    assert PENALTY.options["snr_lambda"] == 0.3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: specopt.SpectralPenalty(-1.0), "lam must be a finite number >= 0, got -1.0"),
        (lambda: specopt.SpectralPenalty(True), "lam must be a finite number >= 0, got True"),
        (lambda: specopt.SpectralPenalty(0.1, block=0), "block must be an integer from 1 to 64, got 0"),
        (lambda: specopt.NormScale(mode="lower"), "mode .* must be one of .*, got 'lower'"),
        (lambda: specopt.NormScale(norm="frobenius", mode="rescale"), "mode .* got 'rescale'"),
        (lambda: specopt.NormScale(target=0.0), "target must be .*, got 0.0"),
        (lambda: specopt.NormScale(geometry=["conv2d(7x7)"]), r"geometry .* group alone.*got \['conv2d\(7x7\)'\]"),
        (lambda: specopt.SpectralPenalty(0.1, conv="operator", geometry=[None]), r"geometry .* got \[None\]"),
        (lambda: specopt.SpectralDecay(0.1, geometry=()), r"geometry .* got \(\)"),
    ],
)
def test_rules_refuse_senseless_options(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


class NeedsClosure(SGD):
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        return super().step(closure)


class OwnBlock(Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "block": 7})


class OwnNames(Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.matrices = 3


def patched(params: Any) -> Optimizer:
    optimizer = SGD(params)
    optimizer.step = lambda closure=None: None  # type: ignore[method-assign]
    return optimizer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (torch.optim.LBFGS, "optimizer must not be LBFGS: it evaluates the closure several times"),
        (torch.optim.SparseAdam, "optimizer must not be SparseAdam: it takes sparse gradients alone"),
        (specopt.SNRSGD, "must not be under a rule already, but SNRSGD is, SpectralPenalty"),
        (lambda params: specopt.wrap(SGD(params), PENALTY), "must not be under a rule already, but SGD is"),
        (NeedsClosure, "NeedsClosure.step needs closure"),
        (OwnBlock, "OwnBlock has something else by these: block"),
        (OwnNames, "OwnNames has something else by these: matrices"),
        (patched, "optimizer.step has been replaced by"),
        (lambda params: SGD([{"params": params, "tolerance": 0.0}]), "tolerance must be a positive finite number"),
        (lambda params: SGD(params, differentiable=True), "differentiable must be False"),
    ],
)
def test_refused_optimizers_stay_as_they_were(make: Callable[[Any], Optimizer], message: str) -> None:
    optimizer = make(parameters(torch.float32))
    cls, keys = type(optimizer), [set(group) for group in optimizer.param_groups]
    with pytest.raises(ValueError, match=message):
        specopt.wrap(optimizer, PENALTY)
    assert type(optimizer) is cls and [set(group) for group in optimizer.param_groups] == keys


def test_what_a_rule_cannot_go_by_is_refused() -> None:
    params = parameters(torch.float32)
    bare, maximizing = Bare(params), SGD(params)
    maximizing.maximize = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="must have lr in every group for SpectralDecay"):
        specopt.wrap(bare, specopt.SpectralDecay(0.1))
    with pytest.raises(ValueError, match="must tell maximize in its groups"):
        specopt.wrap(maximizing, PENALTY)
    assert type(bare) is Bare and type(specopt.wrap(maximizing, SET)) is not SGD


def test_a_weight_that_is_no_matrix_without_a_copy_is_refused() -> None:
    gapped = torch.randn(8, 8, 16, 16)[:, :, ::2, :].requires_grad_()
    optimizer = SGD([gapped])
    with pytest.raises(ValueError, match="contiguous"):
        specopt.wrap(optimizer, PENALTY)
    assert type(optimizer) is SGD


def test_what_is_no_optimizer_or_no_rule_is_refused() -> None:
    optimizer: Any = SGD(parameters(torch.float32))
    for wrong in (specopt.SpectralPenalty, 0.01, None):
        with pytest.raises(TypeError, match=r"rule must be one of specopt.SpectralPenalty"):
            specopt.wrap(optimizer, wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got Linear"):
        specopt.wrap(nn.Linear(2, 2), PENALTY)  # type: ignore[type-var]
    with pytest.raises(TypeError, match=r"optimizer must be one that specopt.wrap returned, got SGD"):
        specopt.unwrap(optimizer)
