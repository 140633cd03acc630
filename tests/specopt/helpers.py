"""Weights with a known spectrum, optimizers to train them, and exact answers from float64 SVD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import specopt

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(80, 70), (70, 130), (5, 64), (64, 5), (70, 8, 3, 3), (66, 66), (1, 9), (9, 1), (65, 200), (40, 50)]

OURS: dict[str, Callable[..., Any]] = {
    "snr": lambda params, **kw: specopt.SNRSGD(params, **{"lr": 0.1, "momentum": 0.9, **kw}),
    "set": lambda params, **kw: specopt.NormScaleAdamW(params, **{"lr": 1e-2, **kw}),
    "frobenius": lambda params, **kw: specopt.NormScaleAdamW(params, norm="frobenius", **{"lr": 1e-2, **kw}),
}
PLAIN: dict[str, Callable[..., Optimizer]] = {
    "snr": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    **dict.fromkeys(("set", "frobenius"), lambda params: torch.optim.AdamW(params, lr=1e-2)),
}


def with_spectrum(shape: tuple[int, ...], dtype: torch.dtype, gap: float, generator: torch.Generator) -> Tensor:
    """A weight whose singular values fall from 2 to 0.5, the second ``gap`` below the first."""
    random = torch.randn(shape, generator=generator, dtype=torch.float64).flatten(1)
    u, s, vh = torch.linalg.svd(random, full_matrices=False)
    others = torch.linspace(2 * (1 - gap), 0.5, max(len(s) - 1, 1), dtype=torch.float64)
    values = torch.cat([torch.full_like(others[:1], 2.0), others])
    return ((u * values[: len(s)]) @ vh).view(shape).to(dtype)


def parameters(dtype: torch.dtype, seed: int = 0, gap: float = 0.03) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = [with_spectrum(shape, dtype, gap, generator) for shape in SHAPES]
    weights.append(torch.randn(7, generator=generator).to(dtype))
    return [weight.requires_grad_() for weight in weights]


def clones(params: list[Tensor]) -> list[Tensor]:
    return [param.detach().clone().requires_grad_() for param in params]


def set_gradients(params: list[Tensor], others: list[Tensor], seed: int) -> None:
    """The same random gradients for both lists."""
    generator = torch.Generator().manual_seed(seed)
    for param, other in zip(params, others, strict=True):
        gradient = torch.randn(param.shape, generator=generator).to(param)
        param.grad, other.grad = gradient, gradient.clone()


def train(optimizer: Optimizer, params: list[Tensor], steps: range) -> None:
    for step in steps:
        set_gradients(params, clones(params), seed=step)
        optimizer.step()


def step_at_scale(optimizer: Optimizer, params: list[Tensor], scale: float | None) -> None:
    """A step, or one by a gradient scaler on gradients that are multiplied by ``scale``."""
    set_gradients(params, clones(params), seed=0)
    if scale is None:
        optimizer.step()
        return
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.ones(()))
    for param in params:
        assert param.grad is not None
        param.grad.mul_(scale)
    scaler.step(optimizer)


def equal(mine: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))


def exact(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U, S, Vᵀ) of the matrix view in float64."""
    u, s, vh = torch.linalg.svd(weight.detach().double().flatten(1), full_matrices=False)
    return u, s, vh


def gap_of(singular_values: Tensor) -> float:
    if len(singular_values) == 1:
        return 1.0
    return float((singular_values[0] - singular_values[1]) / singular_values[0])
