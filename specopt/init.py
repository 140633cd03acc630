"""Initialization that starts where Norm Scaling's targets are."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from specopt.kernels import accumulation_dtype

from .reading import Kind, readings_of
from .views.parts import parse, pieces


@torch.no_grad()
def scaled_orthogonal_(module: nn.Module, gain: float = 1.0, generator: torch.Generator | None = None) -> nn.Module:
    """Every matrix of ``module``: orthogonal, times ``gain · sqrt(out / in)`` over channels, in place.

    The matrices are those that :func:`specopt.param_groups` controls: a conv kernel is read as ``(out, in·k·k)``, a
    transposed conv with its output channels as rows, a grouped one group by group, gates and packed projections one by
    one; all singular values of such a matrix are then ``gain · sqrt(out / in)`` with its own out and in. Embeddings,
    with what is tied to them, other modules and all biases stay as they are.

    Raises:
        ValueError: a gain that is not a positive finite number; a parameter not yet initialized; a weight that is
            parametrized (it is computed from other tensors, which this would leave as they are).

    Source: Norm Scaling (December 2023), with channels for layer sizes; Saxe et al., arXiv 1312.6120.
    """
    if not 0 < gain < math.inf:
        raise ValueError(f"gain must be a positive finite number, got {gain!r}")
    matrices: list[Tensor] = []
    for places, reading in readings_of(module):
        if reading.kind is Kind.COMPUTED_FROM:
            raise ValueError(f"{places[0].name}: {reading.why}; initialize the weight before it is parametrized")
        if reading.kind is Kind.MATRIX:
            matrices += pieces(places[0].param, parse(reading.view))
    for matrix in matrices:
        _fill(matrix, gain, generator)
    return module


def _fill(weight: Tensor, gain: float, generator: torch.Generator | None) -> None:
    if weight.numel() == 0:
        return
    rows, columns = weight.shape[0], math.prod(weight.shape[1:])
    matrix = torch.empty(rows, columns, device=weight.device, dtype=accumulation_dtype(weight.dtype))
    nn.init.orthogonal_(matrix, gain=gain * math.sqrt(rows / weight.shape[1]), generator=generator)
    weight.copy_(matrix.view(weight.shape))
