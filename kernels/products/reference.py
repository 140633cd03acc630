"""Torch reference of the skinny products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backend import keep, live


def skinny_products(
    matrices: Sequence[Tensor], blocks: Sequence[Tensor], out: Sequence[Tensor], active: Tensor | None
) -> None:
    for i in live(active, len(matrices)):
        matrix, block = matrices[i], blocks[i]
        if active is None or active.device.type == "cpu":
            torch.mm(matrix.to(block.dtype), block, out=out[i])
        else:
            out[i].copy_(keep(active, i, matrix.to(block.dtype) @ block, out[i]))
