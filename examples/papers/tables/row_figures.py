"""Figures of a row: gap against gradient norm, curves by epoch, spectral norms of layers, of all its methods."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import specopt.plots
from specopt import SpectralHistory
from specopt.plots import style
from specopt.seeing.history import Record

from .markdown import label
from .results import Row, Run

DPI = 90

Array = npt.NDArray[np.float64]


def draw_row(row: Row, folder: Path) -> list[tuple[str, Path]]:
    """Writes the row's figures; what each shows, and its path."""
    drawn: dict[str, tuple[str, Callable[[Row], Figure | None]]] = {
        "gap": ("Generalization gap against gradient norm, by epoch and at the end", gap_against_gradient_norm),
        "curves": ("Accuracy and loss by epoch, mean and standard deviation over seeds", curves),
        "norms": ("Spectral norms of layers by epoch, means over seeds", spectral_norms),
    }
    stem = f"{row.name.replace('/', '-')}-{row.size}"
    written = []
    for kind, (what, draw) in drawn.items():
        figure = draw(row)
        if figure is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{stem}-{kind}.png"
            figure.savefig(path, dpi=DPI, metadata={"Software": None})
            written.append((f"{what}: {row.name}, {row.size_in_words}", path))
    return written


# --- the paper's scatter ----------------------------------------------------------------------------------------------


def gap_against_gradient_norm(row: Row) -> Figure | None:
    """Training less test accuracy against the gradient norm: a point for each method and epoch, of means over seeds;
    and one for each run after its last epoch. None where nothing is finite."""
    by_epoch = {label(method, row.table): epoch_points(list(row.of(method).values())) for method in row.methods}
    by_run = {label(method, row.table): run_points(list(row.of(method).values())) for method in row.methods}
    if not (has_point(by_epoch) and has_point(by_run)):
        return None
    figure = Figure(figsize=(13.5, 3.8), layout="constrained")
    for axes, points, what in zip(
        figure.subplots(1, 2), (by_epoch, by_run), ("method and epoch", "run, after the last epoch"), strict=True
    ):
        pairs = {method: (norms, gaps) for method, (norms, gaps) in points.items()}
        specopt.plots.gap_against_gradient_norm(pairs, ylabel="training less test accuracy", ax=axes)
        axes.set_title(f"a point for each {what}", fontsize=style.PLAIN)
    return figure


def has_point(methods: Mapping[str, Array]) -> bool:
    together = np.concatenate(list(methods.values()), axis=1)
    return bool(np.isfinite(together).all(0).any())


def epoch_points(runs: Sequence[Run]) -> Array:
    """(2, measured epochs): gradient norms and gaps, means over runs."""
    columns = {name: over_runs(runs, name) for name in ("gradient_norm", "train_accuracy", "test_accuracy")}
    gaps = columns["train_accuracy"] - columns["test_accuracy"]
    return np.stack([columns["gradient_norm"].mean(0)[1:], gaps.mean(0)[1:]])


def run_points(runs: Sequence[Run]) -> Array:
    """(2, runs)."""
    norms, train, test = (over_runs(runs, name)[:, -1] for name in ("gradient_norm", "train_accuracy", "test_accuracy"))
    return np.stack([norms, train - test])


def over_runs(runs: Sequence[Run], name: str) -> Array:
    """(runs, measured epochs + 1), nan where not finite."""
    return np.array([numbers(run.epochs[name]) for run in runs])


def numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


# --- curves -----------------------------------------------------------------------------------------------------------


def curves(row: Row) -> Figure:
    """Training and test accuracy and loss by epoch: mean over seeds, and a band of a standard deviation a side."""
    figure = Figure(figsize=(10.5, 6), layout="constrained")
    for line, what in zip(figure.subplots(2, 2), ("accuracy", "loss"), strict=True):
        for axes, part in zip(line, ("train", "test"), strict=True):
            draw_curves(axes, row, f"{part}_{what}")
            finish(axes, f"{'training' if part == 'train' else part} {what}")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", frameon=False, fontsize=style.PLAIN - 1, handlelength=3)
    return figure


def draw_curves(axes: Axes, row: Row, name: str) -> None:
    """A loss of which a few values stand far above the rest gets a logarithmic axis."""
    shown = []
    for i, method in enumerate(row.methods):
        values = over_runs(list(row.of(method).values()), name)
        mean, deviation = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])
        epochs = numbers(next(iter(row.of(method).values())).epochs["epoch"])
        color, line, _ = style.look(i)
        axes.plot(epochs, mean, color=color, linestyle=line, linewidth=1.4, label=label(method, row.table))
        axes.fill_between(epochs, mean - deviation, mean + deviation, color=color, alpha=0.15, linewidth=0)
        shown += [value for value in mean.tolist() if math.isfinite(value) and value > 0]
    if name.endswith("loss") and shown and max(shown) > 20 * statistics.median(shown):
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(bottom=min(shown) / 2)  # a deviation above the mean would reach down to nothing


def finish(axes: Axes, what: str) -> None:
    style.label(axes, "epoch", what)
    axes.tick_params(labelsize=style.PLAIN - 1)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


# --- norms ------------------------------------------------------------------------------------------------------------


def spectral_norms(row: Row) -> Figure | None:
    """A panel for each method: the spectral norm of each layer by epoch, the mean over seeds. None where no norm is
    finite."""
    histories = {method: history_of(list(row.of(method).values())) for method in row.methods}
    shown = {method: history for method, history in histories.items() if np.isfinite(history["sigma"]).any()}
    if not shown:
        return None
    layers = max(len(history.names) for history in shown.values())
    columns = min(2, len(shown))
    lines = -(-len(shown) // columns)
    height = 2.8 if layers <= 8 else min(4.4, 1.4 + 0.13 * layers)
    figure = Figure(figsize=(6.8 * columns, height * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, (method, history) in zip(panels, shown.items(), strict=False):
        specopt.plots.spectral_norms(history, ax=axes)
        axes.set_title(label(method, row.table), fontsize=style.PLAIN)
        axes.set_xlabel("epoch", fontsize=style.PLAIN)
    for empty in panels[len(shown) :]:
        empty.remove()
    return figure


def history_of(runs: Sequence[Run]) -> SpectralHistory:
    """Means over runs, with epochs as steps; nan where one is not finite. Targets of Frobenius norms are none of
    sigma's."""
    first = runs[0]
    names = tuple(first.layers)
    sigma = np.array([[numbers(run.layers[name]["sigma"]) for name in names] for run in runs]).mean(0)
    of_sigma = (first.about.get("method") or {}).get("norm_scale", {}).get("norm") != "frobenius"
    target = np.array([target_of(first.layers[name]) if of_sigma else math.nan for name in names])
    return SpectralHistory(
        Record(epoch, names, {"sigma": sigma[:, i], "sigma_after": sigma[:, i], "target": target})
        for i, epoch in enumerate(first.layer_epochs)
    )


def target_of(layer: Mapping[str, Any]) -> float:
    """nan where there is none, or more than one."""
    return layer["target"] if isinstance(layer["target"], int | float) else math.nan
