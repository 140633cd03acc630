"""Figures of made-up rows: they exist, say what they show, and nothing in them overlaps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from papers.recipe import SCALES
from papers.recipes import find
from papers.tables.results import Row, compact, row_of
from papers.tables.row_figures import (
    curves,
    draw_row,
    epoch_points,
    gap_against_gradient_norm,
    run_points,
    spectral_norms,
)

from tests.examples.results_samples import made_row, result
from tests.specopt.test_plots import clashes, texts

VGG = "snr/vgg-cifar10-b4096"
MLP = "normscale/mlp-5x2000"
SIX = {"vanilla": {"gradient_norm": 0.5}, "weight-decay": {"gradient_norm": 1.5}, "adversarial": {"train": 0.7}}
SIX |= {"snr": {"sigma": 0.5}, "snr-adamw": {"sigma": 40.0}, "cap": {"sigma": 1.0}}
STATED = ("none", "frobenius", "spectral")
PUBLISHED = tuple(f"{method}-published" for method in STATED)
EIGHT = SIX | {"adamw": {"test": 0.6}, "ours": {"sigma": 0.9}}


def with_layers(row: Row, count: int) -> Row:
    """The same with as many layers, named as a deep network's are."""
    one = next(iter(row.runs[0].layers.values()))
    layers = {f"stages.{i // 6}.{i % 6}.branch.{3 * (i % 3)}.0.weight": one for i in range(count)}
    return replace(row, runs=tuple(replace(run, layers=layers) for run in row.runs))


def lines_of(figure: Figure, axes: int) -> dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    return {str(line.get_label()): np.asarray(line.get_ydata()) for line in figure.axes[axes].lines}


def test_files_are_written_one_of_each_kind_and_told(tmp_path: Path) -> None:
    written = draw_row(made_row(VGG, SIX, range(3)), tmp_path / "new")
    names = [path.name for _, path in written]
    assert names == [f"snr-vgg-cifar10-b4096-tiny-4-epochs-{kind}.png" for kind in ("gap", "curves", "norms")]
    assert all(path.read_bytes().startswith(b"\x89PNG") for _, path in written)
    assert all(f"{VGG}, tiny, 4 epochs" in what for what, _ in written)


@pytest.mark.parametrize("layers", [8, pytest.param(54, marks=pytest.mark.full)])
def test_no_labels_overlap_in_norms_of_shallow_and_deep_networks(layers: int) -> None:
    figure = spectral_norms(with_layers(made_row(VGG, SIX, range(1)), layers))
    assert figure is not None and clashes(figure) == []
    assert len(texts(figure)) >= 20


@pytest.mark.parametrize("methods", [1, 6])
def test_no_labels_overlap_in_curves_and_scatter(methods: int) -> None:
    row = made_row(VGG, dict(list(SIX.items())[:methods]), range(3))
    for figure in (curves(row), gap_against_gradient_norm(row)):
        assert figure is not None and clashes(figure) == []
        assert {"vanilla"} <= {text.get_text() for text in texts(figure)}


@pytest.mark.parametrize(
    ("name", "methods"),
    [(MLP, {name: {} for name in (*STATED, "ours", *PUBLISHED)}), (VGG, EIGHT)],
    ids=["seven", "eight"],
)
def test_all_methods_of_a_row_have_room(name: str, methods: dict[str, Any]) -> None:
    row = made_row(name, methods, range(2))
    for figure in (curves(row), gap_against_gradient_norm(row), spectral_norms(row)):
        assert figure is not None and clashes(figure) == []


def test_curves_are_means_over_seeds_of_train_and_test() -> None:
    row = made_row(VGG, {"vanilla": {}, "snr": {"test": 0.8, "train": 0.9}}, range(3))
    figure = curves(row)
    runs = row.of("snr").values()
    for axes, name in enumerate(("train_accuracy", "test_accuracy", "train_loss", "test_loss")):
        expected = np.mean([run.epochs[name] for run in runs], axis=0)
        np.testing.assert_allclose(lines_of(figure, axes)["SNR"], expected)
        assert figure.axes[axes].get_ylabel() == name.replace("train_", "training ").replace("_", " ")


def test_curves_and_norms_stand_at_the_epochs_that_were_measured() -> None:
    row = made_row("gradreg/c2-baseline", {"none": {}, "cap": {}}, range(2), SCALES["full"])
    measured = [25 * i for i in range(11)]
    assert row.protocol["epochs"] == measured[-1]
    norms = spectral_norms(row)
    assert norms is not None
    for axes in (*curves(row).axes, *norms.axes):
        drawn = [list(np.asarray(line.get_xdata())) for line in axes.lines if len(np.asarray(line.get_xdata())) > 2]
        assert drawn and all(x == measured for x in drawn)


def test_scatter_has_a_point_for_each_method_and_epoch_and_one_for_each_run() -> None:
    row = made_row(VGG, {"vanilla": {}, "snr": {"train": 0.9}}, range(3))
    figure = gap_against_gradient_norm(row)
    assert figure is not None
    shown = [
        [np.asarray(child.get_offsets()) for child in axes.collections if isinstance(child, PathCollection)]
        for axes in figure.axes
    ]
    epochs = len(row.runs[0].epochs["epoch"]) - 1
    assert [[len(points) for points in panel] for panel in shown] == [[epochs, epochs], [3, 3]]
    runs = list(row.of("snr").values())
    np.testing.assert_allclose(shown[0][1], epoch_points(runs).T)
    np.testing.assert_allclose(shown[1][1], run_points(runs).T)
    last = runs[1].epochs
    expected = [last["gradient_norm"][-1], last["train_accuracy"][-1] - last["test_accuracy"][-1]]  # type: ignore[operator]
    np.testing.assert_allclose(run_points(runs)[:, 1], expected)


def test_values_that_are_not_finite_leave_gaps_and_a_row_of_nothing_else_no_figure() -> None:
    def lost(seed: int, rows: slice) -> Row:
        found = result(f"{VGG}/vanilla", seed)
        for epoch in found["epochs"][rows]:
            epoch["gradient_norm"] = epoch["test_loss"] = None
        for layer in found["layers"].values():
            layer["sigma"][rows] = [None] * len(layer["sigma"][rows])
        return row_of([find(f"{VGG}/vanilla").scaled(SCALES["tiny"])], [compact(found)])

    some, all_ = lost(0, slice(3, 4)), lost(0, slice(None))
    assert clashes(curves(some)) == [] and gap_against_gradient_norm(some) is not None
    assert gap_against_gradient_norm(all_) is None and spectral_norms(all_) is None
    assert clashes(curves(all_)) == []


def test_targets_are_drawn_where_a_method_has_them_of_spectral_norms() -> None:
    row = made_row(MLP, {"none": {}, "spectral": {}, "frobenius": {}}, range(2))
    runs = [
        run
        if run.method == "none"
        else replace(run, layers={name: {**layer, "target": 0.75} for name, layer in run.layers.items()})
        for run in row.runs
    ]
    figure = spectral_norms(replace(row, runs=tuple(runs)))
    assert figure is not None
    assert [axes.get_title() for axes in figure.axes] == ["none", "spectral", "Frobenius"]
    assert ["targets" in lines_of(figure, i) for i in range(3)] == [False, True, False]
    assert figure.axes[0].get_ylabel() == "σ₁"
