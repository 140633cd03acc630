"""Where the data sets come from: addresses and the MD5 that publishers state for what lies there.

MNIST's own address, yann.lecun.com/exdb/mnist, does not serve them any more: they come from the mirror of PyTorch's
project, and must have the MD5 of the originals. Fashion-MNIST's sums stand in
https://github.com/zalandoresearch/fashion-mnist, CIFAR's on https://www.cs.toronto.edu/~kriz/cifar.html; STL-10's page
states none, and the sum is that in torchvision.datasets.STL10.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import cifar, mnist, stl10
from .reading import Split


class Download(NamedTuple):
    url: str
    md5: str
    files: tuple[str, ...]
    """What it becomes below the data folder: the members to take from a .tar.gz, else the file itself."""


class Source(NamedTuple):
    """A published data set: how it is read, and where it can be had."""

    classes: int
    folder: str
    """Below the data folder, as the publisher's archive unpacks."""
    read: Callable[[Path], tuple[Split, Split]]
    downloads: tuple[Download, ...]

    def missing(self, folder: Path) -> list[Download]:
        """Those that a file below ``folder`` is wanting of. An unpacked file stands for a gzipped one."""
        return [one for one in self.downloads if not all(_is_there(folder / name) for name in one.files)]


def _is_there(file: Path) -> bool:
    return file.exists() or (file.suffix == ".gz" and file.with_suffix("").exists())


def _idx(folder: str, address: str, *sums: str) -> tuple[Download, ...]:
    names = [f"{name}.gz" for name in mnist.FILES]
    return tuple(Download(address + name, md5, (f"{folder}/{name}",)) for name, md5 in zip(names, sums, strict=True))


def _archive(folder: str, url: str, md5: str, files: tuple[str, ...]) -> tuple[Download, ...]:
    return (Download(url, md5, tuple(f"{folder}/{name}" for name in files)),)


SOURCES = {
    "mnist": Source(
        mnist.CLASSES,
        "MNIST/raw",
        mnist.read,
        _idx(
            "MNIST/raw",
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
    ),
    "fashion-mnist": Source(
        mnist.CLASSES,
        "FashionMNIST/raw",
        mnist.read,
        _idx(
            "FashionMNIST/raw",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
    ),
    "cifar10": Source(
        10,
        "cifar-10-batches-bin",
        cifar.read10,
        _archive(
            "cifar-10-batches-bin",
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            "c32a1d4ab5d03f1284b67883e8d87530",
            cifar.FILES10,
        ),
    ),
    "cifar100": Source(
        100,
        "cifar-100-binary",
        cifar.read100,
        _archive(
            "cifar-100-binary",
            "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            "03b5dce01913d631647c71ecec9e9cb8",
            cifar.FILES100,
        ),
    ),
    "stl10": Source(
        stl10.CLASSES,
        "stl10_binary",
        stl10.read,
        _archive(
            "stl10_binary",
            "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
            "91f7769df0f17e558f3565bffb0c7dfb",
            stl10.FILES,
        ),
    ),
}
