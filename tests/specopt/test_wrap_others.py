"""wrap() on torch's optimizers and on packaged ones, against the optimizer itself and float64 SVD."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lion_pytorch
import prodigyopt
import pytest
import pytorch_optimizer
import torch
from torch import Tensor
from torch.optim import Optimizer

import specopt
from specopt.tracker.common import PREFIX, STATS, STEP
from tests.specopt.helpers import clones, equal, exact, set_gradients, train, with_spectrum

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")
BASES: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=1e-3, momentum=0.9, centered=True),
    "Muon": lambda params: torch.optim.Muon(params, lr=1e-2),
    "pytorch_optimizer.AdaBelief": lambda params: pytorch_optimizer.AdaBelief(params, lr=1e-2),
    "prodigyopt.Prodigy": lambda params: prodigyopt.Prodigy(params, lr=1.0),
    "lion_pytorch.Lion": lambda params: lion_pytorch.Lion(params, lr=1e-3, weight_decay=0.1),
}
RULES: dict[str, specopt.SpectralPenalty | specopt.SpectralDecay | specopt.NormScale] = {
    "penalty": specopt.SpectralPenalty(0.5),
    "decay": specopt.SpectralDecay(2.0),
    "set": specopt.NormScale(),
}
TIGHT: dict[str, Any] = {"tolerance": 1e-7, "max_passes": 200}


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=RULES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def weights(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """One that is tracked and one that is solved exactly."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(66, 72), (20, 24)]
    return [with_spectrum(shape, dtype, 0.05, generator).requires_grad_() for shape in shapes]


def test_set_leaves_sigma_star_after_every_step(base: str) -> None:
    params = weights()
    optimizer = specopt.wrap(BASES[base](params), specopt.NormScale(**TIGHT))
    for step in range(4):
        before = clones(params)
        train(optimizer, params, range(step, step + 1))
        for param, old in zip(params, before, strict=True):
            assert not torch.equal(param, old)
            found = exact(param)[1]
            star = math.sqrt(param.shape[0] / param.shape[1])
            assert float((found - star).abs().min()) <= 1e-6 * star  # sigma1 is set, and another may be larger now


def test_first_singular_value_is_the_target_where_the_others_are_below_it(base: str) -> None:
    params = weights()
    optimizer = specopt.wrap(BASES[base](params), specopt.NormScale(target=4.0, **TIGHT))
    train(optimizer, params, range(1))
    for param in params:
        assert float(exact(param)[1][0]) == pytest.approx(4.0, rel=1e-9)


def test_penalty_equals_autograd_of_half_lambda_sigma_squared(base: str) -> None:
    params = weights()
    others = clones(params)
    ours, plain = specopt.wrap(BASES[base](params), specopt.SpectralPenalty(0.5, **TIGHT)), BASES[base](others)
    for step in range(3):
        set_gradients(params, others, seed=step)
        with torch.no_grad():
            for param, other in zip(params, others, strict=True):
                other.copy_(param)
        for other in others:
            penalty = 0.25 * torch.linalg.svdvals(other)[0] ** 2
            assert other.grad is not None
            other.grad += torch.autograd.grad(penalty, other)[0]
        ours.step()
        plain.step()
        for param, other in zip(params, others, strict=True):
            assert torch.allclose(param, other, rtol=1e-5, atol=1e-7)


def test_gradients_are_the_same_objects_with_the_same_values(base: str, kind: str) -> None:
    params = weights()
    optimizer = specopt.wrap(BASES[base](params), specopt.SpectralPenalty(0.5))
    set_gradients(params, clones(params), seed=0)
    before = [(param.grad, param.grad.clone()) for param in params if param.grad is not None]
    optimizer.step()
    for param, (grad, value) in zip(params, before, strict=True):
        assert param.grad is grad
        assert torch.equal(grad, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_dict_resumes_bit_for_bit(base: str, kind: str, dtype: torch.dtype) -> None:
    params = weights(dtype)
    optimizer = specopt.wrap(BASES[base](params), RULES[kind])
    train(optimizer, params, range(3))
    file = io.BytesIO()
    torch.save({"weights": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
    train(optimizer, params, range(3, 6))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others = [weight.requires_grad_() for weight in saved["weights"]]
    resumed = specopt.wrap(BASES[base](others), replace(RULES[kind], tolerance=0.5))
    resumed.load_state_dict(saved["optimizer"])
    train(resumed, others, range(3, 6))
    assert equal(params, others)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_are_under_the_rule_and_go_on_bit_for_bit(base: str, kind: str, copied: Callable[[Any], Any]) -> None:
    params = weights(torch.float32)
    optimizer: Any = specopt.wrap(BASES[base](params), RULES[kind])
    train(optimizer, params, range(2))
    twin = copied(optimizer)
    assert type(twin) is type(optimizer) and twin.rule == RULES[kind]
    for name, value in vars(BASES[base](weights())).items():
        vars(twin).setdefault(name, value)  # some packages' optimizers lose attributes by a copy, wrapped or not
    others = [param for group in twin.param_groups for param in group["params"]]
    train(optimizer, params, range(2, 4))
    train(twin, others, range(2, 4))
    assert equal(params, others)


def test_state_of_the_base_is_what_it_is_without_a_rule(base: str, kind: str) -> None:
    params, others = weights(torch.float32), weights(torch.float32)
    ours, plain = specopt.wrap(BASES[base](params), RULES[kind]), BASES[base](others)
    train(ours, params, range(2))
    train(plain, others, range(2))
    for param, other in zip(params, others, strict=True):
        mine = ours.state[param]
        assert STATS in mine and mine[STEP] == 2
        assert {name for name in mine if not name.startswith(PREFIX)} == set(plain.state[other])


def test_unwrapped_optimizer_goes_on_as_the_plain_one_would(base: str, kind: str) -> None:
    params = weights(torch.float32)
    plain = BASES[base](params)
    cls, keys = type(plain), [set(group) for group in plain.param_groups]
    optimizer = specopt.wrap(plain, RULES[kind])
    train(optimizer, params, range(2))
    assert specopt.unwrap(optimizer) is plain and type(plain) is cls
    assert not any(name.startswith(PREFIX) for state in plain.state.values() for name in state)
    assert [set(group) & set(RULES[kind].options) for group in plain.param_groups] == [set()] * len(keys)
    others = clones(params)
    twin = BASES[base](others)
    twin.load_state_dict(copy.deepcopy(plain.state_dict()))
    train(plain, params, range(2, 4))
    train(twin, others, range(2, 4))
    assert equal(params, others)
