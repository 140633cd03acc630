"""The guide's images: MNIST in its publishers' files, or the UCI digits that scikit-learn ships."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from papers.data import digits, mnist
from papers.data.reading import Split
from torch import Tensor


class Data(NamedTuple):
    """Images (N, 1, side, side), centred by pixel and divided by one standard deviation, both of those to train on."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def side(self) -> int:
        return self.train_x.shape[-1]


def load(folder: Path | None) -> Data:
    """MNIST from ``folder/MNIST/raw``, or UCI digits where no folder is given.

    Raises:
        ValueError: a file that is not there or is not what it should be, naming it.
    """
    if folder is None:
        return _centred("UCI digits", *digits.read())
    return _centred("MNIST", *mnist.read(folder / "MNIST" / "raw", counts=None))


def _centred(name: str, train: Split, test: Split) -> Data:
    train_x, test_x = train.x.float(), test.x.float()
    mean = train_x.mean(0)
    std = (train_x - mean).std()
    return Data(name, (train_x - mean) / std, train.y, (test_x - mean) / std, test.y)
