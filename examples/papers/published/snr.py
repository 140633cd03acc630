"""Yoshida and Miyato, Spectral norm regularization, arXiv 1705.10941: its tables of test accuracy and generalization
gap."""

from __future__ import annotations

from .cell import Cell

SOURCE = "Yoshida and Miyato, arXiv 1705.10941"
METHODS = ("vanilla", "weight-decay", "adversarial", "snr")


def _row(threshold: float, accuracies: str, gaps: str) -> tuple[float, dict[str, Cell]]:
    pairs = zip(map(float, accuracies.split()), map(float, gaps.split()), strict=True)
    return threshold, {name: Cell(accuracy, gap=gap) for name, (accuracy, gap) in zip(METHODS, pairs, strict=True)}


_ROWS = {
    "vgg-cifar10-b64": _row(0.88, ".898 .897 .884 .904", ".079 .074 .109 .068"),
    "vgg-cifar10-b4096": _row(0.85, ".858 .863 .870 .885", ".092 .064 .064 .045"),
    "nin-cifar100-b64": _row(0.62, ".626 .672 .627 .669", ".231 .120 .253 .090"),
    "nin-cifar100-b4096": _row(0.59, ".597 .618 .607 .640", ".205 .119 .196 .090"),
    "densenet-cifar100-b64": _row(0.67, ".675 .718 .675 .709", ".317 .080 .299 .095"),
    "densenet-cifar100-b4096": _row(0.63, ".639 .671 .649 .697", ".235 .111 .110 .051"),
    "densenet-stl10-b64": _row(0.70, ".724 .723 .707 .735", ".063 .073 .069 .068"),
    "densenet-stl10-b4096": _row(0.67, ".686 .689 .676 .697", ".096 .057 .015 .042"),
}

CELLS = {f"snr/{row}": cells for row, (_, cells) in _ROWS.items()}
"""By row and method."""

THRESHOLDS = {f"snr/{row}": threshold for row, (threshold, _) in _ROWS.items()}
"""By row, the test accuracy above which an epoch counts for the generalization gap."""
