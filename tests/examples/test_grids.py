"""Rows of gradient regularization that stand in one table, and their figure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from papers.published.gradreg import CELLS, METHODS_OF_ROWS, SIZES
from papers.tables import table
from papers.tables.grid_figures import accuracy_by_size, draw_grid
from papers.tables.grids import GRIDS, Grid, grid_table, lent
from papers.tables.markdown import label, percent_over_seeds
from papers.tables.results import Row

from specopt.plots.style import look
from tests.examples.results_samples import TINY, made_row
from tests.specopt.test_plots import clashes, texts

C2, C4, C6, WIDER = GRIDS["gradreg"]
OURS = ("snr-adam", "spectral", "cap")


def row(name: str, accuracies: Mapping[str, float], seeds: int = 3) -> Row:
    return made_row(f"gradreg/{name}", {key: {"test": value} for key, value in accuracies.items()}, range(seeds))


def with_accuracies(there: Row, method: str, *values: float) -> Row:
    """The same, but the method ends with these."""
    runs = [
        replace(run, epochs={**run.epochs, "test_accuracy": [0.1, values[run.seed]]}) if run.method == method else run
        for run in there.runs
    ]
    return replace(there, runs=tuple(runs))


def cells_of(markdown: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]


def all_sizes(methods: tuple[str, ...] = ("none", *list(CELLS["gradreg/c4-500"]), *OURS), seeds: int = 3) -> list[Row]:
    return [row(f"c4-{size}", {name: 0.94 + 0.01 * i for name in methods}, seeds) for i, size in enumerate(SIZES)]


# --- one table of several rows ----------------------------------------------------------------------------------------


def test_rows_on_the_wider_network_stand_in_a_table_of_their_own_without_published_figures() -> None:
    assert not set(WIDER.rows) & {name for grid in (C2, C4, C6) for name in grid.rows}
    there = [row(name.removeprefix("gradreg/"), {"none": 0.9, "spect-reg": 0.95}) for name in WIDER.rows]
    head, _, *lines = cells_of(grid_table(WIDER, there))
    assert head[:4] == ["experiment", "", "none", "SpectReg"] and "JacReg" in head
    said = [said for said, *_ in lines]
    assert said[::3] == ["C2, Baseline", "C4, 500 images", "C6"] and len(lines) == len(WIDER.rows) == 7
    assert all(here == "here, 3 seeds" and none.startswith("90.") for _, here, none, *_ in lines)


def test_paper_replication_and_here_stand_below_each_other_for_every_net() -> None:
    there = with_accuracies(row("c2-baseline", {"none": 0.97, "spect-reg": 0.9, "cap": 0.9}), "none", 0.96, 0.97, 0.98)
    head, _, *lines = cells_of(grid_table(C2, [there]))
    assert head == ["net", "", "none", "SpectReg", "DoubleBack", "cap (ours)"]
    assert lines[0] == ["Baseline", "paper", "96.99 (0.15)", "97.59 (0.13)", "97.56 (0.24)", "–"]
    assert lines[1] == ["", "replication", "96.77 (0.31)", "96.61 (0.67)", "96.32 (0.72)", "–"]
    assert lines[2][:3] == ["", "here, 3 seeds", "97.00 (1.00)"] and lines[2][4] == "–"
    assert lines[3][:2] == ["Batchnorm", "paper"]
    assert lines[5] == ["", "here: not run", "–", "–", "–", "–"]
    assert len(lines) == 9


def test_sizes_have_the_replication_alone_and_all_nine_stand_in_one_table() -> None:
    head, _, *lines = cells_of(grid_table(C4, all_sizes()[:2]))
    assert head == [
        *("images", "", "none", "SpectReg", "DoubleBack", "JacReg", "confidence penalty"),
        *("SNR on Adam (ours)", "Norm Scaling (ours)", "cap (ours)"),
    ]
    assert [line[:2] for line in lines[:4]] == [
        *(["500", "replication"], ["", "here, 3 seeds"]),
        *(["1,000", "replication"], ["", "here, 3 seeds"]),
    ]
    assert lines[0][2:7] == ["–", "94.06 (0.38)", "94.17 (0.41)", "93.83 (0.41)", "94.05 (0.41)"]
    assert len(lines) == 18 and lines[-2][0] == "20,000" and lines[-1][1] == "here: not run"


def test_seeds_that_differ_between_methods_are_told_as_a_range() -> None:
    there = row("c6", {"none": 0.9, "spect-reg": 0.9}, 5)
    fewer = replace(there, runs=tuple(run for run in there.runs if run.method == "none" or run.seed < 2))
    lines = cells_of(grid_table(C6, [fewer]))
    assert lines[-1][1] == "here, 2 to 5 seeds"
    assert cells_of(grid_table(C6, [row("c6", {"none": 0.9}, 1)]))[-1][1] == "here, 1 seed"


def test_percent_tells_the_deviation_and_runs_without_a_number() -> None:
    assert percent_over_seeds([0.96, 0.98]) == "97.00 (1.41)"
    assert percent_over_seeds([0.96]) == "96.00"
    assert percent_over_seeds([0.96, None, 0.98]) == "97.00 (1.41) (2 of 3)"
    assert percent_over_seeds([None]) == "none" and percent_over_seeds([]) == "–"


def test_one_name_of_a_method_is_told_by_its_table() -> None:
    assert label("spectral", "gradreg") == "Norm Scaling (ours)" and label("spectral", "normscale") == "spectral"
    assert label("spectral-published", "normscale") == "spectral, as published"


def test_c6_shows_ours_from_the_same_seeds_of_the_net_that_it_shares_with_c2_and_says_so() -> None:
    own = row("c6", {"none": 0.9, "spect-reg": 0.9}, 2)
    shared = row("c2-dropout", {"none": 0.8, "double-back": 0.8, "cap": 0.95}, 3)
    text = table.table_section("gradreg", [shared, own])
    head, _, *lines = cells_of(text.partition("### C6")[2].partition("\n\n")[2].partition("\n\n")[0])
    assert head == ["net", "", "none", "SpectReg", "JacReg", "FrobReg", "cap (ours)"]
    ours = [shared.accuracies("cap")[seed] for seed in (0, 1)]
    assert lines[-1][1] == "here, 2 seeds" and lines[-1][-1] == percent_over_seeds(ours)
    note = "Ours are the runs of `gradreg/c2-dropout`: the net, images and seeds are the same."
    assert text.count(note) == 1 and text.index("### C6") < text.index(note)
    assert "| cap (ours) | 2 |" not in text  # among the measures of C6's own runs


def test_c6_shows_nothing_of_runs_by_another_protocol() -> None:
    own, shared = row("c6", {"none": 0.9}), row("c2-dropout", {"none": 0.9, "cap": 0.9})
    other = replace(shared, protocol={**shared.protocol, "epochs": 7})
    assert lent(C6, own, [own, other]) == own and lent(C6, own, [own]) == own
    assert lent(C2, shared, [own, shared]) == shared
    assert len(lent(C6, own, [own, shared]).runs) == 6
    assert "Ours are the runs of" not in table.table_section("gradreg", [own, other])


# --- a row, and the whole table ---------------------------------------------------------------------------------------


def test_a_rows_own_table_has_paper_replication_and_here_with_deviations() -> None:
    head, _, *lines = cells_of(table.row_table(row("c2-baseline", {"none": 0.97, "spect-reg": 0.97})))
    assert head[2:5] == ["test accuracy: paper", "replication", "here"] and head[5] == "test loss"
    found = {line[0]: line for line in lines}
    assert found["SpectReg"][2:4] == ["0.9759 ± 0.0013", "0.9661 ± 0.0067"]
    assert re.fullmatch(r"0\.\d{4} ± 0\.\d{4}", found["SpectReg"][4])
    assert re.fullmatch(r"\d\.\d{3} ± \d\.\d{3}", found["SpectReg"][5])
    assert found["Norm Scaling (ours)"][1:5] == ["not run", "–", "–", "–"]
    head, *_ = cells_of(table.row_table(row("c4-500", {"none": 0.97})))
    assert head[2:4] == ["test accuracy: replication", "here"]


def test_the_section_gathers_rows_by_size_and_folds_their_own_tables() -> None:
    larger = row("c4-500", {"double-back": 0.9})
    other = made_row("gradreg/c4-500", {"double-back": {}}, scale=replace(TINY, name="cpu"))
    text = table.table_section("gradreg", [larger, row("c4-2000", {"none": 0.9}), other, row("c6", {"none": 0.9})])
    heads = [line for line in text.splitlines() if line.startswith("### ")]
    assert heads == [
        "### C4: the size of the training set, cpu, 4 epochs",
        "### `gradreg/c4-500`, cpu, 4 epochs",
        "### C4: the size of the training set, tiny, 4 epochs",
        "### `gradreg/c4-500`, tiny, 4 epochs",
        "### `gradreg/c4-2000`, tiny, 4 epochs",
        "### C6: whole Jacobians and a random projection, tiny, 4 epochs",
        "### `gradreg/c6`, tiny, 4 epochs",
    ]
    assert text.count("<details>") == text.count("</details>") == 3
    assert text.count(table.NOTES_OF_GRIDS) == text.count(table.NOTES) == 1
    assert "- `gradreg/c2-baseline`" in text and "- `gradreg/c6`" not in text


def test_a_grids_figure_takes_the_place_of_its_rows_figures() -> None:
    def grid_figures(grid: Grid, rows: object) -> list[tuple[str, str]]:
        return [("by size", "sizes.png")] if grid is C4 else []

    text = table.table_section(
        "gradreg",
        [row("c4-500", {"none": 0.9}), row("c6", {"none": 0.9})],
        figures=lambda there: [("own", f"{there.name}.png")],
        grid_figures=grid_figures,
    )
    assert re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text) == ["sizes.png", "gradreg/c6.png"]


def test_every_row_of_the_paper_stands_in_one_grid() -> None:
    names = [name for grid in GRIDS["gradreg"] for name in grid.rows]
    assert len(names) == len(set(names)) and set(names) == set(METHODS_OF_ROWS) > set(CELLS)


# --- accuracy by size -------------------------------------------------------------------------------------------------


def line_of(axes: Axes, color: str, style: str) -> tuple[list[float], list[float]]:
    (found,) = (line for line in axes.lines if (line.get_color(), line.get_linestyle()) == (color, style))
    return list(np.asarray(found.get_xdata())), list(np.asarray(found.get_ydata()))


def test_figure_has_means_here_and_the_replications_dotted() -> None:
    rows = all_sizes(("double-back", "spect-reg"))[:3]
    rows[0] = with_accuracies(with_accuracies(rows[0], "double-back", 0.94, 0.95, 0.96), "spect-reg", 0.95, 0.96, 0.95)
    figure = accuracy_by_size(C4, rows[::-1])
    whole, less = figure.axes
    methods = C4.methods(rows)
    color, spect_reg = (look(methods.index(method)).color for method in ("double-back", "spect-reg"))
    x, y = line_of(whole, color, "-")
    assert x == pytest.approx([500, 1000, 2000], rel=0.1) and y[0] == pytest.approx(95.0)
    x, y = line_of(whole, color, ":")
    assert x == list(SIZES) and y[0] == pytest.approx(94.17) and y[-1] == pytest.approx(98.22)
    assert line_of(less, color, "-")[1] == [0.0] * 3
    assert line_of(less, spect_reg, "-")[1][0] == pytest.approx(100 * (0.01 + 0.01 - 0.01) / 3)
    assert line_of(less, spect_reg, ":")[1][0] == pytest.approx(94.06 - 94.17)
    assert {text.get_text() for text in texts(figure)} >= {"DoubleBack", "replication", "500", "20k"}


@pytest.mark.parametrize("sizes", [1, 9])
def test_no_labels_overlap_in_the_figure_by_size(sizes: int) -> None:
    assert clashes(accuracy_by_size(C4, all_sizes()[:sizes])) == []


def test_the_figure_is_written_for_the_sizes_alone(tmp_path: Path) -> None:
    ((what, path),) = draw_grid(C4, all_sizes(seeds=1)[:2], tmp_path / "new")
    assert path.name == "gradreg-c4-tiny-4-epochs.png" and path.read_bytes().startswith(b"\x89PNG")
    assert "tiny, 4 epochs" in what
    assert draw_grid(C2, [row("c2-baseline", {"none": 0.9})], tmp_path) == []
