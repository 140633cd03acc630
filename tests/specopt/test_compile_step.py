"""torch.compile with optimizers of ours: compiled models, and a step inside of what is compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import ExponentialLR

import specopt

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves", "ignore:.*torch.jit.script_method.*")
KINDS: dict[str, Callable[[Any], Optimizer]] = {
    "snr": lambda params: specopt.SNRSGD(params, lr=0.1, momentum=0.9),
    "set": lambda params: specopt.NormScaleAdamW(params, lr=1e-3),
    "AdamW, penalty": lambda params: specopt.wrap(AdamW(params), specopt.SpectralPenalty(0.1)),
    "RMSprop, decay": lambda params: specopt.wrap(RMSprop(params), specopt.SpectralDecay(0.1)),
}
STEPS = 4
Step = Callable[[nn.Module, Tensor, Optimizer], Callable[[], object]]


def backward(model: nn.Module, images: Tensor) -> float:
    for param in model.parameters():
        param.grad = None
    loss: Tensor = model(images).square().mean()
    loss.backward()
    return loss.item()


def eager(model: nn.Module, images: Tensor, optimizer: Optimizer) -> Callable[[], object]:
    return lambda: (backward(model, images), optimizer.step())


def model_compiled(model: nn.Module, images: Tensor, optimizer: Optimizer) -> Callable[[], object]:
    compiled: Any = torch.compile(model, backend="aot_eager")
    return lambda: (backward(compiled, images), optimizer.step())


def model_compiled_in_a_closure(model: nn.Module, images: Tensor, optimizer: Optimizer) -> Callable[[], object]:
    compiled: Any = torch.compile(model, backend="aot_eager")

    return lambda: optimizer.step(lambda: backward(compiled, images))


def step_compiled(model: nn.Module, images: Tensor, optimizer: Optimizer) -> Callable[[], object]:
    compiled = torch.compile(optimizer.step, backend="aot_eager")
    return lambda: (backward(model, images), compiled())


def step_in_a_compiled_function(model: nn.Module, images: Tensor, optimizer: Optimizer) -> Callable[[], object]:
    @torch.compile(backend="aot_eager")
    def after() -> Tensor:
        optimizer.step()
        return images + 1

    return lambda: (backward(model, images), after())


def loop_compiled(model: nn.Module, images: Tensor, optimizer: Optimizer) -> Callable[[], object]:
    @torch.compile(backend="aot_eager")
    def iteration() -> Tensor:
        loss: Tensor = model(images).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return iteration


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def trained(kind: str, way: Step, scheduled: bool) -> tuple[list[Tensor], list[str]]:
    """Weights after a few steps of which each has another learning rate, and what was warned of."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 90), nn.Tanh(), nn.Linear(90, 70))
    optimizer = KINDS[kind](model.parameters())
    scheduler = ExponentialLR(optimizer, 0.9) if scheduled else None
    step = way(model, torch.randn(8, 80), optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(STEPS):
            step()
            if scheduler is None:
                optimizer.param_groups[0]["lr"] *= 0.9
            else:
                scheduler.step()
    return [param.detach() for param in model.parameters()], [str(w.message) for w in caught]


def equal(mine: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))


@pytest.mark.parametrize("way", [model_compiled, model_compiled_in_a_closure])
def test_compiled_model_trains_as_the_plain_one_does(kind: str, way: Step) -> None:
    expected, _ = trained(kind, eager, True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found, told = trained(kind, way, True)
    assert equal(found, expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert not [message for message in told if "torch.compile" in message]


@pytest.mark.parametrize("scheduled", [True, False])
@pytest.mark.parametrize("way", [step_compiled, step_in_a_compiled_function, loop_compiled])
def test_step_inside_of_what_is_compiled_is_the_plain_step_and_is_told_of_once(
    kind: str, way: Step, scheduled: bool
) -> None:
    expected, _ = trained(kind, eager, scheduled)
    found, told = trained(kind, way, scheduled)
    assert equal(found, expected)
    assert len([message for message in told if "torch.compile leaves the step" in message]) == 1
    assert counters["stats"]["unique_graphs"] <= 2  # of the model and of the rest, none of the step


@pytest.mark.parametrize("scheduled", [True, False])
@pytest.mark.parametrize("way", [step_compiled, step_in_a_compiled_function])
def test_another_learning_rate_recompiles_nothing(kind: str, way: Step, scheduled: bool) -> None:
    with torch._dynamo.config.patch(error_on_recompile=True):
        trained(kind, way, scheduled)
    assert counters["frames"]["total"] > 0


def test_one_graph_around_a_step_is_refused_by_its_name() -> None:
    model = nn.Linear(80, 90)
    optimizer = specopt.SNRSGD(model.parameters())
    backward(model, torch.randn(8, 80))

    @torch.compile(backend="eager", fullgraph=True)
    def whole() -> None:
        optimizer.step()

    with pytest.raises(torch._dynamo.exc.Unsupported, match="_uncompiled_step"):
        whole()


def test_warnings_of_the_first_step_point_at_its_caller() -> None:
    model = nn.Linear(80, 90)
    optimizer = specopt.NormScaleAdamW(model.parameters(), target=50.0)
    backward(model, torch.randn(8, 80))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert [w.filename for w in caught if "the first step moves" in str(w.message)] == [__file__]
