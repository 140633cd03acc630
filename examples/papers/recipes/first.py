"""For a first try, outside the papers' tables: the embedded UCI digits, and LeNet-5 on MNIST and Fashion-MNIST.

SGD with momentum 0.9 and batches of 64, or AdamW with lr 1e-3; 30 epochs on digits and 20 on the others. Images of
8 x 8 pixels do not survive a crop, nor handwritten digits a flip: UCI digits are given as they are, MNIST is cropped
alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..methods import Method
from ..recipe import Recipe
from .normscale import FROBENIUS, SPECTRAL
from .snr import METHODS

ROWS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "digits/mlp": ("digits", "mlp", {"depth": 4, "width": 256}, 30),
    "mnist/lenet5": ("mnist", "lenet5", {}, 20),
    "fashion-mnist/lenet5": ("fashion-mnist", "lenet5", {}, 20),
}
"""Data, model, its options and epochs."""


def recipes() -> Iterator[Recipe]:
    for row in ROWS:
        for method in (*METHODS, Method("adamw", base="adamw"), FROBENIUS, SPECTRAL):
            yield recipe(row, method)


def recipe(row: str, method: Method) -> Recipe:
    data, model, options, epochs = ROWS[row]
    return Recipe(
        name=f"{row}/{method.name}",
        data=data,
        model=model,
        model_options=options,
        method=method,
        batch=64,
        epochs=epochs,
        lr=0.01 if method.base == "sgd" else 1e-3,
        augment=data != "digits",
        start="orthogonal",
    )
