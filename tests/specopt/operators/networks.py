"""Two convolutions under ``conv="operator"``, and how they train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import specopt
from specopt import LayerShapes
from specopt.operators import ConvOperator, Geometry
from tests.specopt.helpers import DEVICE
from tests.specopt.operators.cases import norm

SIZE = (7, 7)

OTHERS: dict[str, Callable[[Any], Optimizer]] = {
    "penalty": lambda groups: specopt.SNRSGD(groups, lr=0.05, momentum=0.9, snr_lambda=0.1),
    "rescale": lambda groups: specopt.NormScaleAdamW(groups, lr=1e-3, mode="rescale"),
    "cap": lambda groups: specopt.NormScaleAdamW(groups, lr=1e-3, mode="cap", target=1.0),
    "both": lambda groups: specopt.wrap(
        torch.optim.AdamW(groups, lr=1e-3),
        specopt.Compose(specopt.SpectralPenalty(0.1), specopt.NormScale(mode="cap", target=1.0)),
    ),
    "decay": lambda groups: specopt.wrap(torch.optim.SGD(groups, lr=0.05), specopt.SpectralDecay(0.1)),
}


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, groups=2),
        nn.Flatten(),
        nn.Linear(36, 48),
    ).to(DEVICE, dtype)


SHAPES = {f"{i}.weight": LayerShapes((c, *SIZE), (0,)) for i, c in ((0, 2), (2, 4))}


def groups_of(network: nn.Module, **options: Any) -> Any:
    return specopt.param_groups(network, conv="operator", shapes=SHAPES, **options)


def operators(network: nn.Sequential) -> list[ConvOperator]:
    convs = [layer for layer in network if isinstance(layer, nn.Conv2d)]
    return [ConvOperator.of(conv.weight.cpu(), Geometry.of(conv, SIZE)) for conv in convs]


def exact(network: nn.Sequential) -> list[float]:
    return [norm(operator) for operator in operators(network)]


def step(network: nn.Module, optimizer: Optimizer, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(network.parameters()).dtype
    inputs = torch.randn(8, 2, *SIZE, generator=generator).to(DEVICE, dtype)
    optimizer.zero_grad()
    network(inputs).float().square().mean().backward()
    optimizer.step()
