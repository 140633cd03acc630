"""What this library's own methods add to the papers' rows."""

from __future__ import annotations

from functools import partial

from ... import published
from .testing import Rows, Verdict, accuracy, compare, difference, judge

OURS = {"snr": ("snr-adamw", "cap"), "normscale": ("ours",), "gradreg": ("snr-adam", "spectral", "cap")}
"""By table."""


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
        for method in OURS[table]
        if rows[row].of(method)
    ]
