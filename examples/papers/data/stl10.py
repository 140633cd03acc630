"""STL-10's labelled images in the binary version (https://cs.stanford.edu/~acoates/stl10).

Images are 96 × 96 red, then green, then blue values in column-major order; labels, in a file of their own, are 1 to 10.
"""

from __future__ import annotations

from pathlib import Path

from .reading import Counts, Split, labels, records

SIDE = 96
CLASSES = 10
PUBLISHED = Counts(5_000, 8_000)
FILES = ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin")


def read(folder: Path, counts: Counts | None = PUBLISHED) -> tuple[Split, Split]:
    """The training and the test part of what lies in ``folder``; ``counts=None`` takes any number of images.

    Raises:
        ValueError: a file that cannot be read or is not what it must be, naming it.
    """
    train_x, train_y, test_x, test_y = (folder / name for name in FILES)
    train, test = counts or (None, None)
    return _split(train_x, train_y, train), _split(test_x, test_y, test)


def _split(images: Path, marks: Path, count: int | None) -> Split:
    x = records(images, 3 * SIDE * SIDE, count).view(-1, 3, SIDE, SIDE).transpose(2, 3).contiguous()
    y = labels(marks, records(marks, 1, len(x)).view(-1), CLASSES, first=1)
    return Split(x, y)
