"""LeNet-5 with max-pooling and ReLU."""

from __future__ import annotations

from torch import Tensor, nn

from .parts import Shape, dropout_layer, flag, scaled

LEAST = 16
"""Pixels a side: two unpadded 5 x 5 convolutions, each halved after, leave one position of them."""


class LeNet5(nn.Module):
    """Convolutions 5 x 5 of 20 and 50 channels without padding, each with a ReLU and a 2 x 2 max-pool, then a hidden
    layer of 500: 431,080 parameters on MNIST.

    LeCun, Bottou, Bengio and Haffner (1998) have 6-16-120-84 with sigmoids and subsampling. The text to reproduce
    speaks of one dense hidden layer, ReLU and max-pooling, which is the network that Caffe's MNIST example made known
    as LeNet (``examples/mnist/lenet_train_test.prototxt``: 20, 50, 500); there only the hidden layer has a ReLU, and
    the text's ReLUs are read as after the convolutions too.

    Args:
        dropout: rate after the hidden layer.
        batch_norm: after both convolutions and the hidden layer, before their ReLU.

    Raises:
        ValueError: images of a side below 16 pixels.
    """

    def __init__(
        self, shape: Shape, classes: int, *, dropout: float = 0.0, batch_norm: bool = False, scale: float = 1.0
    ) -> None:
        super().__init__()
        if min(shape.height, shape.width) < LEAST:
            raise ValueError(
                f"lenet5 takes images of {LEAST} x {LEAST} pixels and more, got {shape.height} x {shape.width}"
            )
        flag("batch_norm", batch_norm)
        first, second, hidden = (scaled(count, scale) for count in (20, 50, 500))
        self.conv1 = nn.Conv2d(shape.channels, first, 5)
        self.norm1 = nn.BatchNorm2d(first) if batch_norm else nn.Identity()
        self.conv2 = nn.Conv2d(first, second, 5)
        self.norm2 = nn.BatchNorm2d(second) if batch_norm else nn.Identity()
        positions = _left(shape.height) * _left(shape.width)
        self.hidden = nn.Linear(second * positions, hidden)
        self.norm3 = nn.BatchNorm1d(hidden) if batch_norm else nn.Identity()
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.dropout = dropout_layer(dropout)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, classes)``"""
        x = self.pool(self.relu(self.norm1(self.conv1(x))))
        x = self.pool(self.relu(self.norm2(self.conv2(x))))
        x = self.dropout(self.relu(self.norm3(self.hidden(x.flatten(1)))))
        logits: Tensor = self.head(x)
        return logits


def _left(side: int) -> int:
    """Positions a side after the second pool."""
    return ((side - 4) // 2 - 4) // 2
