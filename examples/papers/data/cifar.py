"""CIFAR-10 and CIFAR-100 in the binary version (https://www.cs.toronto.edu/~kriz/cifar.html).

A record is the label, one byte, and for CIFAR-100 two, the coarse one of 20 first; then 3072 bytes: 32 × 32 red, green
and blue values, each in row-major order. CIFAR-10 has five files of training images and one of test images.
"""

from __future__ import annotations

from pathlib import Path

import torch

from .reading import Counts, Split, labels, records

PIXELS = 3 * 32 * 32
PUBLISHED = Counts(50_000, 10_000)
FILES10 = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
FILES100 = ("train.bin", "test.bin")


def read10(folder: Path, counts: Counts | None = PUBLISHED) -> tuple[Split, Split]:
    """CIFAR-10's training and test part in ``folder``; ``counts=None`` takes any number of images.

    Raises:
        ValueError: a file that cannot be read or is not what it must be, naming it.
    """
    parts = [folder / name for name in FILES10]
    sizes = [counts.train // 5] * 5 + [counts.test] if counts else [None] * 6
    splits = [_split(file, 1, 10, count) for file, count in zip(parts, sizes, strict=True)]
    return Split(torch.cat([s.x for s in splits[:5]]), torch.cat([s.y for s in splits[:5]])), splits[5]


def read100(folder: Path, counts: Counts | None = PUBLISHED) -> tuple[Split, Split]:
    """CIFAR-100's training and test part in ``folder`` with the 100 fine labels; ``counts=None`` takes any number.

    Raises:
        ValueError: a file that cannot be read or is not what it must be, naming it.
    """
    train, test = counts or (None, None)
    return _split(folder / FILES100[0], 2, 100, train), _split(folder / FILES100[1], 2, 100, test)


def _split(file: Path, bytes_of_label: int, classes: int, count: int | None) -> Split:
    """Images of one file with the last byte of their labels."""
    found = records(file, bytes_of_label + PIXELS, count)
    y = labels(file, found[:, bytes_of_label - 1], classes)
    return Split(found[:, bytes_of_label:].reshape(-1, 3, 32, 32).contiguous(), y)
