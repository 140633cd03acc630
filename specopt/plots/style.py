"""What the figures share: colours, axes with labels that have room, legends beside the axes."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ..seeing.naming import shortened

Array = npt.NDArray[np.float64]
Path = str | os.PathLike[str]

FEW = 8
"""Up to so many layers have a line style and a legend entry each."""
COLORS = ("#000000", "#882255", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's, told apart by the colour-blind, from dark to light; for their yellow, lost on white, Tol's wine."""
STYLES: tuple[Any, ...] = ("-", (0, (5, 1.5)), "-.", (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")
SMALL, PLAIN = 7, 9
"""Points of type: names in great number, and everything else."""
LABEL = 34
"""Characters of a name."""
DPI = 150


class Look(NamedTuple):
    color: str
    style: Any
    marker: str


def look(i: int) -> Look:
    """Of the i-th of a few lines or methods; colour and marker together repeat after 72."""
    return Look(COLORS[i % len(COLORS)], STYLES[i % len(STYLES)], MARKERS[i % len(MARKERS)])


def depth_colors() -> Colormap:
    """Dark for the first layer, light for the last, and never so light that it is lost on white."""
    colors = colormaps["viridis"](np.linspace(0, 0.9, 256))
    return LinearSegmentedColormap.from_list("depth", cast("Any", colors))


def axes_of(ax: Axes | None, width: float, height: float) -> Axes:
    """The axes given, or those of a new figure of so many inches."""
    if ax is None:
        ax = Figure(figsize=(width, height), layout="constrained").add_subplot()
    ax.tick_params(labelsize=PLAIN - 1)
    return ax


def finish(ax: Axes, path: Path | None) -> Figure:
    figure = figure_of(ax)
    if path is not None:
        figure.savefig(path, dpi=DPI)
    return figure


def figure_of(ax: Axes) -> Figure:
    figure: Figure | SubFigure | None = ax.figure
    while isinstance(figure, SubFigure):
        figure = figure.figure
    assert isinstance(figure, Figure)
    return figure


def label(ax: Axes, x: str, y: str) -> None:
    ax.set_xlabel(x, fontsize=PLAIN)
    ax.set_ylabel(y, fontsize=PLAIN)


def step_axis(axis: Axis, steps: Sequence[int]) -> None:
    """Whole numbers, as many as have room; ``20k`` where they are large, and few where all their digits count."""
    first, last = min(steps), max(steps)
    if first == last:
        axis.set_major_locator(FixedLocator([first]))
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
    elif last < 10_000 or last - first > last / 10:
        axis.set_major_locator(MaxNLocator("auto", integer=True))
        axis.set_major_formatter(EngFormatter(sep="") if last >= 10_000 else FuncFormatter(lambda x, _: f"{x:.0f}"))
    else:
        axis.set_major_locator(MaxNLocator(3, integer=True))
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))


def value_axis(ax: Axes, name: str, values: Array) -> None:
    """A logarithmic axis where the values are wide apart, else a linear one."""
    log = is_wide(values)
    if log:
        (ax.set_xscale if name == "x" else ax.set_yscale)("log")
    few_ticks(ax.xaxis if name == "x" else ax.yaxis, values, log=log)


def is_wide(values: Array) -> bool:
    """All are positive, and the largest is more than 20 times the smallest."""
    finite = values[np.isfinite(values)]
    return bool(len(finite) and finite.min() > 0 and finite.max() / 20 > finite.min())


def few_ticks(axis: Axis, values: Array, *, log: bool) -> None:
    """Labels with room between them, on a linear or a logarithmic axis."""
    axis.set_minor_locator(NullLocator())
    if not log:
        axis.set_major_locator(MaxNLocator(6))
        return
    finite = values[np.isfinite(values)]
    decades = math.log10(finite.max()) - math.log10(finite.min())
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades <= 2 else (1.0,), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def legend(ax: Axes, entries: int) -> None:
    """Right of the axes, in columns of at most 24."""
    ax.legend(
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
        borderaxespad=0,
        frameon=False,
        fontsize=PLAIN - 1,
        ncols=columns(entries),
        handlelength=3,
    )


def columns(entries: int) -> int:
    return max(1, -(-entries // 24))


def labels_of(names: Sequence[str], width: int = LABEL) -> list[str]:
    """Names in at most so many characters: where one is longer, without as much as needed of the modules that all begin
    with, and cut in the middle if that is not enough."""
    names = list(names)
    while max(map(len, names), default=0) > width and _share_a_module(names):
        names = [name.partition(".")[2] for name in names]
    names = shortened([name.replace("$", r"\$") for name in names], width)
    return [f" {name}" if name.startswith("_") else name for name in names]  # matplotlib's legends leave those out


def _share_a_module(names: Sequence[str]) -> bool:
    return (
        len(names) > 1 and all("." in name for name in names) and len({name.partition(".")[0] for name in names}) == 1
    )


def row_labels(ax: Axes, names: Sequence[str]) -> None:
    """Names beside rows 0, 1, ... from the top, every one or, where the axes are too low for that, every second or
    n-th."""
    figure = figure_of(ax)
    ax.set_yticks([])
    figure.draw_without_rendering()  # only then constrained layout knows how high the axes are
    box = ax.get_window_extent()
    line = 1.3 * SMALL * figure.dpi / 72
    stride = max(1, math.ceil(len(names) * line / max(box.height, 1)))
    width = int(figure.get_figwidth() * figure.dpi * 0.4 / (0.62 * SMALL * figure.dpi / 72))
    chosen = range(0, len(names), stride)
    short = labels_of(names, min(LABEL, max(8, width)))
    ax.set_yticks(list(chosen), [short[i] for i in chosen], fontsize=SMALL)
    ax.tick_params(axis="y", length=2)
