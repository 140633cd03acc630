"""What the networks share: checks of their arguments, scaled channel counts, the initial weights."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


class Shape(NamedTuple):
    """Of an image."""

    channels: int
    height: int
    width: int


def check_input(shape: tuple[int, int, int], classes: int) -> None:
    """Whether a network can be made for such images.

    Raises:
        ValueError: ``shape`` is not three whole numbers from 1 up, or there are fewer than two classes.
    """
    if not isinstance(shape, tuple | list) or len(shape) != 3 or not all(_is_count(size, 1) for size in shape):
        raise ValueError(f"shape must be (C, H, W), three whole numbers from 1 up, got {shape!r}")
    at_least("classes", classes, 2)


def at_least(name: str, value: int, least: int) -> int:
    """``value`` itself.

    Raises:
        ValueError: ``value`` is no whole number from ``least`` up.
    """
    if not _is_count(value, least):
        raise ValueError(f"{name} must be a whole number from {least} up, got {value!r}")
    return value


def flag(name: str, value: bool) -> bool:
    """``value`` itself.

    Raises:
        ValueError: ``value`` is neither True nor False.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def dropout_layer(rate: float) -> nn.Dropout:
    """Dropout at ``rate``, the fraction that is set to zero; 0 is none.

    Raises:
        ValueError: ``rate`` is not in [0, 1).
    """
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise ValueError(f"dropout must be a number in [0, 1), got {rate!r}")
    return nn.Dropout(rate)


def scaled(channels: int, scale: float) -> int:
    """``channels`` at scale 1, else ``scale·channels`` rounded to a multiple of 8 (a half upwards), and at least 8.

    Raises:
        ValueError: ``scale`` is no finite number above 0.
    """
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise ValueError(f"scale must be a finite number above 0, got {scale!r}")
    return channels if scale == 1 else max(8, 8 * math.floor(scale * channels / 8 + 0.5))


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """A convolution that keeps the size at stride 1, then batch norm, whose shift takes the place of a bias."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


@torch.no_grad()
def he_normal_(model: Network) -> Network:
    """Weights of Linear and convolution layers from ``N(0, 2/fan_in)``, of the ``head``, which no ReLU follows, from
    ``N(0, 1/fan_in)``; biases 0. Batch norms stay at 1 and 0.

    He, Zhang, Ren and Sun, Delving deep into rectifiers, arXiv 1502.01852.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            gain = 1.0 if name == "head" else 2.0
            module.weight.normal_(0.0, math.sqrt(gain / module.weight[0].numel()))
            if module.bias is not None:
                module.bias.zero_()
    return model


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
