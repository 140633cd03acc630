"""load() finds each data set in its folder, whole, and says how to get what is not there."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from papers.data import NAMES, Images, cifar, load, mnist, publishers, stl10
from papers.data.reading import Counts

from tests.examples import formats

ROOT = Path(__file__).resolve().parents[2]
WRITTEN: dict[str, tuple[Callable[[Path], Path], str, Any, Counts, tuple[int, int, int]]] = {
    "mnist": (formats.write_mnist, "MNIST/raw", mnist.read, Counts(40, 30), (1, 28, 28)),
    "fashion-mnist": (formats.write_mnist, "FashionMNIST/raw", mnist.read, Counts(40, 30), (1, 28, 28)),
    "cifar10": (formats.write_cifar10, "cifar-10-batches-bin", cifar.read10, Counts(60, 11), (3, 32, 32)),
    "cifar100": (formats.write_cifar100, "cifar-100-binary", cifar.read100, Counts(110, 101), (3, 32, 32)),
    "stl10": (formats.write_stl10, "stl10_binary", stl10.read, Counts(12, 11), (3, 96, 96)),
}


def as_if_published(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data set is taken to be of as many images as the test writes."""
    read = partial(WRITTEN[name][2], counts=WRITTEN[name][3])
    monkeypatch.setitem(publishers.SOURCES, name, publishers.SOURCES[name]._replace(read=read))


def test_names_are_the_data_sets_of_the_papers() -> None:
    assert NAMES == ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "stl10")
    assert set(WRITTEN) == set(NAMES) - {"digits"}


@pytest.mark.parametrize("name", WRITTEN)
def test_load_reads_the_folder_that_the_archive_unpacks_to(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, folder, _, counts, shape = WRITTEN[name]
    write(tmp_path / folder)
    as_if_published(name, monkeypatch)
    for data in (load(name, tmp_path), load(name, str(tmp_path), download=True)):
        assert isinstance(data, Images)
        assert (data.name, data.shape, len(data.train_x), len(data.test_x)) == (name, shape, *counts)
        assert data.classes == int(data.train_y.max()) + 1 == int(data.test_y.max()) + 1
        assert len(data.mean) == shape[0]


@pytest.mark.parametrize("name", WRITTEN)
def test_load_takes_no_other_number_of_images_than_published(name: str, tmp_path: Path) -> None:
    write, folder, *_ = WRITTEN[name]
    write(tmp_path / folder)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / folder)) + ".* must .*; once the damaged file is"):
        load(name, tmp_path)


@pytest.mark.parametrize("name", WRITTEN)
def test_load_names_the_missing_file_and_where_download_gets_it(name: str, tmp_path: Path) -> None:
    told = f"cannot read {tmp_path / WRITTEN[name][1]}/\\S+ \\(No such file or directory\\); --download"
    with pytest.raises(ValueError, match=told + r" \(download=True\) gets it from https?://\S+$"):
        load(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_digits_need_no_folder() -> None:
    data = load("digits")
    assert (data.classes, data.shape, len(data.train_x), len(data.test_x)) == (10, (1, 8, 8), 1200, 597)
    assert torch.equal(load("digits", "nowhere", download=True).train_x, data.train_x)


def test_an_unknown_name_lists_the_names() -> None:
    with pytest.raises(ValueError, match=re.escape("name must be one of digits, mnist,") + ".*got 'cifar'"):
        load("cifar", ".")


def test_no_folder_is_refused_with_what_it_must_hold() -> None:
    with pytest.raises(ValueError, match="folder must be the one that holds cifar-100-binary, got None"):
        load("cifar100")


def test_the_package_is_importable_from_the_root_and_needs_neither_tqdm_nor_scikit_learn() -> None:
    code = "import sys; sys.modules['tqdm'] = sys.modules['sklearn'] = None; import examples.papers.data as d; d.load"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
