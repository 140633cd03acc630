"""The guide's figures: the spectrum of one layer before and after training, with a rule and without.

All have the same axes. Line styles and grey levels alone tell the lines apart, so that they survive a print in grey.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from guide_training import Trained
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

PLACES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
TARGETS = {"sigma": "target σ*", "rms": "target of the root mean square"}


def draw_all(found: Sequence[Trained], places: int, folder: Path) -> list[Path]:
    """A PNG for each control that has a figure, of the first ``places`` singular values."""
    by_name = {trained.control.name: trained for trained in found}
    top = 1.05 * max(max(trained.before[0].item(), trained.after[0].item()) for trained in found)
    written = []
    for trained in found:
        if not trained.control.figure:
            continue
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        if trained.control.rule is None:
            _draw_plain(axes, [other for other in found if other.control.rule is None], trained)
        else:
            _draw_controlled(axes, trained, by_name)
        _finish(axes, places, top)
        written.append(folder / f"{trained.control.figure}.png")
        figure.savefig(written[-1], dpi=100)
    return written


def _draw_plain(axes: Axes, bases: Sequence[Trained], first: Trained) -> None:
    _line(axes, first, after=False, label="before training", color="0.5", linestyle=":", lw=2.4)
    alike = [base for base in bases if base.control.network == first.control.network]
    for base, (color, style) in zip(alike, (("0.0", "-"), ("0.4", "--")), strict=False):
        _line(axes, base, after=True, label=f"after, {base.control.name}", color=color, linestyle=style)
    axes.set_title("without control")


def _draw_controlled(axes: Axes, trained: Trained, by_name: Mapping[str, Trained]) -> None:
    control = trained.control
    if control.target is not None:
        axes.axhline(1.0, color="0.0", linestyle=(0, (6, 3)), lw=0.8, label=TARGETS[control.target])
    _line(axes, trained, after=False, label="before training", color="0.5", linestyle=":", lw=2.4)
    base = f"after, {control.base} alone"
    _line(axes, by_name[control.plain], after=True, label=base, color="0.68", linestyle="-", lw=3.2)
    _line(axes, trained, after=True, label="after, with the rule", color="0.0", linestyle="-")
    axes.set_title(f"{control.name}: {trained.over_base:.2f} × the step of {control.base}")


def _line(axes: Axes, trained: Trained, *, after: bool, label: str, color: str, linestyle: str, **more: float) -> None:
    values = (trained.after if after else trained.before).numpy()
    axes.plot(
        np.arange(1, len(values) + 1), values, label=label, color=color, linestyle=linestyle, **{"lw": 1.8, **more}
    )


def _finish(axes: Axes, places: int, top: float) -> None:
    axes.set(xlabel="i", ylabel="σᵢ", xscale="log", xlim=(0.9, places), ylim=(0, top))
    axes.xaxis.set_major_locator(FixedLocator([place for place in PLACES if place <= places]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda place, _: f"{place:.0f}"))
    axes.legend(loc="upper right", frameon=False, fontsize=9, handlelength=4)
