"""Norm Scaling, blog post and authors' code, December 2023."""

from __future__ import annotations

from .cell import Cell

SOURCE = "Norm Scaling, blog post and authors' code, December 2023"
METHODS = ("none", "frobenius", "spectral")


def _row(accuracies: str, losses: str) -> dict[str, Cell]:
    pairs = zip(map(float, accuracies.split()), map(float, losses.split()), strict=True)
    return {
        name: Cell(accuracy=round(percent / 100, 4), loss=loss)
        for name, (percent, loss) in zip(METHODS, pairs, strict=True)
    }


CELLS = {
    "normscale/mlp-5x2000": {
        "none": Cell(0.2512, loss=10.86, sigma=35.4, sigma_deviation=18.4),
        "frobenius": Cell(0.2823, loss=4.47, sigma=7.8, sigma_deviation=3.7),
        "spectral": Cell(0.2321, loss=3.53, sigma=0.8, sigma_deviation=0.02),
    },
    "normscale/mlp-7x4000": _row("23.95 26.62 36.25", "11.00 6.10 2.63"),
    "normscale/resnet34": _row("70.1 75.24 71.79", "2.03 1.46 1.78"),
    "normscale/resnet50": _row("73.45 75.72 73.29", "1.72 1.40 1.63"),
}
"""By row and method."""
