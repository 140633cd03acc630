"""The papers' data sets in their publishers' binary formats, as uint8 tensors given out in augmented batches."""

from __future__ import annotations

from pathlib import Path

from . import digits
from .batches import Batches, evaluation
from .images import Images
from .publishers import SOURCES

__all__ = ["CLASSES", "NAMES", "Batches", "Images", "evaluation", "load"]

NAMES = ("digits", *SOURCES)
CLASSES = {"digits": 10, **{name: source.classes for name, source in SOURCES.items()}}


def load(name: str, folder: Path | str | None = None, *, download: bool = False) -> Images:
    """A data set of ``NAMES`` on the CPU, from below ``folder``; ``digits`` needs no folder.

    The folder is laid out as the publishers' archives unpack: ``MNIST/raw``, ``FashionMNIST/raw``,
    ``cifar-10-batches-bin``, ``cifar-100-binary``, ``stl10_binary``. ``download`` gets what is not there yet.

    Raises:
        ValueError: an unknown name, no folder, a file that is missing or not as published, or a failed download.
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    if name == "digits":
        return Images.of(name, 10, *digits.read())
    if folder is None:
        raise ValueError(
            f"folder must be the one that holds {SOURCES[name].folder}, got None: give it as --data-dir or data_dir; "
            "with --download (download=True) it may be empty"
        )
    return _published(name, Path(folder), download)


def _published(name: str, folder: Path, download: bool) -> Images:
    source = SOURCES[name]
    if download and source.missing(folder):
        from .download import fetch

        for one in source.missing(folder):
            fetch(one, folder)
    try:
        return Images.of(name, source.classes, *source.read(folder / source.folder))
    except ValueError as error:
        damaged = "" if source.missing(folder) else "once the damaged file is deleted, "
        address = source.downloads[0].url.rpartition("/")[0]
        raise ValueError(f"{error}; {damaged}--download (download=True) gets it from {address}") from None
