"""The demo's figure: spectral norms by layer for each method, and both accuracies by base optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

Curves = Mapping[str, Sequence[Mapping[str, Any]]]

LAYERS = ("#440154", "#31688e", "#35b779", "#d8b20a")  # dark to light, so that they differ in grey as well
METHODS = ("#0072B2", "#D55E00", "#009E73")  # Okabe and Ito's
ROWS = (("SGD", "SNRSGD"), ("AdamW", "NormScaleAdamW spectral", "NormScaleAdamW frobenius"))


def draw(curves: Curves, path: Path) -> None:
    """Writes a PNG. Each line is a mean over seeds; a row of panels belongs to a base optimizer."""
    figure = Figure(figsize=(16, 7.2), layout="constrained")
    grid = figure.add_gridspec(2, 4, width_ratios=(1, 1, 1, 1.7))
    sigmas = [run["sigmas"] for runs in curves.values() for run in runs]
    limits = 0.85 * np.min(sigmas), 1.15 * np.max(sigmas)
    for row, names in enumerate(ROWS):
        for column, name in enumerate(names):
            draw_sigmas(figure.add_subplot(grid[row, column]), name, curves[name], limits, labelled=column == 0)
        draw_accuracies(figure.add_subplot(grid[row, 3]), names, curves)
    draw_layer_legend(figure.add_subplot(grid[0, 2]), len(sigmas[0][0]))
    figure.savefig(path, dpi=110)


def draw_sigmas(axes: Axes, name: str, runs: Sequence[Mapping[str, Any]], limits: Any, *, labelled: bool) -> None:
    sigmas = np.mean([run["sigmas"] for run in runs], axis=0)  # (epochs + 1, layers)
    spectral = runs[0]["targets"] is not None and "frobenius" not in name
    for layer, color in zip(range(sigmas.shape[1]), LAYERS, strict=True):
        if spectral:
            axes.axhline(runs[0]["targets"][layer], color="0.6", linestyle=":", linewidth=1.2, zorder=1)
        axes.plot(sigmas[:, layer], color=color, linewidth=1.8)
    axes.set(title=name, xlabel="epoch", ylabel="spectral norm" if labelled else "", ylim=limits, yscale="log")
    axes.yaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.5, 1, 2, 5, 10]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ScalarFormatter())


def draw_layer_legend(axes: Axes, layers: int) -> None:
    axes.axis("off")
    lines = [
        Line2D([], [], color=color, linewidth=1.8, label=f"layer {i + 1}") for i, color in enumerate(LAYERS[:layers])
    ]
    lines.append(Line2D([], [], color="0.6", linestyle=":", linewidth=1.2, label="targets"))
    axes.legend(handles=lines, loc="center", frameon=False)


def draw_accuracies(axes: Axes, names: Sequence[str], curves: Curves) -> None:
    for name, color in zip(names, METHODS, strict=False):
        for key, style in (("test", "-"), ("train", "--")):
            axes.plot(np.mean([run[key] for run in curves[name]], axis=0), style, color=color, linewidth=1.6)
    lines = [Line2D([], [], color=color, label=name) for name, color in zip(names, METHODS, strict=False)]
    lines += [Line2D([], [], color="0.3", linestyle=s, label=k) for k, s in (("test", "-"), ("train", "--"))]
    axes.set(title=f"accuracy (base: {names[0]})", xlabel="epoch", ylabel="accuracy", ylim=(0.75, 1.01))
    axes.legend(handles=lines, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
