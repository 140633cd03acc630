"""Optimizers whose steps go by passes, brought to where a test begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import specopt
from specopt.tracker.common import COLD_STEPS, STATS, STEP, Stat
from tests.specopt.helpers import DEVICE, with_spectrum

SHAPES = [(40, 30), (30, 44), (20, 3, 2, 2), (5,)]
RULES: dict[str, tuple[type, dict[str, Any]]] = {
    "snr": (specopt.SNRSGD, {"lr": 0.05, "momentum": 0.9, "snr_lambda": 0.1}),
    "snr nesterov": (specopt.SNRSGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "snr maximize": (specopt.SNRSGD, {"lr": 0.05, "momentum": 0.5, "dampening": 0.2, "maximize": True}),
    "set": (specopt.NormScaleAdamW, {"lr": 1e-2}),
    "cap": (specopt.NormScaleAdamW, {"lr": 1e-2, "mode": "cap", "amsgrad": True}),
    "rescale": (specopt.NormScaleAdamW, {"lr": 1e-2, "mode": "rescale", "maximize": True}),
    "every second": (specopt.NormScaleAdamW, {"lr": 1e-2, "every": 2}),
    "initial": (specopt.NormScaleAdamW, {"lr": 1e-2, "target": "initial"}),
}


def make(kind: str, **more: Any) -> tuple[Any, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weights = [with_spectrum(s, torch.float32, 0.05, generator) if len(s) > 1 else torch.ones(s) for s in SHAPES]
    params = [weight.to(DEVICE).requires_grad_() for weight in weights]
    cls, options = RULES[kind]
    return cls(params, block=8, **options, **more), params


def set_gradients(params: list[Tensor], seed: int, scale: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        gradient = scale * torch.randn(param.shape, generator=generator).to(param)
        if param.grad is None:
            param.grad = gradient
        else:
            param.grad.copy_(gradient)


def past_the_cold_phase(optimizer: Any, params: list[Tensor]) -> None:
    """One step on the reference, which is quicker than an interpreter, and the count of steps past the cold phase."""
    set_gradients(params, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECOPT_BACKEND", "reference")
        optimizer.step()
    for param in params:
        if STATS in optimizer.state[param]:
            optimizer.state[param][STEP] = COLD_STEPS
            optimizer.state[param][STATS][Stat.COUNT] = COLD_STEPS


def warm(optimizer: Any, params: list[Tensor]) -> None:
    """Past the cold phase, and two steps of the same gradients by the kernels: buffers are made, tables uploaded."""
    past_the_cold_phase(optimizer, params)
    for _ in range(2):
        set_gradients(params, 1)
        optimizer.step()


def engines(optimizer: Any) -> list[Any]:
    return [kept for key, kept in optimizer._workspace.items() if key[0] == "engine"]
