"""The networks whose steps are timed. GPT-2 XL and the Llamas are lists of layers only: they are never run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Workload(NamedTuple):
    title: str
    build: Callable[[], nn.Module]
    inputs: tuple[int, ...] | None = None
    """Shape of a batch; None: only the optimizer's step is timed, on noise for gradients."""
    classes: int = 0
    gpu_only: bool = False
    only: tuple[str, ...] | None = None
    """The optimizers that fit into the memory of one GPU side by side."""


def mlp(width: int, depth: int, inputs: int = 3072, classes: int = 100) -> nn.Module:
    sizes = [inputs, *[width] * (depth - 1), classes]
    layers = [layer for columns, rows in pairwise(sizes) for layer in (nn.Linear(columns, rows), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.short: nn.Module = nn.Identity()
        if inputs != 4 * width:
            self.short = nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        return F.relu(self.norm3(self.conv3(inner)) + self.short(x))


def resnet50() -> nn.Module:
    """For images of 224 x 224 and 1000 classes: 161 parameter tensors, 54 of them matrices, 25.6 M parameters."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inputs = 64
    for width, blocks, first in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(blocks):
            layers.append(_Bottleneck(inputs, width, first if i == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def gpt2(width: int, blocks: int, tokens: int = 50257, places: int = 1024) -> nn.Module:
    """The layers of a GPT-2 whose head shares the embedding; XL is 48 blocks of width 1600, 1.56 G parameters."""
    layers: list[nn.Module] = [nn.Embedding(tokens, width), nn.Embedding(places, width)]
    for _ in range(blocks):
        layers += [nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)]
        layers += [nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)]
    return nn.ModuleList([*layers, nn.LayerNorm(width)])


def llama(width: int, hidden: int, blocks: int, heads: int, groups: int, tokens: int = 128256) -> nn.Module:
    """The layers of a Llama 3, whose queries share ``groups`` keys and values (arXiv:2407.21783, table 3). 8B is 32
    blocks of width 4096 and 14336 in between, 70B is 80 of 8192 and 28672."""
    shared = width // heads * groups
    layers: list[nn.Module] = [nn.Embedding(tokens, width)]
    for _ in range(blocks):
        layers += [nn.RMSNorm(width), *(nn.Linear(width, rows, bias=False) for rows in (width, shared, shared, width))]
        layers += [nn.RMSNorm(width), nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)]
        layers += [nn.Linear(hidden, width, bias=False)]
    return nn.ModuleList([*layers, nn.RMSNorm(width), nn.Linear(width, tokens, bias=False)])


def workload(name: str, width: int = 2000, images: bool = False) -> Workload:
    """``images``: time the whole step of ResNet-50 as well, which takes a GPU."""
    if name == "mlp":
        return Workload(f"MLP 5 x {width}, batch 128, float32", lambda: mlp(width, 5), (128, 3072), 100)
    if name == "mlp7x4000":
        return Workload("MLP 7 x 4000, batch 128, float32", lambda: mlp(4000, 7), (128, 3072), 100)
    if name == "resnet50":
        inputs = (64, 3, 224, 224) if images else None
        return Workload(f"ResNet-50, {'batch 64' if images else 'weights only'}, float32", resnet50, inputs, 1000)
    big = ("SGD fused", "SNRSGD", "AdamW fused", "NormScaleAdamW spectral")
    return Workload("GPT-2 XL, weights only, float32", lambda: gpt2(1600, 48), gpu_only=True, only=big)


WORKLOADS = ("mlp", "mlp7x4000", "resnet50", "gpt2-xl")


def groups(model: nn.Module) -> list[dict[str, object]]:
    """All parameters, those of embeddings in a group without control."""
    tables = {p for layer in model.modules() if isinstance(layer, nn.Embedding) for p in layer.parameters()}
    rest = [p for p in model.parameters() if p not in tables]
    return [{"params": rest}, *([{"params": list(tables), "spectral": False}] if tables else [])]


def matrices(model: nn.Module) -> Iterator[Tensor]:
    """Weights of linear and conv layers, each read as (out, in·k·k)."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            yield layer.weight.flatten(1)


def shapes(build: Callable[[], nn.Module]) -> tuple[list[tuple[int, int]], int]:
    """Rows and columns of the matrices, and the number of all parameters; nothing is allocated."""
    with torch.device("meta"):
        model = build()
    found = [(w.shape[0], w.shape[1]) for w in matrices(model)]
    return found, sum(p.numel() for p in model.parameters())
