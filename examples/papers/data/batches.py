"""A split held on its device as uint8 and given out in batches of normalized float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .augment import PADDING, crop, draw
from .seeding import Use, check_seed, generator

Batch = tuple[Tensor, Tensor]


class Batches:
    """Shuffled batches of images (N, C, H, W) uint8 with labels (N,), on the device that holds both.

    An epoch gives whole batches; the images left over wait for another epoch's order. ``augment`` crops at random after
    padding by reflection by 4, and with ``flip`` mirrors with probability ½. ``mean`` and ``std`` are by channel, of
    values in [0, 1].

    Raises:
        ValueError: of the arguments, naming the one that is wrong.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augment: bool,
        seed: int,
        flip: bool = True,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        _check(x, y, size, augment)
        check_seed(seed)
        if size > len(x):
            raise ValueError(f"size must be at most the {len(x)} images there are, got a batch of {size}")
        self.x, self.y, self.size, self.seed = x, y, size, seed
        self.augment, self.flip = augment, flip
        self._normalize = _Normalize(x, mean, std, memory_format)

    @property
    def steps(self) -> int:
        """Batches an epoch."""
        return len(self.x) // self.size

    def epoch(self, i: int) -> Iterator[Batch]:
        """Epoch ``i``: (size, C, H, W) float32 with (size,) labels.

        All of its randomness comes from a generator on the device, seeded by (seed, i) alone: a run that was
        interrupted sees the same batches, whatever epochs it has seen before.

        Raises:
            ValueError: ``i`` below 0.
        """
        if i < 0:
            raise ValueError(f"i must be an epoch from 0, got {i}")
        chance = generator(Use.EPOCH, self.seed, i, device=self.x.device)
        order = torch.randperm(len(self.x), generator=chance, device=self.x.device)[: self.steps * self.size]
        crops = draw(len(order), chance, flip=self.flip) if self.augment else None
        return _batches(self.x, self.y, order, crops, self.size, self._normalize)


def evaluation(
    x: Tensor,
    y: Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    augment: bool = False,
    seed: int = 0,
    *,
    flip: bool = True,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Iterator[Batch]:
    """All images once, in order; the last batch may be short. ``augment`` crops and mirrors by ``seed`` alone.

    Raises:
        ValueError: of the arguments, naming the one that is wrong.
    """
    _check(x, y, size, augment)
    order, chance = torch.arange(len(x), device=x.device), generator(Use.EVALUATION, seed, device=x.device)
    crops = draw(len(x), chance, flip=flip) if augment else None
    return _batches(x, y, order, crops, size, _Normalize(x, mean, std, memory_format))


class _Normalize:
    """``(x/255 − mean) / std`` by channel, in float32."""

    def __init__(
        self, x: Tensor, mean: Sequence[float], std: Sequence[float], memory_format: torch.memory_format
    ) -> None:
        if not len(mean) == len(std) == x.shape[1] or min(std) <= 0:
            raise ValueError(f"mean and std must be {x.shape[1]} numbers, std positive, got {mean} and {std}")
        self.mean, self.std = (
            (255 * torch.tensor(tuple(v), dtype=torch.float64)).float().view(-1, 1, 1).to(x.device) for v in (mean, std)
        )
        self.memory_format = memory_format

    def __call__(self, x: Tensor) -> Tensor:
        return x.to(torch.float32, memory_format=self.memory_format).sub_(self.mean).div_(self.std)


def _batches(
    x: Tensor, y: Tensor, order: Tensor, crops: Tensor | None, size: int, normalize: _Normalize
) -> Iterator[Batch]:
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        images = x[chosen] if crops is None else crop(x, chosen, crops[start : start + size])
        yield normalize(images), y[chosen]


def _check(x: Tensor, y: Tensor, size: int, augment: bool) -> None:
    if x.dtype != torch.uint8 or x.ndim != 4:
        raise ValueError(f"x must be images (N, C, H, W) uint8, got {tuple(x.shape)} {x.dtype}")
    if y.shape != x.shape[:1] or y.device != x.device:
        raise ValueError(f"y must be ({len(x)},) on {x.device}, got {tuple(y.shape)} on {y.device}")
    if size < 1:
        raise ValueError(f"size must be a batch of 1 or more, got {size}")
    if augment and min(x.shape[2:]) <= PADDING:
        raise ValueError(f"augment needs images larger than its padding of {PADDING}, got {tuple(x.shape[2:])}")
