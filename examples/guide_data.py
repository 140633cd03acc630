"""The guide's images: MNIST in its publishers' files, or the UCI digits that scikit-learn ships."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

MNIST = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
DIGITS_TO_TRAIN = 1200


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
    return _digits() if folder is None else _mnist(folder / "MNIST" / "raw")


def _digits() -> Data:
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)[order], torch.tensor(labels)[order]
    train, test = slice(DIGITS_TO_TRAIN), slice(DIGITS_TO_TRAIN, None)
    return _centred("UCI digits", x[train], y[train], x[test], y[test])


def _mnist(folder: Path) -> Data:
    train_x, train_y, test_x, test_y = (_idx(folder / f"{name}-ubyte.gz") for name in MNIST)
    for images, labels in ((train_x, train_y), (test_x, test_y)):
        if images.shape != (len(labels), 28, 28) or labels.max() > 9:
            shapes = f"images {tuple(images.shape)} and labels {tuple(labels.shape)}"
            raise ValueError(f"{folder} must hold images of 28 x 28 and a label from 0 to 9 for each, got {shapes}")
    return _centred("MNIST", train_x.float().unsqueeze(1), train_y.long(), test_x.float().unsqueeze(1), test_y.long())


def _idx(file: Path) -> Tensor:
    """A file of unsigned bytes: two zeros, the type 8, the number of dimensions, each as a big-endian integer, data."""
    try:
        content = gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {file} ({getattr(error, 'strerror', None) or error})") from None
    dims = content[3] if len(content) > 4 and content[:3] == b"\0\0\x08" else 0
    shape = np.frombuffer(content, ">u4", count=dims, offset=4) if dims and len(content) >= 4 + 4 * dims else []
    if not dims or len(content) != 4 + 4 * dims + int(np.prod(shape)):
        raise ValueError(f"{file} is not a file of MNIST's kind (idx, unsigned bytes)")
    return torch.tensor(np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape))


def _centred(name: str, train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> Data:
    mean = train_x.mean(0)
    std = (train_x - mean).std()
    return Data(name, (train_x - mean) / std, train_y, (test_x - mean) / std, test_y)
