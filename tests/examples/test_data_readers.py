"""Readers give back what was written in the published formats, and refuse everything else by the file's name."""

from __future__ import annotations

import gzip
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from papers.data import cifar, digits, mnist, stl10
from papers.data.reading import Counts, Split
from torch import Tensor

from tests.examples import formats
from tests.examples.formats import marks, noise

Read = Callable[[Path, Counts | None], tuple[Split, Split]]


def assert_split(split: Split, x: Any, y: Any) -> None:
    assert (split.x.dtype, split.y.dtype) == (torch.uint8, torch.int64)
    assert split.x.is_contiguous()
    assert torch.equal(split.x, torch.from_numpy(np.ascontiguousarray(x)))
    assert torch.equal(split.y, torch.from_numpy(np.array(y, np.int64)))


@pytest.mark.parametrize("packed", [True, False], ids=["gzipped", "unpacked"])
def test_mnist_is_read_as_written(packed: bool, tmp_path: Path) -> None:
    train, test = mnist.read(formats.write_mnist(tmp_path / "raw", packed=packed), Counts(40, 30))
    assert_split(train, noise(40, 1, 28, 28, seed=40), marks(40, 10))
    assert_split(test, noise(30, 1, 28, 28, seed=30), marks(30, 10))


def test_cifar10_is_read_as_written_in_the_order_of_its_files(tmp_path: Path) -> None:
    train, test = cifar.read10(formats.write_cifar10(tmp_path / "bin"), Counts(60, 11))
    assert_split(train, np.concatenate([noise(12, 3, 32, 32, seed=i) for i in range(5)]), np.tile(marks(12, 10), 5))
    assert_split(test, noise(11, 3, 32, 32, seed=5), marks(11, 10))


def test_cifar100_is_read_as_written_with_its_fine_labels(tmp_path: Path) -> None:
    train, test = cifar.read100(formats.write_cifar100(tmp_path / "bin"), Counts(110, 101))
    assert_split(train, noise(110, 3, 32, 32, seed=110), marks(110, 100))
    assert_split(test, noise(101, 3, 32, 32, seed=101), marks(101, 100))


def test_stl10_is_read_as_written_by_columns_with_labels_from_one(tmp_path: Path) -> None:
    train, test = stl10.read(formats.write_stl10(tmp_path / "bin"), Counts(12, 11))
    assert_split(train, noise(12, 3, 96, 96, seed=12), marks(12, 10))
    assert_split(test, noise(11, 3, 96, 96, seed=11), marks(11, 10))


def test_digits_are_the_1797_split_once_with_nothing_rounded() -> None:
    every, (train, test) = digits.images(), digits.read()
    assert every.x.shape == (1797, 1, 8, 8)
    assert set((every.x % 15).unique().tolist()) == {0}
    assert every.x.max() == 240
    assert (len(train.x), len(test.x)) == (1200, 597)

    def sorted_rows(x: Tensor, y: Tensor) -> Tensor:
        return torch.tensor(sorted(torch.cat([x.flatten(1).long(), y[:, None]], 1).tolist()))

    both = Split(torch.cat([train.x, test.x]), torch.cat([train.y, test.y]))
    assert torch.equal(sorted_rows(*both), sorted_rows(*every))
    assert torch.equal(digits.read()[0].x, train.x)


FORMATS: list[Any] = [
    pytest.param(formats.write_mnist, mnist.read, "t10k-images-idx3-ubyte.gz", id="mnist"),
    pytest.param(formats.write_cifar10, cifar.read10, "data_batch_3.bin", id="cifar10"),
    pytest.param(formats.write_cifar100, cifar.read100, "test.bin", id="cifar100"),
    pytest.param(formats.write_stl10, stl10.read, "test_X.bin", id="stl10"),
]


@pytest.mark.parametrize(("write", "read", "name"), FORMATS)
def test_any_number_of_images_is_read_where_no_counts_are_given(
    write: Callable[[Path], Path], read: Read, name: str, tmp_path: Path
) -> None:
    train, test = read(write(tmp_path / "raw"), None)
    assert len(train.x) == len(train.y) > len(test.x) == len(test.y) > 0


@pytest.mark.parametrize(("write", "read", "name"), FORMATS)
def test_fewer_images_than_published_are_refused(
    write: Callable[[Path], Path], read: Callable[[Path], Any], name: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="must"):
        read(write(tmp_path / "raw"))


@pytest.mark.parametrize(("write", "read", "name"), FORMATS)
def test_a_missing_file_and_a_missing_folder_are_named(
    write: Callable[[Path], Path], read: Read, name: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "raw") / name
    file.unlink()
    with pytest.raises(ValueError, match=re.escape(f"cannot read {file} (No such file")):
        read(file.parent, None)
    with pytest.raises(ValueError, match=re.escape(f"cannot read {tmp_path / 'nowhere'}")):
        read(tmp_path / "nowhere", None)
    file.mkdir()
    with pytest.raises(ValueError, match=re.escape(f"cannot read {file} (Is a directory")):
        read(file.parent, None)


@pytest.mark.parametrize("change", [-1, 1], ids=["short", "long"])
@pytest.mark.parametrize(("write", "read", "name"), FORMATS)
def test_a_file_of_another_length_is_refused_with_what_it_has_and_must_have(
    change: int, write: Callable[[Path], Path], read: Read, name: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "raw") / name
    packed = file.suffix == ".gz"
    content = gzip.decompress(file.read_bytes()) if packed else file.read_bytes()
    content = content[:-1] if change < 0 else content + b"x"
    file.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match=re.escape(f"{file} has {len(content)} bytes") + ".*, must have"):
        read(file.parent, None)


@pytest.mark.parametrize(
    ("write", "read", "counts", "told"),
    [
        (formats.write_cifar10, cifar.read10, Counts(65, 11), "data_batch_1.bin has 36876 bytes, must have 39949, 13"),
        (formats.write_cifar10, cifar.read10, Counts(60, 10), "test_batch.bin has 33803 bytes, must have 30730, 10"),
        (formats.write_cifar100, cifar.read100, Counts(111, 101), "train.bin has 338140 bytes, must have 341214, 111"),
        (
            formats.write_mnist,
            mnist.read,
            Counts(40, 29),
            "ubyte.gz must hold 29 x 28 x 28 bytes, its header says 30",
        ),
        (formats.write_stl10, stl10.read, Counts(11, 11), "train_X.bin has 331776 bytes, must have 304128, 11"),
    ],
)
def test_whole_images_too_few_or_too_many_are_refused(
    write: Callable[[Path], Path], read: Read, counts: Counts, told: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        read(write(tmp_path / "raw"), counts)


def test_an_empty_file_is_short(tmp_path: Path) -> None:
    file = formats.write_cifar100(tmp_path / "bin") / "train.bin"
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=re.escape(f"{file} has 0 bytes, must have a multiple of 3074")):
        cifar.read100(file.parent, None)


def test_images_and_labels_of_other_counts_are_refused(tmp_path: Path) -> None:
    file = formats.write_stl10(tmp_path / "bin") / "test_y.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ValueError, match=re.escape(f"{file} has 9 bytes, must have 11, 11 records of 1")):
        stl10.read(file.parent, None)
    raw = formats.write_mnist(tmp_path / "raw")
    (raw / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(formats.idx(marks(39, 10))))
    with pytest.raises(ValueError, match=r"train-labels.* must hold 40 bytes, its header says 39"):
        mnist.read(raw, None)


@pytest.mark.parametrize(
    ("write", "read", "name", "place", "label", "told"),
    [
        (formats.write_cifar10, cifar.read10, "test_batch.bin", 3073 * 4, 10, "label 10 at image 4, must have 0 to 9"),
        (
            formats.write_cifar100,
            cifar.read100,
            "train.bin",
            3074 * 2 + 1,
            100,
            "label 100 at image 2, must have 0 to 99",
        ),
        (formats.write_stl10, stl10.read, "train_y.bin", 3, 0, "label 0 at image 3, must have 1 to 10"),
        (formats.write_stl10, stl10.read, "train_y.bin", 3, 11, "label 11 at image 3, must have 1 to 10"),
    ],
)
def test_a_label_out_of_range_is_refused_with_its_place(
    write: Callable[[Path], Path], read: Read, name: str, place: int, label: int, told: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "raw") / name
    content = bytearray(file.read_bytes())
    content[place] = label
    file.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{file} has {told}")):
        read(file.parent, None)


def test_mnist_refuses_a_label_of_ten(tmp_path: Path) -> None:
    raw = formats.write_mnist(tmp_path / "raw", packed=False)
    (raw / "t10k-labels-idx1-ubyte").write_bytes(formats.idx(marks(30, 11)))
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte has label 10 at image"):
        mnist.read(raw, None)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"no gzip", "Not a gzipped file"),
        (gzip.compress(b"0" * 99)[:-12], "cannot read"),
        (gzip.compress(b""), "it has 0 bytes"),
        (gzip.compress(struct.pack(">BBBB2I", 0, 0, 8, 3, 40, 28)), "it has 12 bytes and starts with '00 00 08 03'"),
        (gzip.compress(struct.pack(">BBBB3I", 0, 0, 13, 3, 40, 28, 28)), "starts with '00 00 0d 03'"),
        (gzip.compress(struct.pack(">BBBB1I", 0, 0, 8, 1, 2) + b"xx"), "with 3 dimensions"),
        (
            gzip.compress(struct.pack(">BBBB3I", 0, 0, 8, 3, 0, 28, 28)),
            "must hold N x 28 x 28 bytes, its header says 0",
        ),
        (gzip.compress(struct.pack(">BBBB3I", 0, 0, 8, 3, 2**32 - 1, 28, 28)), "must have 3367254359296 for"),
        (gzip.compress(struct.pack(">BBBB3I", 0, 0, 8, 3, 1, 28, 29) + bytes(812)), "its header says 1 x 28 x 29"),
    ],
    ids=["no-gzip", "cut-gzip", "nothing", "cut-header", "floats", "labels", "no-images", "huge", "wide"],
)
def test_mnist_refuses_what_is_no_idx_of_its_kind_by_name(content: bytes, told: str, tmp_path: Path) -> None:
    file = formats.write_mnist(tmp_path / "raw") / "train-images-idx3-ubyte.gz"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(file))) as found:
        mnist.read(file.parent, None)
    assert told in str(found.value)
