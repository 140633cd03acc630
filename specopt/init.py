"""Initialization that starts where Norm Scaling's targets are."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized

from specopt.kernels import accumulation_dtype


@torch.no_grad()
def scaled_orthogonal_(module: nn.Module, gain: float = 1.0, generator: torch.Generator | None = None) -> nn.Module:
    """Every Linear and conv weight of ``module``: orthogonal, times ``gain · sqrt(out / in)`` over channels, in place.

    A conv kernel is read as ``(out, in·k·k)``, a transposed conv with its output channels as rows, a grouped one group
    by group; all singular values of such a matrix are then ``gain · sqrt(out / in)`` with the out and in of a group.
    Other modules and all biases stay as they are.

    Raises:
        ValueError: a gain that is not a positive finite number, or a layer whose weight is parametrized (it is computed
            from other tensors, which this would leave as they are).

    Source: Norm Scaling (December 2023), with channels for layer sizes; Saxe et al., arXiv 1312.6120.
    """
    if not 0 < gain < math.inf:
        raise ValueError(f"gain must be a positive finite number, got {gain!r}")
    for layer in module.modules():
        if isinstance(layer, nn.Linear | _ConvNd):
            if is_parametrized(layer, "weight") or not isinstance(layer.weight, nn.Parameter):
                raise ValueError(f"the weight of {layer} is parametrized; initialize it before the parametrization")
            for part in _groups(layer):
                _fill(part, gain, generator)
    return module


def _groups(layer: nn.Linear | _ConvNd) -> list[Tensor]:
    """The weight of each group as (out, in, *kernel)."""
    weight: Tensor = layer.weight
    if isinstance(layer, nn.Linear):
        return [weight]
    parts = list(weight.chunk(layer.groups))
    return [part.transpose(0, 1) for part in parts] if isinstance(layer, _ConvTransposeNd) else parts


def _fill(weight: Tensor, gain: float, generator: torch.Generator | None) -> None:
    if weight.numel() == 0:
        return
    rows, columns = weight.shape[0], math.prod(weight.shape[1:])
    matrix = torch.empty(rows, columns, device=weight.device, dtype=accumulation_dtype(weight.dtype))
    nn.init.orthogonal_(matrix, gain=gain * math.sqrt(rows / weight.shape[1]), generator=generator)
    weight.copy_(matrix.view(weight.shape))
