"""Figures of rows that are read together: accuracy by the size of the training set."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from specopt.plots import style

from .. import published
from .grids import Grid
from .markdown import label
from .results import Row

DPI = 90
APART = 0.02
"""Of a size: how far methods stand beside each other, so that their bars can be told apart."""

Points = Mapping[int, tuple[float, float]]
"""By size, a mean and a standard deviation over runs, in percent."""


def draw_grid(grid: Grid, rows: Sequence[Row], folder: Path) -> list[tuple[str, Path]]:
    """Writes the grid's figure, where it has one; what it shows, and its path.

    Args:
        rows: those that were run, at one size.
    """
    if grid.sizes is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    group = next(iter(grid.rows)).replace("/", "-").rpartition("-")[0]
    path = folder / f"{group}-{rows[0].size}.png"
    accuracy_by_size(grid, rows).savefig(path, dpi=DPI, metadata={"Software": None})
    return [(f"Accuracy by the size of the training set: {rows[0].size_in_words}", path)]


def accuracy_by_size(grid: Grid, rows: Sequence[Row]) -> Figure:
    """Test accuracy after the last epoch by training images, a line for each method, with the standard deviation over
    runs; dotted that of the published replication. On the right each less the reference method's, where small
    differences can be seen: here of the same seeds."""
    sizes = dict(grid.sizes or {})
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    whole, less = figure.subplots(1, 2)
    methods = grid.methods(rows)
    for i, method in enumerate(methods):
        draw(whole, i, len(methods), here(sizes, rows, method), replicated(sizes, method))
        draw(
            less, i, len(methods), here(sizes, rows, method, grid.reference), replicated(sizes, method, grid.reference)
        )
    less.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    reference = label(grid.reference, rows[0].table)
    for axes, what in ((whole, "test accuracy, %"), (less, f"test accuracy less {reference}'s, points")):
        style.label(axes, "training images", what)
        size_axis(axes, list(sizes.values()))
    shown = [handle(i, label(method, rows[0].table)) for i, method in enumerate(methods)]
    shown.append(Line2D([], [], color="0.4", linestyle=":", label="replication"))
    figure.legend(handles=shown, loc="outside right upper", frameon=False, fontsize=style.PLAIN - 1, handlelength=3)
    return figure


def draw(axes: Axes, i: int, methods: int, found: Points, published_ones: Points) -> None:
    color, _, marker = style.look(i)
    beside = 1 + APART * (i - (methods - 1) / 2)
    if published_ones:
        axes.plot(
            list(published_ones),
            [mean for mean, _ in published_ones.values()],
            color=color,
            linestyle=":",
            linewidth=1.1,
        )
    if found:
        means, deviations = zip(*found.values(), strict=True)
        x = [size * beside for size in found]
        axes.errorbar(x, means, deviations, color=color, marker=marker, markersize=4, linewidth=1.2, elinewidth=0.9)


def handle(i: int, name: str) -> Line2D:
    color, _, marker = style.look(i)
    return Line2D([], [], color=color, marker=marker, markersize=4, linewidth=1.2, label=name)


def here(sizes: Mapping[str, int], rows: Sequence[Row], method: str, reference: str | None = None) -> Points:
    """Of every size at which the method was run, and the reference from the same seeds where there is one."""
    found = {}
    for row in sorted(rows, key=lambda row: sizes[row.name]):
        values = row.accuracies(method)
        if reference is not None:
            others = row.accuracies(reference)
            values = {seed: values[seed] - others[seed] for seed in values.keys() & others.keys()}
        if values:
            deviation = statistics.stdev(values.values()) if len(values) > 1 else 0.0
            found[sizes[row.name]] = (100 * statistics.fmean(values.values()), 100 * deviation)
    return found


def replicated(sizes: Mapping[str, int], method: str, reference: str | None = None) -> Points:
    """The published means."""
    found = {}
    for row, size in sizes.items():
        cells = [published.cell(row, name) for name in (method, reference) if name is not None]
        means = [cell.replication for cell in cells if cell is not None and cell.replication is not None]
        if len(means) == len(cells):
            found[size] = (100 * (means[0] - sum(means[1:])), 0.0)
    return found


def size_axis(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(sizes)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}" if size < 1000 else f"{size / 1000:g}k"))
    axes.tick_params(labelsize=style.PLAIN - 1)
