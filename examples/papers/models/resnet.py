"""Residual networks: with basic blocks, and with bottlenecks in the standard form and in that of Norm Scaling."""

from __future__ import annotations

from torch import Tensor, nn

from .parts import Shape, conv_bn, scaled

CHANNELS = (64, 128, 256, 512)
BLOCKS = (3, 4, 6, 3)
"""Of each stage, in ResNet-34 and ResNet-50 alike."""


class Residual(nn.Module):
    """``x -> ReLU(branch(x) + shortcut(x))``, the shortcut a 1 x 1 convolution with batch norm where size or channels
    change, else the input itself."""

    def __init__(self, branch: nn.Sequential, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = branch
        changes = stride > 1 or inputs != outputs
        self.downsample = conv_bn(inputs, outputs, 1, stride) if changes else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.branch(x) + self.downsample(x))
        return out


class Basic(Residual):
    """Two 3 x 3 convolutions."""

    EXPANSION = 1

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        branch = nn.Sequential(conv_bn(inputs, channels, 3, stride), nn.ReLU(), conv_bn(channels, channels, 3))
        super().__init__(branch, inputs, channels, stride)


class Bottleneck(Residual):
    """Convolutions 1 x 1, 3 x 3 (with the stride) and 1 x 1, the last to four times the channels."""

    EXPANSION = 4

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        outputs = self.EXPANSION * channels
        branch = nn.Sequential(
            conv_bn(inputs, channels, 1), nn.ReLU(),
            conv_bn(channels, channels, 3, stride), nn.ReLU(),
            conv_bn(channels, outputs, 1),
        )  # fmt: skip
        super().__init__(branch, inputs, outputs, stride)


class ResNet(nn.Module):
    """A stem, four stages of residual blocks, each but the first at half the size before, mean over positions, head.

    He, Zhang, Ren and Sun, arXiv 1512.03385, with the stride of a bottleneck in its 3 x 3 convolution.
    """

    def __init__(self, classes: int, *, stem: nn.Module, block: type[Basic | Bottleneck], scale: float) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList()
        inputs = scaled(CHANNELS[0], scale)
        for stage, (unscaled, count) in enumerate(zip(CHANNELS, BLOCKS, strict=True)):
            channels, blocks = scaled(unscaled, scale), []
            for i in range(count):
                blocks.append(block(inputs, channels, stride=2 if stage > 0 and i == 0 else 1))
                inputs = block.EXPANSION * channels
            self.stages.append(nn.Sequential(*blocks))
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, classes)``"""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def resnet34(shape: Shape, classes: int, *, scale: float = 1.0) -> ResNet:
    """Basic blocks, a 3 x 3 stem and no max-pool, as is usual for CIFAR: 21,328,292 parameters for 100 classes.

    Norm Scaling's authors build all their ResNets of bottlenecks, and how their 34 differs from their 50 is not in our
    documents. This is the network that the name stands for elsewhere.
    """
    return ResNet(classes, stem=_small_stem(shape, scale), block=Basic, scale=scale)


def resnet50_cifar(shape: Shape, classes: int, *, scale: float = 1.0) -> ResNet:
    """The variant of Norm Scaling's authors: bottlenecks, a 3 x 3 stem and no max-pool. 23,705,252 parameters for 100
    classes."""
    return ResNet(classes, stem=_small_stem(shape, scale), block=Bottleneck, scale=scale)


def resnet50(shape: Shape, classes: int, *, scale: float = 1.0) -> ResNet:
    """The standard one: a 7 x 7 stem of stride 2 and a 3 x 3 max-pool before the stages. 25,557,032 parameters for 1000
    classes."""
    stem = nn.Sequential(*_stem(shape, scale, kernel=7, stride=2), nn.MaxPool2d(3, 2, padding=1))
    return ResNet(classes, stem=stem, block=Bottleneck, scale=scale)


def _small_stem(shape: Shape, scale: float) -> nn.Sequential:
    return _stem(shape, scale, kernel=3, stride=1)


def _stem(shape: Shape, scale: float, *, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(conv_bn(shape.channels, scaled(CHANNELS[0], scale), kernel, stride), nn.ReLU())
