"""Small files in the publishers' formats, written as their pages say and apart from the readers."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]


def noise(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def marks(count: int, classes: int) -> Pixels:
    """Labels from 0 with the largest among them."""
    return (np.arange(count)[::-1] * 7 + classes - 1) % classes


def idx(values: Pixels) -> bytes:
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def write_mnist(folder: Path, train: int = 40, test: int = 30, packed: bool = True) -> Path:
    """Images of noise in MNIST's files; returns the folder of them."""
    folder.mkdir(parents=True)
    for name, count in (("train", train), ("t10k", test)):
        for kind, values in (("images-idx3", noise(count, 28, 28, seed=count)), ("labels-idx1", marks(count, 10))):
            content = idx(values)
            file = folder / f"{name}-{kind}-ubyte{'.gz' if packed else ''}"
            file.write_bytes(gzip.compress(content) if packed else content)
    return folder


def write_cifar10(folder: Path, per_file: int = 12, test: int = 11) -> Path:
    folder.mkdir(parents=True)
    for i, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        count = test if name == "test_batch" else per_file
        rows = np.column_stack([marks(count, 10), noise(count, 3072, seed=i)])
        (folder / f"{name}.bin").write_bytes(rows.astype(np.uint8).tobytes())
    return folder


def write_cifar100(folder: Path, train: int = 110, test: int = 101) -> Path:
    folder.mkdir(parents=True)
    for name, count in (("train", train), ("test", test)):
        rows = np.column_stack([marks(count, 20), marks(count, 100), noise(count, 3072, seed=count)])
        (folder / f"{name}.bin").write_bytes(rows.astype(np.uint8).tobytes())
    return folder


def write_stl10(folder: Path, train: int = 12, test: int = 11) -> Path:
    """Images (N, 3, rows, columns) of ``noise``, each channel written column by column."""
    folder.mkdir(parents=True)
    for name, count in (("train", train), ("test", test)):
        images = noise(count, 3, 96, 96, seed=count)
        (folder / f"{name}_X.bin").write_bytes(b"".join(c.tobytes(order="F") for image in images for c in image))
        (folder / f"{name}_y.bin").write_bytes((marks(count, 10) + 1).astype(np.uint8).tobytes())
    return folder
