"""DenseNet in its plain form for CIFAR."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .parts import Shape, at_least, dropout_layer, scaled

STEM = 16
BLOCKS = 3


class DenseLayer(nn.Module):
    """``x -> [x, conv(ReLU(BN(x)))]``: ``growth`` channels more."""

    def __init__(self, inputs: int, growth: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)
        self.dropout = dropout_layer(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.dropout(self.conv(self.relu(self.norm(x))))], 1)


class Transition(nn.Sequential):
    """``x -> pool(conv(ReLU(BN(x))))``, a 1 x 1 convolution that keeps the channels, and half the size."""

    def __init__(self, channels: int, dropout: float) -> None:
        conv = nn.Conv2d(channels, channels, 1, bias=False)
        super().__init__(
            nn.BatchNorm2d(channels), nn.ReLU(), conv, dropout_layer(dropout), nn.AvgPool2d(2, ceil_mode=True)
        )


class DenseNet(nn.Module):
    """Three blocks of dense layers with transitions between, then batch norm, ReLU, mean over positions and the head.

    Args:
        layers: of each block.
        growth: channels that a layer adds.
        stem: channels of the first convolution.
        dropout: rate after every convolution but the first.
    """

    def __init__(self, shape: Shape, classes: int, *, layers: int, growth: int, stem: int, dropout: float) -> None:
        super().__init__()
        self.stem = nn.Conv2d(shape.channels, stem, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList()
        channels = stem
        for block in range(BLOCKS):
            if block > 0:
                self.blocks.append(Transition(channels, dropout))
            dense = [DenseLayer(channels + i * growth, growth, dropout) for i in range(layers)]
            self.blocks.append(nn.Sequential(*dense))
            channels += layers * growth
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, classes)``"""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.relu(self.norm(x)).mean((2, 3)))
        return logits


def densenet40(
    shape: Shape, classes: int, *, depth: int = 40, growth: int = 12, dropout: float = 0.0, scale: float = 1.0
) -> DenseNet:
    """DenseNet without bottlenecks and compression: Huang, Liu, van der Maaten and Weinberger, arXiv 1608.06993.

    Args:
        depth: convolutions and the head, ``3·layers + 4``: 40 is three blocks of 12 layers.
        growth: channels that a layer adds.
        dropout: rate after every convolution but the first; the paper has 0.2 where images are not augmented.

    Raises:
        ValueError: ``depth`` is not 3·layers + 4.
    """
    at_least("growth", growth, 1)
    if at_least("depth", depth, 7) % BLOCKS != 1:
        raise ValueError(f"depth must be 3 times a number of layers and 4 more, such as 22 or 40, got {depth!r}")
    layers = (depth - 4) // BLOCKS
    return DenseNet(
        shape, classes, layers=layers, growth=scaled(growth, scale), stem=scaled(STEM, scale), dropout=dropout
    )
