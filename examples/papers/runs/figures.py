"""The figures of one run: accuracy and loss by epoch, spectral norms and stable ranks of its layers, and ranks."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import specopt.plots

from .log import Log

TRAIN, TEST = "#D55E00", "#0072B2"


def draw_run(log: Log, folder: Path) -> list[Path]:
    """curves.png, spectral_norms.png, stable_ranks.png and ranks.png; what was not finite is left out."""
    history = log.history()
    written = [folder / f"{name}.png" for name in ("curves", "spectral_norms", "stable_ranks", "ranks")]
    draw_curves(log, written[0])
    for draw, path in zip((specopt.plots.spectral_norms, specopt.plots.stable_ranks), written[1:3], strict=True):
        figure = draw(history)
        figure.axes[0].set_xlabel("epoch")
        figure.savefig(path, dpi=110)
    draw_ranks(log, written[3])
    return written


def draw_curves(log: Log, path: Path) -> None:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, what in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        for part, color, style in (("train", TRAIN, "--"), ("test", TEST, "-")):
            axes.plot(_column(log, "epoch"), _column(log, f"{part}_{what}"), style, color=color, label=part)
        _finish(axes, what)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def draw_ranks(log: Log, path: Path) -> None:
    """The rank of each layer's matrix over the largest it can have, where it was counted."""
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    epochs = _column(log, "epoch")
    for values in log.layers.values():
        counted = [(epoch, rank) for epoch, rank in zip(epochs, values["rank"], strict=True) if math.isfinite(rank)]
        if counted:
            axes.plot(*zip(*counted, strict=True), "o-", color="0.3", alpha=0.6, markersize=3, linewidth=1)
    axes.set_title(f"{len(log.layers)} layers", fontsize=10)
    _finish(axes, "rank of the weight")
    figure.savefig(path, dpi=110)


def _column(log: Log, name: str) -> list[float]:
    return [row[name] for row in log.epochs]


def _finish(axes: Axes, what: str) -> None:
    axes.set(xlabel="epoch", ylabel=what)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
