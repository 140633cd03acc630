"""Where control inside the optimizer's step stands: accuracy and cost of this library's methods beside the best of the
paper's, row by row."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence

from scipy import stats

from . import published
from .claims.ours import OURS
from .claims.testing import SEEDS
from .markdown import NOTHING, label, markdown_table, percent_over_seeds
from .recipes import rows as recipes_of
from .results import Row, in_order

HEAD = ("row", "ours", "accuracy", "best of the paper's", "its accuracy", "difference", "step of ours", "of the best")
NOTES = """\
Test accuracy in percent after the last epoch, mean (standard deviation over seeds). The best of the paper's methods is
the one with the highest mean here, chosen by the same test images, which favours it. Difference: ours less it, in
percentage points, the mean over seeds that both have, with its 95 % interval from three seeds on; whether ours is ahead
of every method of the paper is tested below the claims. Step: the time of a training step over that of the row's first
method."""


def standing_section(tables: Sequence[str], rows: Sequence[Row]) -> str:
    """A line for each of ours in each row that it and one of the paper's methods were run in; then what was not run."""
    lines, absent = [], []
    for table in tables:
        found = {(row.name, row.size): standing(row) for row in in_order(table, rows)}
        lines += [line for each in found.values() for line in each]
        absent.append(not_run(table, list(recipes_of(table)), {name for (name, _), each in found.items() if each}))
    parts = [markdown_table([HEAD, *lines], texts=2), NOTES] if lines else []
    return "\n\n".join([*parts, *([f"Not run: {'; '.join(filter(None, absent))}."] if any(absent) else [])])


def not_run(table: str, rows: Sequence[str], shown: Collection[str]) -> str:
    """The rows that are not shown, in few words."""
    absent = [name.removeprefix(f"{table}/") for name in rows if name not in shown]
    if len(absent) == len(rows):
        return f"all {len(rows)} rows of `{table}`"
    return f"of `{table}` {', '.join(absent)}" if absent else ""


def standing(row: Row) -> list[list[str]]:
    """A line for each of ours that was run; none where none of the paper's was."""
    best = best_published(row)
    return [] if best is None else [line(row, method, best) for method in OURS[row.table] if row.of(method)]


def best_published(row: Row) -> str | None:
    """The paper's method of the highest mean accuracy."""
    found = {method: row.accuracies(method) for method in published.methods(row.name)}
    means = {method: statistics.fmean(values.values()) for method, values in found.items() if values}
    return max(means, key=means.__getitem__, default=None)


def line(row: Row, method: str, best: str) -> list[str]:
    ours, theirs = row.accuracies(method), row.accuracies(best)
    return [
        f"`{row.name}`, {row.size_in_words}",
        label(method, row.table),
        percent_over_seeds(list(ours.values())),
        label(best, row.table),
        percent_over_seeds(list(theirs.values())),
        lead([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]),
        *(f"{row.times[name]:.2f}" if name in row.times else NOTHING for name in (method, best)),
    ]


def lead(differences: Sequence[float]) -> str:
    """``+0.12 [-0.05, +0.29]``: the mean, and Student's 95 % interval of it."""
    if not differences:
        return NOTHING
    mean = 100 * statistics.fmean(differences)
    if len(differences) < SEEDS:
        return f"{mean:+.2f}"
    error = 100 * statistics.stdev(differences) / math.sqrt(len(differences))
    half = error * float(stats.t.ppf(0.975, len(differences) - 1))
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
