"""What the readers share: a file as bytes, as whole records, as labels, and errors that name it."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Split(NamedTuple):
    """One part of a data set."""

    x: Tensor
    """(N, C, H, W) uint8"""
    y: Tensor
    """(N,) int64, labels from 0"""


class Counts(NamedTuple):
    """How many images the two parts of a data set have."""

    train: int
    test: int


def content(file: Path) -> Tensor:
    """All bytes of a file as uint8, unpacked where its name ends in ``.gz``.

    Raises:
        ValueError: it cannot be read or unpacked.
    """
    try:
        found = _unpacked(file) if file.suffix == ".gz" else np.fromfile(file, np.uint8)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {file} ({getattr(error, 'strerror', None) or error})") from None
    return torch.from_numpy(found)


def _unpacked(file: Path) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.frombuffer(bytearray(gzip.decompress(file.read_bytes())), np.uint8)


def records(file: Path, size: int, count: int | None) -> Tensor:
    """A file of records of ``size`` bytes as (count, size) uint8. ``count=None`` takes any number of them but 0.

    Raises:
        ValueError: the file cannot be read, or is shorter or longer than it must be.
    """
    found = content(file)
    if not len(found) or len(found) % size or count not in (None, len(found) // size):
        must = f"a multiple of {size}" if count is None else f"{count * size}, {count} records of {size}"
        raise ValueError(f"{file} has {len(found)} bytes, must have {must}")
    return found.view(-1, size)


def labels(file: Path, found: Tensor, classes: int, first: int = 0) -> Tensor:
    """Label bytes (N,), counted from ``first`` in the file, as int64 from 0.

    Raises:
        ValueError: a label out of range.
    """
    wrong = (found < first) | (found >= first + classes)
    if wrong.any():
        place = int(wrong.nonzero()[0])
        last = first + classes - 1
        raise ValueError(f"{file} has label {int(found[place])} at image {place}, must have {first} to {last}")
    return found.long() - first
