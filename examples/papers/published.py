"""What the papers report, as data. Accuracies and gaps are fractions, losses mean cross entropies in nats.

Sources: Yoshida and Miyato, Spectral norm regularization, arXiv 1705.10941 (``snr``, its tables of test accuracy and
generalization gap); Norm Scaling, blog post and authors' code, December 2023 (``normscale``).
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCES = {
    "snr": "Yoshida and Miyato, arXiv 1705.10941",
    "normscale": "Norm Scaling, blog post and authors' code, December 2023",
}
"""By table."""


METHODS = {
    "snr": ("vanilla", "weight-decay", "adversarial", "snr"),
    "normscale": ("none", "frobenius", "spectral"),
}
"""By table, those that the paper compares; all others are this library's."""


@dataclass(frozen=True)
class Cell:
    """What a paper has of one method in one row."""

    accuracy: float
    """On the test images: of the last epoch in Norm Scaling, while SNR's text does not say of which."""
    gap: float | None = None
    """The least training accuracy less test accuracy over epochs whose test accuracy exceeds the row's threshold."""
    loss: float | None = None
    """On the test images, after the last epoch."""
    sigma: float | None = None
    """The mean spectral norm over layers, after the last epoch."""
    sigma_deviation: float | None = None
    """The standard deviation of spectral norms over layers, over the last 100 epochs."""


def _snr(threshold: float, accuracies: str, gaps: str) -> tuple[float, dict[str, Cell]]:
    pairs = zip(map(float, accuracies.split()), map(float, gaps.split()), strict=True)
    return threshold, {name: Cell(*pair) for name, pair in zip(METHODS["snr"], pairs, strict=True)}


def _norm_scaling(accuracies: str, losses: str) -> dict[str, Cell]:
    pairs = zip(map(float, accuracies.split()), map(float, losses.split()), strict=True)
    return {
        name: Cell(accuracy=round(percent / 100, 4), loss=loss)
        for name, (percent, loss) in zip(METHODS["normscale"], pairs, strict=True)
    }


_SNR = {
    "vgg-cifar10-b64": _snr(0.88, ".898 .897 .884 .904", ".079 .074 .109 .068"),
    "vgg-cifar10-b4096": _snr(0.85, ".858 .863 .870 .885", ".092 .064 .064 .045"),
    "nin-cifar100-b64": _snr(0.62, ".626 .672 .627 .669", ".231 .120 .253 .090"),
    "nin-cifar100-b4096": _snr(0.59, ".597 .618 .607 .640", ".205 .119 .196 .090"),
    "densenet-cifar100-b64": _snr(0.67, ".675 .718 .675 .709", ".317 .080 .299 .095"),
    "densenet-cifar100-b4096": _snr(0.63, ".639 .671 .649 .697", ".235 .111 .110 .051"),
    "densenet-stl10-b64": _snr(0.70, ".724 .723 .707 .735", ".063 .073 .069 .068"),
    "densenet-stl10-b4096": _snr(0.67, ".686 .689 .676 .697", ".096 .057 .015 .042"),
}

THRESHOLDS = {f"snr/{row}": threshold for row, (threshold, _) in _SNR.items()}
"""By row, the test accuracy above which an epoch counts for the generalization gap."""

CELLS: dict[str, dict[str, Cell]] = {
    **{f"snr/{row}": cells for row, (_, cells) in _SNR.items()},
    "normscale/mlp-5x2000": {
        "none": Cell(0.2512, loss=10.86, sigma=35.4, sigma_deviation=18.4),
        "frobenius": Cell(0.2823, loss=4.47, sigma=7.8, sigma_deviation=3.7),
        "spectral": Cell(0.2321, loss=3.53, sigma=0.8, sigma_deviation=0.02),
    },
    "normscale/mlp-7x4000": _norm_scaling("23.95 26.62 36.25", "11.00 6.10 2.63"),
    "normscale/resnet34": _norm_scaling("70.1 75.24 71.79", "2.03 1.46 1.78"),
    "normscale/resnet50": _norm_scaling("73.45 75.72 73.29", "1.72 1.40 1.63"),
}
"""By row and method."""


def cell(row: str, method: str) -> Cell | None:
    """What the paper has of a method; a run of Norm Scaling's published code is compared with the same figures. None
    for rows and methods that are not the paper's."""
    return CELLS.get(row, {}).get(method.removesuffix("-published"))
