"""The optimizers on the Triton kernels (interpreted on the CPU, native on a GPU) against the torch reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer, RMSprop

import specopt
from specopt.kernels import backend_for
from specopt.tracker.common import COLD_STEPS, STATS, STEP, Stat
from tests.specopt.helpers import DEVICE, with_spectrum

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")
SHAPES = [(24, 17), (17, 24), (12, 4, 2, 2), (3, 9), (5,)]


def composed(groups: Any, **tight: Any) -> Any:
    rule = specopt.Compose(specopt.SpectralPenalty(0.3, **tight), specopt.NormScale(mode="cap", target=0.8, rank=2))
    return specopt.wrap(SGD(groups, lr=0.1), rule)


RULES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "snr": (specopt.SNRSGD, {"lr": 0.1, "momentum": 0.9, "snr_lambda": 0.3}),
    "set": (specopt.NormScaleAdamW, {"lr": 1e-2}),
    "rescale": (specopt.NormScaleAdamW, {"lr": 1e-2, "mode": "rescale"}),
    "frobenius": (specopt.NormScaleAdamW, {"lr": 1e-2, "norm": "frobenius"}),
    "full": (specopt.NormScaleAdamW, {"lr": 1e-2, "mode": "cap", "rank": "full", "target": 0.8}),
}
MORE: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "rank 2": (specopt.NormScaleAdamW, {"lr": 1e-2, "rank": 2, "target": 1.5}),
    "composed": (composed, {}),
}

TIGHT: dict[str, Any] = {"tolerance": 1e-4, "max_passes": 12}
WRAPPED: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW, decay": lambda groups: specopt.wrap(AdamW(groups, lr=1e-2), specopt.SpectralDecay(2.0, **TIGHT)),
    "SGD, decay": lambda groups: specopt.wrap(SGD(groups, momentum=0.9), specopt.SpectralDecay(2.0, **TIGHT)),
    "RMSprop, decay": lambda groups: specopt.wrap(RMSprop(groups), specopt.SpectralDecay(2.0, **TIGHT)),
    "SGD, set": lambda groups: specopt.wrap(SGD(groups, momentum=0.9), specopt.NormScale(**TIGHT)),
    "AdamW, penalty": lambda groups: specopt.wrap(AdamW(groups, lr=1e-2), specopt.SpectralPenalty(0.3, **TIGHT)),
}


def train(kind: str, dtype: torch.dtype, steps: int) -> tuple[list[Tensor], Any]:
    generator = torch.Generator().manual_seed(0)
    weights = [with_spectrum(shape, dtype, 0.05, generator) if len(shape) > 1 else torch.ones(5) for shape in SHAPES]
    params = [weight.to(DEVICE).requires_grad_() for weight in weights]
    cls, options = (RULES | MORE)[kind]
    tight: dict[str, Any] = {"tolerance": 1e-4, "max_passes": 12}
    groups = [{"params": params[:1], "block": 3}, {"params": params[1:], "block": 8}]
    optimizer = cls(groups, **options, **tight)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param)
        optimizer.step()
    return [param.detach().cpu() for param in params], optimizer


@pytest.mark.parametrize(  # of what is full here, test_device_step.py compares each step
    "kind",
    [pytest.param(kind, marks=pytest.mark.full if kind in ("snr", "set", "rescale") else ()) for kind in RULES],
)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)])
def test_step_on_triton_equals_step_on_the_reference(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = {}
    for backend in ("reference", "triton"):
        monkeypatch.setenv("SPECOPT_BACKEND", backend)
        assert backend_for(DEVICE, torch.float32) == backend
        results[backend], _ = train(kind, dtype, steps=2)
    for reference, triton in zip(results["reference"], results["triton"], strict=True):
        allowed = 1e-4 if dtype == torch.float32 else 2e-2
        assert (reference - triton).float().norm() <= allowed * reference.float().norm()


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.full if kind != "SGD, decay" else ()) for kind in WRAPPED],
)
def test_wrapped_step_on_triton_equals_step_on_the_reference(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step is torch's with our corrections, the second our passes' where they know the base."""
    results = []
    for backend in ("reference", "triton"):
        monkeypatch.setenv("SPECOPT_BACKEND", backend)
        generator = torch.Generator().manual_seed(0)
        params = [with_spectrum(shape, torch.float32, 0.3, generator).to(DEVICE) for shape in [(24, 17), (3, 9)]]
        optimizer = WRAPPED[kind]([{"params": [param.requires_grad_() for param in params], "block": 8}])
        for _ in range(2):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).to(param)
            optimizer.step()
        results.append([param.detach().cpu() for param in params])
        made: Any = vars(optimizer)["_workspace"]["batches"]
        assert {batch.ours for batch in made} == {not kind.startswith("RMSprop")}
    for reference, triton in zip(*results, strict=True):
        assert (reference - triton).norm() <= 1e-4 * reference.norm()


@pytest.mark.full
def test_same_bits_in_two_runs_on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECOPT_BACKEND", "triton")
    first, second = (train("set", torch.float32, steps=2)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_unknown_backend_and_triton_without_its_interpreter_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setenv("SPECOPT_BACKEND", "cuda")
    with pytest.raises(ValueError, match="'reference' or 'triton', got 'cuda'"):
        backend_for(cpu, torch.float32)
    monkeypatch.setenv("SPECOPT_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        backend_for(cpu, torch.float32)
    assert backend_for(cpu, torch.float64) == "reference"
    monkeypatch.delenv("SPECOPT_BACKEND")
    assert backend_for(cpu, torch.float32) == "reference"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks a GPU whether the host ever waits for it")
@pytest.mark.parametrize("kind", RULES | MORE)
def test_step_on_a_gpu_never_waits_for_the_device(kind: str) -> None:
    _, optimizer = train(kind, torch.float32, steps=2)
    for group in optimizer.param_groups:
        group["foreach"] = True
    for cold in (True, False):
        if not cold:
            for state in optimizer.state.values():
                if STATS in state:
                    state[STEP] = COLD_STEPS
                    state[STATS][Stat.COUNT] = COLD_STEPS
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
