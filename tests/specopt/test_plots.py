"""Figures are readable at 3, 12 and 50 layers: no two labels overlap and none leaves the figure, by the renderer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.figure import Figure
from matplotlib.text import Text

import specopt
from specopt import plots
from specopt.plots.style import COLORS, FEW
from specopt.seeing.history import QUANTITIES, Record, SpectralHistory
from tests.specopt.helpers import train

COUNTS = [1, 3, 8, 9, 12, 50, 120]


def layer_names(count: int) -> list[str]:
    parts = (
        "self_attn.in_proj_weight[0]",
        "self_attn.in_proj_weight[1]",
        "self_attn.in_proj_weight[2]",
        "self_attn.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
    )
    return [f"model.transformer.encoder.layers.{i // 6}.{parts[i % 6]}" for i in range(count)]


def history(count: int, wide: bool = True, steps: int = 40) -> SpectralHistory:
    """As of a training: norms that rise from one another and settle; some not known."""
    random = np.random.default_rng(0)
    names = tuple(layer_names(count))
    last = np.geomspace(0.05, 20, count) if wide else np.linspace(0.9, 1.3, count)
    found = SpectralHistory()
    for t in [1, *(2500 * i for i in range(1, steps))]:
        values = {name: np.full(count, np.nan) for name in QUANTITIES}
        moving = last * (1 - 0.6 * np.exp(-t / 20_000)) * (1 + 0.02 * random.standard_normal(count))
        values |= {"sigma": 1.05 * moving, "sigma_after": moving, "target": last, "frobenius": 5 * moving}
        values["stable_rank"] = 25 + 10 * np.cos(np.arange(count)) * np.exp(-t / 30_000)
        values["sigma_after"][0] = np.nan if t < 9000 else moving[0]
        found.append(Record(t, names, values, float(random.random())))
    return found


def layers(count: int) -> dict[str, np.ndarray[Any, Any]]:
    return {name: (2 + i / count) * np.arange(1, 17) ** -(0.2 + i / count) for i, name in enumerate(layer_names(count))}


def methods(count: int) -> dict[str, tuple[list[float], list[float]]]:
    random = np.random.default_rng(1)
    names = ["vanilla", "weight decay", "adversarial", "spectral", *layer_names(max(0, count - 4))][:count]
    return {
        name: (random.lognormal(i % 5, 1, 6).tolist(), (0.05 + 0.2 * random.random(6)).tolist())
        for i, name in enumerate(names)
    }


DRAWN: dict[str, Callable[..., Figure]] = {
    "norms": lambda count, **kw: plots.spectral_norms(history(count), **kw),
    "norms close together": lambda count, **kw: plots.spectral_norms(history(count, wide=False), **kw),
    "norms over targets": lambda count, **kw: plots.spectral_norms(history(count), relative=True, **kw),
    "stable ranks": lambda count, **kw: plots.stable_ranks(history(count), **kw),
    "spectra": lambda count, **kw: plots.spectra(layers(count), **kw),
    "spectra over the first": lambda count, **kw: plots.spectra(layers(count), relative=True, **kw),
    "gap": lambda count, **kw: plots.gap_against_gradient_norm(methods(count), **kw),
}


def texts(figure: Figure) -> list[Text]:
    """All text that is drawn, in a figure that was: matplotlib keeps ticks beyond the limits, and draws none."""
    hidden: set[int] = set()
    for axes in figure.findobj(Axes):
        assert isinstance(axes, Axes)
        for axis in (axes.xaxis, axes.yaxis):
            drawn = {id(tick) for tick in axis._update_ticks()}  # type: ignore[attr-defined]
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            hidden |= {id(tick.label1) for tick in ticks if id(tick) not in drawn}
            hidden |= {id(tick.label2) for tick in ticks if id(tick) not in drawn}
    found = figure.findobj(Text)
    return [
        text
        for text in found
        if isinstance(text, Text) and text.get_visible() and text.get_text().strip() and id(text) not in hidden
    ]


def clashes(figure: Figure) -> list[str]:
    """Labels that overlap, or leave the figure, or are too small to read."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    drawn = texts(figure)
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in drawn]
    page = figure.bbox
    found = [
        f"{text} leaves the figure"
        for text, box in boxes
        if box.x0 < page.x0 - 0.5 or box.y0 < page.y0 - 0.5 or box.x1 > page.x1 + 0.5 or box.y1 > page.y1 + 0.5
    ]
    for (one, a), (other, b) in combinations(boxes, 2):
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 0.5 and min(a.y1, b.y1) - max(a.y0, b.y0) > 0.5:
            found.append(f"{one} overlaps {other}")
    found += [f"{text.get_text()} is too small" for text in drawn if text.get_fontsize() < 7]
    return found


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", DRAWN)
def test_no_labels_overlap_or_leave_the_figure(kind: str, count: int, tmp_path: Path) -> None:
    path = tmp_path / "figure.png"
    figure = DRAWN[kind](count, path=path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert clashes(figure) == []
    assert len(texts(figure)) >= 5


def test_check_of_labels_sees_overlaps_and_what_leaves_the_figure() -> None:
    figure = Figure()
    ax = figure.add_subplot()
    ax.set_yticks(range(100), layer_names(100))
    found = clashes(figure)
    assert any("overlaps" in line for line in found) and any("leaves the figure" in line for line in found)


@pytest.mark.parametrize("kind", DRAWN)
def test_labels_do_not_overlap_in_small_axes_that_are_given(kind: str) -> None:
    figure = Figure(figsize=(11, 7), layout="constrained")
    for ax, count in zip(figure.subplots(2, 2).flat, (3, 12, 50, 4), strict=True):
        if kind == "gap" and count > 12:
            count = 12  # a legend of 50 is higher than such axes
        assert DRAWN[kind](count, ax=ax) is figure
    assert clashes(figure) == []


def test_all_fifty_layers_are_named_and_names_differ() -> None:
    figure = plots.spectral_norms(history(50))
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == len(set(labels)) == 50
    assert labels[7] == "1.self_attn.in_proj_weight[1]"


def test_every_second_name_is_left_out_where_there_is_no_room() -> None:
    figure = Figure(figsize=(8, 4), layout="constrained")
    plots.spectral_norms(history(50), ax=figure.add_subplot())
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert 10 <= len(labels) < 50 and clashes(figure) == []


def test_heat_map_shows_the_values_in_their_rows_and_the_unknown_in_grey() -> None:
    seen = history(12)
    figure = plots.spectral_norms(seen)
    (mesh,) = [child for child in figure.axes[0].get_children() if isinstance(child, QuadMesh)]
    shown = np.ma.asarray(mesh.get_array()).reshape(12, len(seen))
    np.testing.assert_array_equal(shown.filled(np.nan), seen["sigma_after"].T)
    assert shown.mask[0, :2].all() and figure.axes[0].get_ylim() == (11.5, -0.5)


def test_lines_show_norms_and_targets_of_chosen_layers_in_the_order_asked_for() -> None:
    seen = history(50)
    chosen = [seen.names[30], seen.names[2]]
    ax = plots.spectral_norms(seen, names=chosen, quantity="sigma").axes[0]
    solid = ax.lines[0]
    np.testing.assert_array_equal(solid.get_xdata(), seen.steps)
    np.testing.assert_array_equal(solid.get_ydata(), seen["sigma"][:, 30])
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), seen["target"][:, 30])
    legend = ax.get_legend()
    assert legend is not None
    entries = [text.get_text() for text in legend.get_texts()]
    assert len(entries) == 3 and entries[0].endswith("in_proj_weight[0]") and entries[2] == "targets"


def test_relative_norms_are_divided_by_the_target() -> None:
    seen = history(3)
    ax = plots.spectral_norms(seen, relative=True).axes[0]
    np.testing.assert_allclose(ax.lines[1].get_ydata(), seen["sigma_after"][:, 1] / seen["target"][:, 1])
    assert ax.get_ylabel() == "σ₁ / target"


def test_frobenius_norms_are_shown_with_the_targets_of_frobenius_norms_alone() -> None:
    seen = history(2)
    assert len(plots.spectral_norms(seen, quantity="frobenius").axes[0].lines) == 2
    for record in seen.records:
        record.values["sigma"][1] = np.nan  # as under norm="frobenius"
    ax = plots.spectral_norms(seen, quantity="frobenius").axes[0]
    np.testing.assert_array_equal(ax.lines[2].get_ydata(), seen["target"][:, 1])
    assert len(ax.lines) == 4 and "targets" in [line.get_label() for line in ax.lines]


def test_names_that_matplotlib_would_hide_or_read_as_formulas_are_shown() -> None:
    names = ["_orig_mod.0.weight", "_orig_mod.1.weight", "cost $a$ and $b_$"]
    legend = plots.spectra({name: [2.0, 1.0] for name in names}).axes[0].get_legend()
    assert legend is not None
    assert [text.get_text().strip().replace("\\", "") for text in legend.get_texts()] == names


def test_spectra_show_a_report() -> None:
    weights = [torch.nn.Parameter(torch.randn(20 + i, 30)) for i in range(3)]
    report = specopt.spectral_report(specopt.SNRSGD(weights), top=5)
    ax = plots.spectra(report, names=["0.2"]).axes[0]
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), report[2].spectrum)
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [1, 2, 3, 4, 5])
    assert len(plots.spectra(report).axes[0].lines) == 3


def test_gap_shows_every_finite_point_of_every_method() -> None:
    pairs = {"a": ([1.0, 2.0, np.nan], [0.1, 0.2, 0.3]), "b": ([3.0], [0.4])}
    ax = plots.gap_against_gradient_norm(pairs, xlabel="norm").axes[0]
    points = [child.get_offsets() for child in ax.collections if isinstance(child, PathCollection)]
    np.testing.assert_array_equal(points[0], [[1, 0.1], [2, 0.2]])
    np.testing.assert_array_equal(points[1], [[3, 0.4]])
    assert ax.get_xlabel() == "norm" and ax.get_ylabel() == "generalization gap"


@pytest.mark.parametrize("steps", [(1,), (1, 2), (9_998, 10_002), (100_000, 100_400), (1, 3_000_000), (5, 10**12)])
@pytest.mark.parametrize("count", [3, 12])
def test_steps_are_told_apart_at_any_size(count: int, steps: tuple[int, ...]) -> None:
    records = [Record(step, tuple(layer_names(count)), {"sigma_after": np.arange(count) + 1.0}) for step in steps]
    figure = plots.spectral_norms(SpectralHistory(records))
    assert clashes(figure) == []
    ticks = [text.get_text() for text in texts(figure) if text in figure.axes[0].get_xticklabels()]
    assert len(ticks) == len(set(ticks)) >= 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("count", [1, 3, 12])
def test_norms_of_any_size_alike_or_of_one_step_are_drawn(count: int, scale: float) -> None:
    names = tuple(layer_names(count))
    for spread in (np.zeros(count), np.full(count, 1.0), np.geomspace(1e-6, 1e6, count)):
        if not spread.any() and scale != 1:
            continue
        record = Record(7, names, {"sigma_after": scale * spread})
        figure = plots.spectral_norms(SpectralHistory([record]))
        assert clashes(figure) == []
        assert (
            clashes(plots.spectra({name: [scale * s, 0.5 * scale * s] for name, s in zip(names, spread, strict=True)}))
            == []
        )


def test_figures_come_from_a_monitor_and_its_file(tmp_path: Path) -> None:
    params = [torch.randn(20, 30).requires_grad_() for _ in range(2)]
    optimizer = specopt.NormScaleAdamW(params, lr=1e-3, mode="cap")
    with specopt.SpectralMonitor(optimizer, 1, tmp_path / "x.csv", weights=True) as monitor:
        train(optimizer, params, range(3))
    from_memory, from_file = plots.stable_ranks(monitor.history), plots.stable_ranks(tmp_path / "x.csv")
    for one, other in zip(from_memory.axes[0].lines, from_file.axes[0].lines, strict=True):
        np.testing.assert_array_equal(one.get_xydata(), other.get_xydata())


def test_colors_of_a_few_get_lighter_and_differ_in_grey() -> None:
    def grey(color: str) -> float:
        r, g, b = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in (r, g, b)]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    shades = [grey(color) for color in COLORS]
    assert shades == sorted(shades) and shades[-1] < 0.6
    looks = [plots.style.look(i) for i in range(FEW)]
    assert len(set(looks)) == FEW and len({look.marker for look in looks}) == FEW
    assert len({(look.color, look.marker) for look in map(plots.style.look, range(72))}) == 72


@pytest.mark.parametrize(
    ("draw", "kind", "message"),
    [
        (
            lambda: plots.spectral_norms(history(3), quantity="norm"),
            ValueError,
            "quantity must be one of sigma_after, ",
        ),
        (lambda: plots.spectral_norms(history(3), names=["x"]), ValueError, r"names must be among model.*got \['x'\]"),
        (lambda: plots.spectral_norms(history(3), names=[]), ValueError, r"names must be among .* got \[\]"),
        (lambda: plots.spectral_norms(SpectralHistory()), ValueError, "history must hold values of σ₁, and has none"),
        (lambda: plots.spectral_norms(3), TypeError, "history must be a SpectralHistory or the path .*, got int"),  # type: ignore[arg-type]
        (
            lambda: plots.stable_ranks(SpectralHistory([Record(1, ("a",), {"sigma": np.ones(1)})])),
            ValueError,
            "stable rank, and has none; the monitor needs weights=True",
        ),
        (lambda: plots.spectra({}), ValueError, "layers must hold a finite singular value"),
        (lambda: plots.spectra({"a": [np.nan]}), ValueError, "layers must hold a finite singular value"),
        (lambda: plots.spectra({"a": [1.0]}, names=["b"]), ValueError, r"names must be among a, got \['b'\]"),
        (
            lambda: plots.spectra([1]),
            TypeError,
            "layers must be a report, .* got a list with int",
        ),
        (lambda: plots.spectra({"a": np.ones((2, 2))}), ValueError, r"one-dimensional .* got \(2, 2\) for a"),
        (lambda: plots.gap_against_gradient_norm({}), ValueError, "methods must hold a finite point"),
        (
            lambda: plots.gap_against_gradient_norm({"a": ([1.0], [1.0, 2.0])}),
            ValueError,
            r"as many gradient norms as gaps, got \(1,\) and \(2,\) for a",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw: Callable[[], Figure], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        draw()


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_specopt_takes_matplotlib_only_for_its_figures_and_never_pyplot() -> None:
    loaded = "print([m for m in ('matplotlib', 'tensorboard', 'matplotlib.pyplot') if m in sys.modules])"
    assert run(f"import sys, specopt; {loaded}") == "[]"
    assert run(f"import sys, specopt; specopt.plots.spectra; {loaded}") == "['matplotlib']"


def test_missing_matplotlib_is_told_with_the_extra_that_brings_it() -> None:
    code = """
import sys
sys.modules["matplotlib"] = None
import specopt
try:
    specopt.plots
except ModuleNotFoundError as error:
    print(error)
"""
    assert run(code) == "specopt.plots draws with matplotlib, which is not installed: pip install 'specopt[plots]'"


def test_unknown_attribute_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'specopt' has no attribute 'plot'"):
        _ = specopt.plot  # type: ignore[attr-defined]
