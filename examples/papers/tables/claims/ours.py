"""What this library's own methods add to the papers' rows."""

from __future__ import annotations

from functools import partial

from ... import published
from ...recipes import rows as recipes_of
from .testing import Rows, Verdict, accuracy, compare, difference, judge

OURS = {"snr": ("snr-adamw", "cap", "ours"), "normscale": ("ours",), "gradreg": ("snr-adam", "spectral", "cap")}
"""By table."""


def ours_of(row: str) -> tuple[str, ...]:
    """Those that the row has a recipe of. Runs that would be the same in two rows are of one of them."""
    table = row.partition("/")[0]
    stated = {recipe.method.name for recipe in recipes_of(table).get(row, ())}
    return tuple(method for method in OURS[table] if method in stated)


def against_papers(table: str, rows: Rows) -> list[Verdict]:
    """For each row that was run and each of ours in it: whether its accuracy is above that of every method of the
    paper."""
    text = "ours has a better accuracy than every method of the paper"
    test = "test accuracy after the last epoch, ours less each other method's"
    better = partial(difference, value=accuracy)
    return [
        judge(
            f"{row} {method}",
            text,
            test,
            [compare(rows, row, f"{method} over {other}", better, method, other) for other in published.methods(row)],
        )
        for row in rows
        for method in ours_of(row)
        if rows[row].of(method)
    ]
