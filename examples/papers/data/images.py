"""A data set in memory: uint8 images and labels on one device, with what is known of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .reading import Split
from .seeding import Use, generator

CHUNK = 4096
"""Images counted at a time: bounds what the mean and standard deviation take beside the images."""
NOT_MIRRORED = ("digits", "mnist")


@dataclass(frozen=True, eq=False)
class Images:
    """A training and a test part.

    Raises:
        ValueError: tensors of other shapes or types, labels out of range, or a channel whose values are all alike.
    """

    name: str
    classes: int
    train_x: Tensor
    """(N, C, H, W) uint8"""
    train_y: Tensor
    """(N,) int64"""
    test_x: Tensor
    test_y: Tensor
    mean: tuple[float, ...]
    """By channel of the whole training set, of values in [0, 1]. Parts of it keep the mean of the whole."""
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for part, x, y in (("train", self.train_x, self.train_y), ("test", self.test_x, self.test_y)):
            if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1:] != self.train_x.shape[1:]:
                raise ValueError(f"{part}_x must be (N, C, H, W) uint8, got {tuple(x.shape)} {x.dtype}")
            if y.dtype != torch.int64 or y.shape != x.shape[:1]:
                raise ValueError(f"{part}_y must be ({len(x)},) int64, got {tuple(y.shape)} {y.dtype}")
            if len(y) == 0 or y.min() < 0 or y.max() >= self.classes:
                raise ValueError(f"{part}_y must be labels 0 to {self.classes - 1}, one at least")
        if not len(self.mean) == len(self.std) == self.shape[0] or min(self.std) <= 0:
            raise ValueError(
                f"mean and std must be {self.shape[0]} numbers, std positive, got {self.mean} and {self.std}"
            )

    @classmethod
    def of(cls, name: str, classes: int, train: Split, test: Split) -> Images:
        """With the mean and standard deviation of ``train``."""
        return cls(name, classes, train.x, train.y, test.x, test.y, *mean_and_std(train.x))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        channels, height, width = self.train_x.shape[1:]
        return channels, height, width

    @property
    def flips(self) -> bool:
        """Whether an image seen in a mirror is still one of its class; a handwritten digit is not."""
        return self.name not in NOT_MIRRORED

    def to(self, device: torch.device | str) -> Images:
        moved = {name: getattr(self, name).to(device) for name in ("train_x", "train_y", "test_x", "test_y")}
        return replace(self, **moved)

    def subset(self, train: int, test: int, seed: int, *, balanced: bool = False) -> Images:
        """``train`` and ``test`` images drawn without replacement. A smaller choice with one seed is part of a larger.

        Args:
            balanced: as many training images of each class.

        Raises:
            ValueError: a count below 1 or above what there is; a balanced choice that the classes do not divide, or
                that has too few images of one.
        """
        for part, count, x in (("train", train, self.train_x), ("test", test, self.test_x)):
            if not 1 <= count <= len(x):
                raise ValueError(f"{part} must be 1 to {len(x)} images of {self.name}, got {count}")
        chance = generator(Use.SUBSET, seed)
        order, tested = _drawn(self.train_y, chance), _drawn(self.test_y, chance)[:test]
        kept = self._balanced(order, train) if balanced else order[:train]
        return self._with(self.train_x[kept], self.train_y[kept], self.test_x[tested], self.test_y[tested])

    def _balanced(self, order: Tensor, count: int) -> Tensor:
        """The first of each class, in their order."""
        each, rest = divmod(count, self.classes)
        present = torch.bincount(self.train_y, minlength=self.classes)
        if rest or present.min() < each:
            raise ValueError(
                f"train must be a multiple of {self.classes} classes, of {int(present.min())} images each, got {count}"
            )
        of_class = F.one_hot(self.train_y[order], self.classes).cumsum(0).gather(1, self.train_y[order, None])[:, 0]
        return order[of_class <= each]

    def validation(self, count: int, seed: int) -> Images:
        """``count`` drawn training images become the test part; the real test part is nowhere in the result.

        Raises:
            ValueError: ``count`` leaves nothing to train or to test on.
        """
        if not 1 <= count < len(self.train_x):
            raise ValueError(f"count must be 1 to {len(self.train_x) - 1} of {self.name}'s training set, got {count}")
        order = _drawn(self.train_y, generator(Use.VALIDATION, seed))
        kept, held = order[count:], order[:count]
        return self._with(self.train_x[kept], self.train_y[kept], self.train_x[held], self.train_y[held])

    def with_label_noise(self, fraction: float, seed: int) -> Images:
        """``round(fraction·N)`` drawn training labels are each replaced by one drawn evenly from the other classes.

        Images held out for validation keep their labels only if they are held out before.

        Raises:
            ValueError: ``fraction`` outside [0, 1].
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must be 0 to 1, got {fraction}")
        chance = generator(Use.LABEL_NOISE, seed)
        wrong = _drawn(self.train_y, chance)[: round(fraction * len(self.train_y))]
        turn = torch.randint(1, self.classes, (len(wrong),), generator=chance).to(self.train_y.device)
        y = self.train_y.clone()
        y[wrong] = (y[wrong] + turn) % self.classes
        return replace(self, train_y=y)

    def _with(self, train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> Images:
        return replace(self, train_x=train_x, train_y=train_y, test_x=test_x, test_y=test_y)


def _drawn(y: Tensor, chance: torch.Generator) -> Tensor:
    """A permutation of the images of ``y``, drawn on the CPU so that every device gets the same one."""
    return torch.randperm(len(y), generator=chance).to(y.device)


def mean_and_std(x: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """By channel of uint8 images (N, C, H, W), over all pixels, of values k/255; std divides by their number.

    From how often each of the 256 values occurs, in float64: no float copy of the images, and nothing lost by adding.
    """
    counts = torch.zeros(x.shape[1], 256, dtype=torch.int64)
    for start in range(0, len(x), CHUNK):
        channels = x[start : start + CHUNK].unbind(1)
        counts += torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in channels]).cpu()
    shares = counts.double() / counts.sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = shares @ values
    std = (shares * (values - mean[:, None]).square()).sum(1).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())
