"""Random crops after padding by reflection, and mirror images, gathered for a whole batch at once."""

from __future__ import annotations

import torch
from torch import Tensor

PADDING = 4


def draw(count: int, generator: torch.Generator, *, flip: bool) -> Tensor:
    """Crops (count, 3) int64: first row and first column in the padded image, each 0 to 8, and 1 for a mirror image."""
    device = generator.device
    corner = torch.randint(2 * PADDING + 1, (count, 2), generator=generator, device=device)
    mirrored = torch.randint(2 if flip else 1, (count, 1), generator=generator, device=device)
    return torch.cat([corner, mirrored], 1)


def crop(x: Tensor, index: Tensor, crops: Tensor) -> Tensor:
    """Images ``index`` (B,) of x (N, C, H, W), each padded by 4, cut to (H, W) at its crop of (B, 3), and mirrored.

    One gather out of the unpadded images. The result (B, C, H, W) has its channels last in memory.
    """
    height, width = x.shape[2:]
    rows, columns = _line(crops[:, 0], height), _line(crops[:, 1], width)
    columns = torch.where(crops[:, 2:] > 0, columns.flip(1), columns)
    return x[index[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _line(start: Tensor, length: int) -> Tensor:
    """Places (B, length) in a line that a window of the line padded by reflection takes its values from."""
    place = (torch.arange(length, device=start.device) + start[:, None] - PADDING).abs()
    return length - 1 - (length - 1 - place).abs()
