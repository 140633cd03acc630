"""Torch reference of the operations on skinny blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backend import keep, live


def grams(blocks: Sequence[Tensor], width: int) -> tuple[Tensor, Tensor]:
    gram = blocks[0].new_zeros(len(blocks), width, width)
    scale = torch.stack([block.abs().amax() if block.numel() else block.new_zeros(()) for block in blocks])
    scale = torch.where(scale < torch.finfo(scale.dtype).smallest_normal, torch.ones_like(scale), scale)
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


def copy_blocks(blocks: Sequence[Tensor], out: Sequence[Tensor], active: Tensor | None) -> None:
    for i in live(active, len(out)):
        out[i].copy_(keep(active, i, blocks[i], out[i]))


def column_dots(blocks: Sequence[Tensor], others: Sequence[Tensor], scales: Tensor) -> Tensor:
    dots = blocks[0].new_zeros(len(blocks), max(block.shape[1] for block in blocks))
    for i, (block, other) in enumerate(zip(blocks, others, strict=True)):
        dots[i, : block.shape[1]] = (block / scales[i] * other).sum(0)
    return dots


def first_column_residuals(blocks: Sequence[Tensor], units: Sequence[Tensor], scales: Tensor) -> Tensor:
    triples = zip(blocks, units, scales.unbind(), strict=True)
    return torch.stack([residual(block[:, 0], unit[:, 0], scale) for block, unit, scale in triples])


def residual(x: Tensor, unit: Tensor, scale: Tensor | float) -> Tensor:
    x = x / scale
    rest = torch.addcmul(x, unit, torch.dot(x, unit), value=-1)
    norm: Tensor = torch.linalg.vector_norm(rest)
    return norm
