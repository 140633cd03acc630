"""MNIST and Fashion-MNIST: four files in the idx format, gzipped as published or unpacked.

An idx file of unsigned bytes is ``00 00 08 d``, the d sizes as big-endian uint32, then the bytes in row-major order
(http://yann.lecun.com/exdb/mnist, "the IDX file format"). Images are 28 × 28 with one channel, labels 0 to 9.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from .reading import Counts, Split, content, labels

SIDE = 28
CLASSES = 10
PUBLISHED = Counts(60_000, 10_000)
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def read(folder: Path, counts: Counts | None = PUBLISHED) -> tuple[Split, Split]:
    """The training and the test part of what lies in ``folder``; ``counts=None`` takes any number of images.

    Raises:
        ValueError: a file that cannot be read or is not what it must be, naming it.
    """
    train_x, train_y, test_x, test_y = (present(folder / name) for name in FILES)
    train, test = counts or (None, None)
    return _split(train_x, train_y, train), _split(test_x, test_y, test)


def present(file: Path) -> Path:
    """The unpacked file where there is one, else its name as published, which ends in ``.gz``."""
    return file if file.exists() else file.with_name(file.name + ".gz")


def _split(images: Path, marks: Path, count: int | None) -> Split:
    x = idx(images, (count, SIDE, SIDE))
    y = idx(marks, (len(x),))
    return Split(x.unsqueeze(1), labels(marks, y, CLASSES))


def idx(file: Path, shape: tuple[int | None, ...]) -> Tensor:
    """The bytes of an idx file, of the ``shape`` it must have; a size of None may be any but 0.

    Raises:
        ValueError: the file cannot be read, is not idx of unsigned bytes, or has another shape or length.
    """
    found = content(file)
    start = bytes(found[:4].tolist())
    dims = len(shape)
    if start != bytes((0, 0, 8, dims)) or len(found) < 4 + 4 * dims:
        kind = f"idx of unsigned bytes with {dims} dimensions, which starts with 00 00 08 {dims:02x} and {dims} sizes"
        raise ValueError(f"{file} must be {kind}; it has {len(found)} bytes and starts with '{start.hex(' ')}'")
    sizes = tuple(np.frombuffer(bytes(found[4 : 4 + 4 * dims].tolist()), ">u4").tolist())
    if 0 in sizes or any(must not in (None, size) for must, size in zip(shape, sizes, strict=True)):
        raise ValueError(f"{file} must hold {_written(shape)} bytes, its header says {_written(sizes)}")
    expected = 4 + 4 * dims + int(np.prod(sizes, dtype=object))
    if len(found) != expected:
        raise ValueError(f"{file} has {len(found)} bytes unpacked, must have {expected} for {_written(sizes)}")
    return found[4 + 4 * dims :].view(sizes)


def _written(shape: tuple[int | None, ...]) -> str:
    return " x ".join("N" if size is None else str(size) for size in shape)
