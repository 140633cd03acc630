"""Weights that are several matrices, what each of them is, and optimizers of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.specopt.helpers import DEVICE

# view: shape of the parameter, its matrices by hand, and how many input channels one has
CASES: dict[str, tuple[tuple[int, ...], Callable[[Tensor], list[Tensor]], int]] = {
    "flatten": ((20, 6, 5), lambda w: [w.reshape(20, 30)], 6),
    "rows:3": ((60, 24), lambda w: [w[:20], w[20:40], w[40:]], 24),
    "rows:2": ((40, 6, 2, 2), lambda w: [w[:20].reshape(20, 24), w[20:].reshape(20, 24)], 6),
    "rows:6": ((6, 1, 3, 3), lambda w: [w[i].reshape(1, 9) for i in range(6)], 1),
    "transposed": ((22, 25), lambda w: [w.T], 22),
    "transposed:1": ((8, 21, 2, 2), lambda w: [torch.stack([w[:, o].reshape(-1) for o in range(21)])], 8),
    "transposed:2": (
        (16, 20, 3),
        lambda w: [torch.stack([half[:, o].reshape(-1) for o in range(20)]) for half in (w[:8], w[8:])],
        8,
    ),
    "columns:3": ((24, 60), lambda w: [w[:, :20].T, w[:, 20:40].T, w[:, 40:].T], 24),
    "stack": ((3, 20, 25), lambda w: [w[0], w[1], w[2]], 25),
    "stack-transposed": ((2, 25, 20), lambda w: [w[0].T, w[1].T], 25),
    "bilinear": ((20, 5, 6), lambda w: [w.reshape(20, 30)], 30),
}


def steps() -> Iterator[Any]:
    for view in CASES:
        for block, kind in ((4, "tracked"), (32, "exact")):
            for backend in ("reference", "triton"):
                long = backend == "triton" and block == 4  # tracked in Triton's interpreter
                marks = [pytest.mark.full] if long else []
                yield pytest.param(view, block, backend, id=f"{view}-{kind}-{backend}", marks=marks)


def build(view: str, tensor: Tensor) -> list[Tensor]:
    return CASES[view][1](tensor)


def weight(view: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A parameter whose matrices have singular values well apart: few pairs of products find them."""
    shape = CASES[view][0]
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64).flatten()
    for where in build(view, torch.arange(values.numel()).view(shape)):
        u, s, vh = torch.linalg.svd(values[where], full_matrices=False)
        values[where] = (u * 2 * 0.6 ** torch.arange(len(s), dtype=torch.float64)) @ vh
    return values.view(shape).to(DEVICE, dtype).requires_grad_()


def gradients(params: list[Tensor], seed: int) -> None:
    for param in params:
        generator = torch.Generator().manual_seed(seed)
        param.grad = (0.02 * torch.randn(param.shape, generator=generator)).to(param)


def sigmas(view: str, tensor: Tensor) -> list[float]:
    return [float(torch.linalg.matrix_norm(m, 2)) for m in build(view, tensor.detach().cpu().double())]


def targets(view: str) -> float:
    return math.sqrt(len(build(view, torch.zeros(CASES[view][0]))[0]) / CASES[view][2])


def train(optimizer: Any, params: list[Tensor], steps: range) -> None:
    for step in steps:
        gradients(params, seed=step)
        optimizer.step()
