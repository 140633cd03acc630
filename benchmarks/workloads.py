"""Small real training runs on which the tracker is judged: an MLP, a GPT and a ResNet, each with its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import specopt
from examples.papers import data as published

Data = tuple[Tensor, Tensor]


class Workload(NamedTuple):
    model: nn.Module
    loss: Callable[[], Tensor]
    """The loss of the next batch."""

    def matrices(self) -> dict[str, nn.Parameter]:
        layers = ((name, m) for name, m in self.model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d))
        return {name: layer.weight for name, layer in layers}


def digits() -> Data:
    images, labels = published.digits.images()
    return images.flatten(1) / published.digits.LARGEST, labels


def mnist(folder: Path) -> Data:
    """MNIST's training set as rows of 784."""
    (images, labels), _ = published.mnist.read(folder / "MNIST" / "raw", counts=None)
    return images.flatten(1) / 255, labels


def cifar10(folder: Path) -> Data:
    """The first 20,000 of CIFAR-10's training images."""
    (images, labels), _ = published.cifar.read10(folder / "cifar-10-batches-bin", counts=None)
    return (images[:20_000].double() / 255 - 0.5).float(), labels[:20_000]


def batches(data: Data, size: int, seed: int) -> Iterator[Data]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(data[0]), (size,), generator=generator)
        yield data[0][chosen], data[1][chosen]


def mlp(data: Data, *, width: int = 512, depth: int = 5, orthogonal: bool = False, seed: int = 0) -> Workload:
    torch.manual_seed(seed)
    sizes = [data[0].shape[1], *[width] * (depth - 1), 10]
    layers: list[nn.Module] = []
    for columns, rows in pairwise(sizes):
        layers += [nn.Linear(columns, rows), nn.ReLU()]
    return _classifier(nn.Sequential(*layers[:-1]), data, 128, orthogonal, seed)


class _Residual(nn.Module):
    def __init__(self, columns: int, rows: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(columns, rows, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(rows, rows, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(rows), nn.BatchNorm2d(rows)
        self.short: nn.Module = nn.Identity()
        if stride > 1 or columns != rows:
            self.short = nn.Sequential(nn.Conv2d(columns, rows, 1, stride, bias=False), nn.BatchNorm2d(rows))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.short(x))


def resnet(data: Data, *, orthogonal: bool = True, seed: int = 0) -> Workload:
    """Three residual blocks with batch norm, 32 to 128 channels; digits are taken as 8 x 8 images."""
    torch.manual_seed(seed)
    images = data[0] if data[0].ndim == 4 else data[0].view(-1, 1, 8, 8).expand(-1, 3, -1, -1)
    stem = [nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    blocks = [_Residual(32, 32, 1), _Residual(32, 64, 2), _Residual(64, 128, 2)]
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    return _classifier(model, (images, data[1]), 64, orthogonal, seed)


def _classifier(model: nn.Module, data: Data, size: int, orthogonal: bool, seed: int) -> Workload:
    if orthogonal:
        specopt.init.scaled_orthogonal_(model)
    stream = batches(data, size, seed + 1)

    def loss() -> Tensor:
        images, labels = next(stream)
        return F.cross_entropy(model(images), labels)

    return Workload(model, loss)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            t.view(batch, length, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class _GPT(nn.Module):
    def __init__(self, tokens: int, width: int, length: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(_Block(width, 4), _Block(width, 4))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.tokens(x) + self.places(torch.arange(x.shape[1], device=x.device))
        result: Tensor = self.head(self.norm(self.blocks(hidden)))
        return result


def gpt(*, width: int = 256, tokens: int = 64, length: int = 64, seed: int = 0) -> Workload:
    """Two blocks, torch's default init, on tokens of a fixed random Markov chain: random but learnable."""
    torch.manual_seed(seed)
    model = _GPT(tokens, width, length)
    generator = torch.Generator().manual_seed(seed + 1)
    chain = torch.softmax(2 * torch.randn(tokens, tokens, generator=generator), -1)

    def loss() -> Tensor:
        text = torch.randint(tokens, (16, length + 1), generator=generator)
        for i in range(length):
            text[:, i + 1] = torch.multinomial(chain[text[:, i]], 1, generator=generator)[:, 0]
        return F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    return Workload(model, loss)
