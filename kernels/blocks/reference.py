"""Torch reference of the operations on skinny blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backend import keep, live


def grams(blocks: Sequence[Tensor], width: int) -> tuple[Tensor, Tensor]:
    gram = blocks[0].new_zeros(len(blocks), width, width)
    scale = torch.stack([block.abs().amax() if block.numel() else block.new_zeros(()) for block in blocks])
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    for i, block in enumerate(blocks):
        k = block.shape[1]
        scaled = block / scale[i]
        gram[i, :k, :k] = scaled.mT @ scaled
    return gram, scale


def mixes(terms: Sequence[tuple[Sequence[Tensor], Tensor]], out: Sequence[Tensor], active: Tensor | None) -> None:
    for i in live(active, len(out)):
        k = out[i].shape[1]
        mixed = torch.zeros((), dtype=out[i].dtype, device=out[i].device)
        for blocks, small in terms:
            mixed = torch.addmm(mixed, blocks[i], small[i, : blocks[i].shape[1], :k], beta=int(mixed.ndim > 0))
        out[i].copy_(keep(active, i, mixed, out[i]))


def column_dots(blocks: Sequence[Tensor], others: Sequence[Tensor], scales: Tensor) -> Tensor:
    dots = blocks[0].new_zeros(len(blocks), max(block.shape[1] for block in blocks))
    for i, (block, other) in enumerate(zip(blocks, others, strict=True)):
        dots[i, : block.shape[1]] = (block / scales[i] * other).sum(0)
    return dots


def first_column_residuals(blocks: Sequence[Tensor], units: Sequence[Tensor], scales: Tensor) -> Tensor:
    residuals = []
    for i, (block, unit) in enumerate(zip(blocks, units, strict=True)):
        x, y = block[:, 0] / scales[i], unit[:, 0]
        residuals.append(torch.linalg.vector_norm(x - torch.dot(x, y) * y))
    return torch.stack(residuals)
