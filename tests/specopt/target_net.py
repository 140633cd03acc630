"""Networks and steps for the tests of targets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from specopt import MatrixInfo
from specopt.views.parts import parse, pieces
from tests.specopt.helpers import with_spectrum


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4)
        self.up = nn.ConvTranspose2d(12, 4, 2, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.lstm = nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.up(self.grouped(self.conv(x))))
        return self.head(self.lstm(x.flatten(2).mT)[0])  # type: ignore[no-any-return]


def of_shape(matrix: MatrixInfo) -> float:
    """Another number for each matrix."""
    return 0.5 + matrix.shape[0] / 8 + (matrix.part or 0) / 16


def step(optimizer: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = 0.1 * torch.randn(param.shape, generator=generator)
    optimizer.step()


def norms(optimizer: Any) -> dict[str, float]:
    """The largest singular value of every controlled matrix, by float64 SVD."""
    found: dict[str, Any] = {}
    for matrix in optimizer.matrices(with_grad=False):
        part = pieces(matrix.param.detach().double(), parse(matrix.group["view"]))[matrix.part or 0]
        found[optimizer.names()[matrix.param] + matrix.suffix] = float(torch.linalg.svdvals(part.flatten(1))[0])
    return found


SHAPES = [(24, 20), (6, 9)]
"""With blocks of 4 columns a tracked matrix, and a complete one."""


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(with_spectrum(shape, torch.float32, 0.3, generator)) for shape in SHAPES]


def entries(optimizer: Any) -> dict[str, Any]:
    """What the groups hold for each parameter."""
    found: dict[str, Any] = {}
    for group in optimizer.param_groups:
        each = group["target"] if isinstance(group["target"], list) else [group["target"]] * len(group["params"])
        names = group.get("param_names") or [str(place) for place in range(len(each))]
        found.update(zip(names, each, strict=True))
    return found
