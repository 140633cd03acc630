"""SNRSGD's half product of the next step, made with the update of this one: a hint that changes no bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import specopt
from benchmarks import sigma
from specopt.kernels.products import reference as products
from specopt.tracker import halves
from specopt.tracker.common import COLD_STEPS, STATS, Stat

CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels have their own")
pytestmark = CPU_ONLY


@pytest.fixture(autouse=True)
def slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SLICE", 3000)
    monkeypatch.setattr(products, "LARGE", 1)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in pairwise((80, 120, 90, 70))]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())]).to(dtype)


def train(model: nn.Module, optimizer: Any, steps: range, write: Callable[[Tensor], Any] | None = None) -> None:
    dtype = next(model.parameters()).dtype
    for step in steps:
        batch = torch.randn(16, 80, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        if write is not None:
            with torch.no_grad():
                for param in model.parameters():
                    write(param)


def equal(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


class Uses:
    """How often a product that was made ahead was there, and taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken: list[bool] = []
        function = halves.Ahead.product_of

        def product_of(ahead: Any, matrix: Any) -> Tensor | None:
            product = function(ahead, matrix)
            self.taken.append(product is not None)
            return product

        monkeypatch.setattr(halves.Ahead, "product_of", product_of)


@pytest.fixture
def uses(monkeypatch: pytest.MonkeyPatch) -> Iterator[Uses]:
    yield Uses(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_steps_with_and_without_it_have_the_same_bits(dtype: torch.dtype, uses: Uses) -> None:
    models = network(dtype), network(dtype)
    first, second = (specopt.SNRSGD(model.parameters(), lr=0.1, momentum=0.9) for model in models)
    for step in range(COLD_STEPS + 4):
        train(models[0], first, range(step, step + 1))
        train(models[1], second, range(step, step + 1))
        second.__dict__.pop("_workspace")
        assert equal(*models)
    assert len(uses.taken) == 3 * (COLD_STEPS + 3) and all(uses.taken)


def test_it_does_not_outlive_a_copy_and_a_resumed_run_has_the_same_bits(uses: Uses) -> None:
    model = network()
    optimizer = specopt.SNRSGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, range(5))
    twin = copy.deepcopy(model)
    resumed = specopt.SNRSGD(twin.parameters(), lr=0.1, momentum=0.9)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert not any(isinstance(value, halves.Ahead) for state in optimizer.state.values() for value in state.values())
    uses.taken.clear()
    train(model, optimizer, range(5, 8))
    train(twin, resumed, range(5, 8))
    assert len(uses.taken) == 3 * 3 + 3 * 2 and all(uses.taken)
    assert equal(model, twin)


@pytest.mark.parametrize(
    "write",
    [
        lambda param: param.clamp_(-0.2, 0.2),
        lambda param: param.data.mul_(0.99),
        lambda param: setattr(param, "data", param.data * 0.99),
    ],
    ids=["in place", "through data", "other data"],
)
def test_it_is_made_again_where_a_weight_was_written_to(write: Callable[[Tensor], Any], uses: Uses) -> None:
    models = network(), network()
    first, second = (specopt.SNRSGD(model.parameters(), lr=0.1, momentum=0.9) for model in models)
    for step in range(6):
        train(models[0], first, range(step, step + 1), write)
        train(models[1], second, range(step, step + 1), write)
        second.__dict__.pop("_workspace")
        assert equal(*models)
    assert uses.taken and not any(uses.taken)


def test_another_state_is_not_met_by_an_old_product(uses: Uses) -> None:
    model = network()
    optimizer = specopt.SNRSGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, range(3))
    optimizer.load_state_dict(optimizer.state_dict())
    uses.taken.clear()
    train(model, optimizer, range(3, 4))
    assert not any(uses.taken)
    with torch.no_grad():
        optimizer.state[model[0].weight]["spectral_left"].mul_(1.0)
        optimizer.state[model[0].weight]["spectral_right"].mul_(1.0)
    uses.taken.clear()
    train(model, optimizer, range(4, 5))
    assert uses.taken.count(False) == 1


def test_whole_weight_replaced_unseen_is_followed_again_within_three_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halves.Ahead, "_sampled", staticmethod(lambda matrix: torch.zeros(1)))
    model = network()
    optimizer = specopt.SNRSGD(model.parameters(), lr=0.01, momentum=0.9)
    train(model, optimizer, range(COLD_STEPS + 3))
    weights = [param for param in model.parameters() if param.ndim == 2]
    generator = torch.Generator().manual_seed(1)
    for weight in weights:
        weight.data.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5)
    errors = []
    for step in range(COLD_STEPS + 3, COLD_STEPS + 10):
        exact = [sigma.spectral_norm(weight.detach()) for weight in weights]
        train(model, optimizer, range(step, step + 1))
        found = [float(optimizer.state[weight][STATS][Stat.SIGMA]) for weight in weights]
        errors.append(max(abs(f / e - 1) for f, e in zip(found, exact, strict=True)))
    assert errors[0] > 1e-2 > max(errors[3:])
