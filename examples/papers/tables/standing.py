"""Where control inside the optimizer's step stands: accuracy and cost of this library's methods beside the best of the
paper's, row by row."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from scipy import stats

from .. import published
from ..recipes import rows as recipes_of
from .claims.ours import ours_of
from .claims.testing import SEEDS
from .markdown import NOTHING, label, markdown_table, percent_over_seeds
from .results import Row, in_order

HEAD = ("row", "ours", "accuracy", "best of the paper's", "its accuracy", "difference", "step of ours", "of the best")
NOTES = """\
Test accuracy in percent after the last epoch, mean (standard deviation over the seeds of ours). The best of the paper's
methods is the one with the highest mean over these seeds, among methods that were run from all of them; it is chosen by
the same test images, which favours it. Difference: ours less it, in percentage points, the mean over seeds, with its
95 % interval from three seeds on; whether ours is ahead of every method of the paper is tested below the claims. Step:
the time of a training step over that of the row's first method."""
TOO_FEW = "not enough seeds"


@dataclass(frozen=True)
class Standing:
    """Of one of ours in a row, beside the best of the paper's."""

    row: Row
    method: str
    best: str | None
    """None where no method of the paper has all seeds of ours."""

    @property
    def differences(self) -> list[float]:
        """Ours less the best, in percentage points, of every seed of ours."""
        if self.best is None:
            return []
        ours, theirs = self.row.accuracies(self.method), self.row.accuracies(self.best)
        return [100 * (ours[seed] - theirs[seed]) for seed in sorted(ours)]

    @property
    def steps(self) -> list[float | None]:
        """Of ours and of the best, over that of the row's first method; None where not timed."""
        return [self.row.times.get(method) if method else None for method in (self.method, self.best)]

    @property
    def line(self) -> list[str]:
        ours = self.row.accuracies(self.method)
        best, theirs = TOO_FEW, NOTHING
        if self.best is not None:
            accuracies = self.row.accuracies(self.best)
            best = label(self.best, self.row.table)
            theirs = percent_over_seeds([accuracies[seed] for seed in sorted(ours)])
        return [
            f"`{self.row.name}`, {self.row.size_in_words}",
            *(label(self.method, self.row.table), percent_over_seeds(list(ours.values())), best, theirs),
            difference(self.differences),
            *(NOTHING if step is None else f"{step:.2f}" for step in self.steps),
        ]


def standing_section(tables: Sequence[str], rows: Sequence[Row]) -> str:
    """In short, then a line for each of ours in each row that it and one of the paper's methods were run in; then what
    was not run."""
    found = [each for table in tables for row in in_order(table, rows) for each in standings(row)]
    shown = {each.row.name for each in found}
    absent = [words for table in tables if (words := not_run(table, shown))]
    parts = [in_short(found), markdown_table([HEAD, *(each.line for each in found)], texts=2), NOTES] if found else []
    return "\n\n".join([*parts, *([f"Rows with ours that were not run: {'; '.join(absent)}."] if absent else [])])


def standings(row: Row) -> list[Standing]:
    """Of each of ours that was run; of none where none of the paper's was."""
    if not any(row.accuracies(method) for method in published.methods(row.name)):
        return []
    return [
        Standing(row, method, best_published(row, method)) for method in ours_of(row.name) if row.accuracies(method)
    ]


def best_published(row: Row, ours: str) -> str | None:
    """The paper's method of the highest mean accuracy over the seeds of ours, among those that were run from all of
    them: a mean over fewer would be chosen for lucky seeds."""
    seeds = row.accuracies(ours).keys()
    found = {method: row.accuracies(method) for method in published.methods(row.name)}
    means = {
        method: statistics.fmean(values[seed] for seed in seeds)
        for method, values in found.items()
        if seeds <= values.keys()
    }
    return max(means, key=means.__getitem__, default=None)


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's of the mean, at 95 %; None of fewer than three values."""
    if len(values) < SEEDS:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values))
    half = error * float(stats.t.ppf(0.975, len(values) - 1))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def difference(values: Sequence[float]) -> str:
    """``+0.12 [-0.05, +0.29]``."""
    if not values:
        return NOTHING
    ends = interval(values)
    return f"{statistics.fmean(values):+.2f}" + ("" if ends is None else f" [{ends[0]:+.2f}, {ends[1]:+.2f}]")


def in_short(found: Sequence[Standing]) -> str:
    """A line for each of ours in each table."""
    keys = dict.fromkeys((each.row.table, each.method) for each in found)
    return "\n".join(summary(*key, [each for each in found if (each.row.table, each.method) == key]) for key in keys)


def summary(table: str, method: str, found: Sequence[Standing]) -> str:
    """In how many rows, each at each of its sizes, it is ahead of the best and behind it, and at which cost."""
    compared = [each for each in found if each.best is not None]
    ends = [interval(each.differences) for each in compared]
    ahead = sum(each is not None and each[0] > 0 for each in ends)
    behind = sum(each is not None and each[1] < 0 for each in ends)
    left = f"; {TOO_FEW} in {len(found) - len(compared)}" if len(found) > len(compared) else ""
    ours, best = (span([step for each in found if (step := each.steps[i]) is not None]) for i in (0, 1))
    return (
        f"- `{table}`, {label(method, table)}: ahead of the best of the paper's in {ahead} of {len(compared)} row(s), "
        f"behind it in {behind}, by 95 % intervals, each by itself{left}; step {ours}, that of the best {best}."
    )


def span(steps: Sequence[float]) -> str:
    if not steps:
        return "not timed"
    low, high = f"{min(steps):.2f}", f"{max(steps):.2f}"
    return low if low == high else f"{low} to {high}"


def not_run(table: str, shown: Collection[str]) -> str:
    """The rows that have ours and are not shown, in few words."""
    rows = [name for name in recipes_of(table) if ours_of(name)]
    absent = [name.removeprefix(f"{table}/") for name in rows if name not in shown]
    if len(absent) == len(rows):
        return f"all {len(rows)} of `{table}`"
    return f"of `{table}` {', '.join(absent)}" if absent else ""
