"""The batched crop and mirror image equal a plain one of each image, and every one of them is drawn as often."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from papers.data.augment import crop, draw
from torch import Tensor


def plain(image: Tensor, top: int, left: int, mirrored: int) -> Tensor:
    """One image (C, H, W): padded by torch, sliced, flipped."""
    height, width = image.shape[1:]
    padded = F.pad(image.float()[None], (4, 4, 4, 4), mode="reflect")[0]
    cut = padded[:, top : top + height, left : left + width]
    return cut.flip(2) if mirrored else cut


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (1, 8, 8), (2, 5, 7)], ids=str)
def test_crop_equals_padding_and_slicing_for_every_offset(shape: tuple[int, int, int], device: torch.device) -> None:
    crops = torch.tensor(list(itertools.product(range(9), range(9), range(2))), device=device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (50, *shape), dtype=torch.uint8, generator=generator).to(device)
    index = torch.randint(50, (len(crops),), generator=generator).to(device)
    found = crop(x, index, crops)
    assert found.dtype == torch.uint8
    assert found.is_contiguous(memory_format=torch.channels_last)
    for image, i, place in zip(found, index.tolist(), crops.tolist(), strict=True):
        assert torch.equal(image.float(), plain(x[i], *place))


def test_crop_in_the_middle_is_the_image_itself() -> None:
    x = torch.randint(0, 256, (5, 3, 9, 11), dtype=torch.uint8)
    assert torch.equal(crop(x, torch.arange(5), torch.tensor([[4, 4, 0]] * 5)), x)


@pytest.mark.parametrize("flip", [True, False])
def test_every_crop_is_drawn_equally_often(flip: bool, device: torch.device) -> None:
    count = 20_000
    drawn = draw(count, torch.Generator(device).manual_seed(0), flip=flip)
    kinds = 81 * (2 if flip else 1)
    found, times = drawn.unique(dim=0, return_counts=True)
    assert len(found) == kinds
    assert found.amax(0).tolist() == [8, 8, int(flip)]
    assert ((times - count / kinds).abs() < 5 * (count / kinds) ** 0.5).all()
