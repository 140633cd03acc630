"""The multilayer perceptron of Norm Scaling."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from .parts import Shape, at_least


class MLP(nn.Module):
    """``depth`` Linear layers of ``width`` with ReLU between, on the flattened image.

    5 x 2000 on CIFAR-100 is 3072-2000-2000-2000-2000-100: the depth counts the head.

    Args:
        depth: the number of Linear layers.
        width: of all but the last, which gives the logits.
    """

    def __init__(self, shape: Shape, classes: int, *, depth: int = 5, width: int = 2000) -> None:
        super().__init__()
        at_least("depth", depth, 1)
        at_least("width", width, 1)
        sizes = [shape.channels * shape.height * shape.width, *[width] * (depth - 1)]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.relu = nn.ReLU()
        self.head = nn.Linear(sizes[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, classes)``"""
        x = x.flatten(1)
        for layer in self.layers:
            x = self.relu(layer(x))
        logits: Tensor = self.head(x)
        return logits
