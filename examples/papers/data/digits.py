"""UCI's optical recognition of handwritten digits, the 1797 images that scikit-learn ships: for a first try.

Images are 8 × 8 counts from 0 to 16, which become 0 to 240, so that nothing is rounded and [0, 255] is nearly filled.
"""

from __future__ import annotations

import torch

from .reading import Split

STEP = 15
LARGEST = 16 * STEP
TO_TRAIN = 1200


def images() -> Split:
    """All of them, in scikit-learn's order."""
    from sklearn.datasets import load_digits  # only those who ask for digits need scikit-learn

    pixels, marks = load_digits(return_X_y=True)
    return Split((torch.from_numpy(pixels) * STEP).to(torch.uint8).view(-1, 1, 8, 8), torch.from_numpy(marks).long())


def read() -> tuple[Split, Split]:
    """The same 1200 of them to train on, drawn once, and the other 597 to test on."""
    x, y = images()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:TO_TRAIN], order[TO_TRAIN:]
    return Split(x[train], y[train]), Split(x[test], y[test])
