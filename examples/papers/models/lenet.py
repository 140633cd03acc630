"""LeNets with max-pooling and ReLU."""

from __future__ import annotations

from torch import Tensor, nn

from .parts import Shape, dropout_layer, flag, scaled


class LeNet5(nn.Module):
    """Convolutions 5 x 5 of 6, 16 and 120 channels, the first padded by 2, each with a ReLU, the first two halved by a
    2 x 2 max-pool; then a hidden layer of 84: 61,706 parameters on MNIST.

    The layers are those of LeCun, Bottou, Bengio and Haffner (1998), whose sigmoids, trained subsampling and sparse
    second convolution are ReLU, max-pooling and a dense one here.

    Args:
        dropout: rate after the hidden layer.
        batch_norm: one, after the hidden layer's ReLU.

    Raises:
        ValueError: images of a side below 28 pixels.
    """

    def __init__(
        self, shape: Shape, classes: int, *, dropout: float = 0.0, batch_norm: bool = False, scale: float = 1.0
    ) -> None:
        super().__init__()
        check_side("lenet5", shape, 28)
        flag("batch_norm", batch_norm)
        first, second, third, hidden = (scaled(count, scale) for count in (6, 16, 120, 84))
        self.conv1 = nn.Conv2d(shape.channels, first, 5, padding=2)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.conv3 = nn.Conv2d(second, third, 5)
        positions = (_halved(shape.height // 2) - 4) * (_halved(shape.width // 2) - 4)
        self.hidden = nn.Linear(third * positions, hidden)
        self.norm = nn.BatchNorm1d(hidden) if batch_norm else nn.Identity()
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.dropout = dropout_layer(dropout)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, classes)``"""
        x = self.pool(self.relu(self.conv1(x)))
        x = self.pool(self.relu(self.conv2(x)))
        x = self.relu(self.conv3(x))
        x = self.dropout(self.norm(self.relu(self.hidden(x.flatten(1)))))
        logits: Tensor = self.head(x)
        return logits


class LeNet(nn.Module):
    """Convolutions 5 x 5 of 20 and 50 channels without padding, each with a ReLU and a 2 x 2 max-pool, then a hidden
    layer of 500: 431,080 parameters on MNIST.

    The layers that Caffe's MNIST example made known as LeNet (``examples/mnist/lenet_train_test.prototxt``); there only
    the hidden layer has a ReLU.

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
        check_side("lenet", shape, 16)
        flag("batch_norm", batch_norm)
        first, second, hidden = (scaled(count, scale) for count in (20, 50, 500))
        self.conv1 = nn.Conv2d(shape.channels, first, 5)
        self.norm1 = nn.BatchNorm2d(first) if batch_norm else nn.Identity()
        self.conv2 = nn.Conv2d(first, second, 5)
        self.norm2 = nn.BatchNorm2d(second) if batch_norm else nn.Identity()
        positions = _halved(_halved(shape.height)) * _halved(_halved(shape.width))
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


def check_side(name: str, shape: Shape, least: int) -> None:
    """
    Raises:
        ValueError: images that leave the last convolution or pool no position.
    """
    if min(shape.height, shape.width) < least:
        raise ValueError(
            f"{name} takes images of {least} x {least} pixels and more, got {shape.height} x {shape.width}"
        )


def _halved(side: int) -> int:
    """Positions a side after an unpadded convolution and its pool."""
    return (side - 4) // 2
