"""VGG-16 in its form for CIFAR."""

from __future__ import annotations

from torch import Tensor, nn

from .parts import Shape, conv_bn, scaled

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of the convolutions before each max-pool: configuration D."""


class VGG16(nn.Module):
    """Thirteen 3 x 3 convolutions with batch norm and ReLU, a 2 x 2 max-pool after each stage, and a linear head on the
    mean over the positions that are left.

    Simonyan and Zisserman, arXiv 1409.1556, configuration D, whose two hidden layers of 4096 are for 224 x 224 images:
    at 32 x 32 one position is left and the head alone follows, as is usual for CIFAR. The documents do not say which
    form the SNR paper took. Pools round sizes up, so that 28 x 28 images pass all five.
    """

    def __init__(self, shape: Shape, classes: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        inputs = shape.channels
        for stage in STAGES:
            layers: list[nn.Module] = []
            for channels in stage:
                outputs = scaled(channels, scale)
                layers += [conv_bn(inputs, outputs, 3), nn.ReLU()]
                inputs = outputs
            self.stages.append(nn.Sequential(*layers, nn.MaxPool2d(2, ceil_mode=True)))
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, classes)``"""
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits
