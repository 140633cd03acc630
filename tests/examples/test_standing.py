"""Where ours stand beside the best of the paper's, of made-up results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from papers.published.gradreg import METHODS_OF_ROWS
from papers.tables import standing
from papers.tables.claims.ours import ours_of
from papers.tables.results import Row
from scipy import stats

from tests.examples.results_samples import made_row


def row(name: str, **accuracies: tuple[float, ...]) -> Row:
    """Runs that end with these, by method with underscores in place of hyphens, and by seed."""
    methods: Mapping[str, tuple[float, ...]] = {key.replace("_", "-"): values for key, values in accuracies.items()}
    made = made_row(f"gradreg/{name}", {key: {} for key in methods}, range(max(map(len, methods.values()))))
    runs = tuple(
        replace(run, epochs={**run.epochs, "test_accuracy": [0.1, methods[run.method][run.seed]]})
        for run in made.runs
        if run.seed < len(methods[run.method])
    )
    return replace(made, runs=runs)


def section(*rows: Row) -> str:
    return standing.standing_section(["gradreg"], rows)


def cells_of(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_ours_stands_beside_the_best_published_method_of_its_row_with_the_interval_of_the_difference() -> None:
    there = row("c2-baseline", none=(0.96, 0.97, 0.98), spect_reg=(0.96, 0.96, 0.97), spectral=(0.98, 0.98, 1.0))
    there = replace(there, times={"none": 1.0, "spect-reg": 1.7, "spectral": 1.042})
    head, _, line = cells_of(section(there))
    low, high = stats.t.interval(0.95, 2, 5 / 3, stats.sem([2.0, 1.0, 2.0]))
    assert line == [
        "`gradreg/c2-baseline`, tiny, 4 epochs",
        *("Norm Scaling (ours)", "98.67 (1.15)", "none", "97.00 (1.00)"),
        f"+1.67 [{low:+.2f}, {high:+.2f}]",
        *("1.04", "1.00"),
    ]
    assert len(head) == len(line)


def test_differences_and_the_accuracy_of_the_best_are_of_the_seeds_of_ours() -> None:
    there = row("c2-dropout", none=(0.9, 0.9, 0.1, 0.1), cap=(0.91, 0.92))
    assert cells_of(section(there))[-1][2:6] == ["91.50 (0.71)", "none", "90.00 (0.00)", "+1.50"]


def test_a_method_of_one_lucky_seed_is_not_the_best() -> None:
    lucky = row("c2-dropout", none=(0.96, 0.97, 0.98), spect_reg=(0.99,), cap=(0.97, 0.98, 0.99))
    assert cells_of(section(lucky))[-1][3:5] == ["none", "97.00 (1.00)"]
    beside = row("c2-dropout", none=(0.96, 0.97, 0.98), spect_reg=(0.95, 0.96, 0.97, 0.999), cap=(0.97, 0.98, 0.99))
    assert cells_of(section(beside))[-1][3] == "none"


def test_where_no_method_of_the_paper_has_all_seeds_of_ours_nothing_is_compared() -> None:
    there = row("c2-dropout", none=(0.9, 0.9), spect_reg=(0.9,), cap=(0.91, 0.92, 0.93))
    assert cells_of(section(there))[-1][1:7] == ["cap (ours)", "92.00 (1.00)", "not enough seeds", "–", "–", "1.10"]
    assert section(there).startswith(
        "- `gradreg`, cap (ours): ahead of the best of the paper's in 0 of 0 row(s), behind it in 0, by 95 % "
        "intervals, each by itself; not enough seeds in 1; step 1.10, that of the best not timed."
    )
    apart = replace(there, runs=tuple(run for run in there.runs if (run.seed < 2) == (run.method == "none")), times={})
    assert cells_of(section(apart))[-1][3:] == ["not enough seeds", "–", "–", "–", "–"]


def test_a_method_of_ours_is_never_the_best() -> None:
    there = row("c4-500", none=(0.9,), cap=(0.99,), spectral=(0.98,))
    assert {line[3] for line in cells_of(section(there))[2:]} == {"none"}


def test_in_short_counts_rows_by_their_intervals_and_tells_the_range_of_costs() -> None:
    ahead = row("c2-baseline", none=(0.90, 0.91, 0.92), cap=(0.95, 0.961, 0.97))
    behind = row("c2-dropout", none=(0.95, 0.961, 0.97), cap=(0.90, 0.91, 0.92))
    open_ = row("c4-500", none=(0.90, 0.91, 0.92), cap=(0.91, 0.90, 0.92))
    rows = [replace(one, times={"none": 1.0, "cap": time}) for one, time in ((ahead, 1.2), (behind, 1.1), (open_, 1.3))]
    assert section(*rows).splitlines()[0] == (
        "- `gradreg`, cap (ours): ahead of the best of the paper's in 1 of 3 row(s), behind it in 1, by 95 % "
        "intervals, each by itself; step 1.10 to 1.30, that of the best 1.00."
    )


def test_rows_without_ours_or_without_the_papers_are_listed_as_not_run() -> None:
    lacking = row("c2-dropout", none=(0.9,)), row("c4-500", cap=(0.9,))
    assert section(*lacking) == "Rows with ours that were not run: all 18 of `gradreg`."
    text = section(lacking[1], row("c2-dropout", none=(0.9,), cap=(0.9,)))
    assert standing.NOTES in text
    absent = text.rpartition("\n\n")[2]
    assert absent.startswith("Rows with ours that were not run: of `gradreg` c2-baseline,")
    assert " c4-500," in absent and " c2-dropout," not in absent


def test_a_row_that_has_none_of_ours_is_not_missed() -> None:
    assert "c6" not in section(row("c6", none=(0.9,), spect_reg=(0.9,)), row("c4-500", none=(0.9,), cap=(0.9,)))


def test_all_rows_run_leave_none_to_list() -> None:
    names = [name.removeprefix("gradreg/") for name in METHODS_OF_ROWS if ours_of(name)]
    text = section(*(row(name, none=(0.9,), cap=(0.9,)) for name in names))
    assert "not run" not in text and text.count("| cap (ours) |") == 18
