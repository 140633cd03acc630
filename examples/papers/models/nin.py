"""Network in Network."""

from __future__ import annotations

from torch import Tensor, nn

from .parts import Shape, conv_bn, dropout_layer, flag, scaled


class NIN(nn.Module):
    """Three convolutions, each followed by two 1 x 1 convolutions; the last of them has a channel for each class, whose
    mean over positions is the logit.

    ======  ==============================  =================================
    block   channels (kernel)               then
    ======  ==============================  =================================
    1       192 (5), 160 (1), 96 (1)        3 x 3 max-pool, stride 2, dropout
    2       192 (5), 192 (1), 192 (1)       3 x 3 mean pool, stride 2, dropout
    3       192 (3), 192 (1), classes (1)   mean over all positions
    ======  ==============================  =================================

    Lin, Chen and Yan, arXiv 1312.4400, with the sizes of the authors' network for CIFAR. A ReLU follows every
    convolution but the last, so that logits take both signs (Chainer's MLPConvolution2D leaves it out too).

    Args:
        dropout: rate after the first two blocks.
        batch_norm: after every convolution but the last. The authors have none, and the documents do not say what the
            SNR paper had. At its learning rate of 1.0 a trial at scale 0.125 was at a loss of 1e20 within five steps
            without it, and went down with it.
    """

    def __init__(
        self, shape: Shape, classes: int, *, dropout: float = 0.5, batch_norm: bool = False, scale: float = 1.0
    ) -> None:
        super().__init__()
        c96, c160, c192 = (scaled(count, scale) for count in (96, 160, 192))
        conv = _conv_bn if flag("batch_norm", batch_norm) else _conv
        self.features = nn.Sequential(
            *conv(shape.channels, c192, 5), *conv(c192, c160, 1), *conv(c160, c96, 1),
            nn.MaxPool2d(3, 2, ceil_mode=True), dropout_layer(dropout),
            *conv(c96, c192, 5), *conv(c192, c192, 1), *conv(c192, c192, 1),
            nn.AvgPool2d(3, 2, ceil_mode=True), dropout_layer(dropout),
            *conv(c192, c192, 3), *conv(c192, c192, 1),
        )  # fmt: skip
        self.head = nn.Conv2d(c192, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, classes)``"""
        logits: Tensor = self.head(self.features(x)).mean((2, 3))
        return logits


def _conv(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.ReLU()]


def _conv_bn(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    return [conv_bn(inputs, outputs, kernel), nn.ReLU()]
