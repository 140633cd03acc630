"""Rows that are read together: one table of accuracies, with the rows down and their methods across."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from .. import published
from ..published.gradreg import SIZES, WIDE, WIDE_SIZES
from .claims.ours import ours_of
from .markdown import NOT_RUN, NOTHING, label, markdown_table, percent, percent_over_seeds
from .results import Row


@dataclass(frozen=True)
class Grid:
    title: str
    head: str
    """Of the first column."""
    rows: Mapping[str, str]
    """What the first column says of each row."""
    sizes: Mapping[str, int] | None = None
    """By row, training images, where accuracy is drawn against them."""
    reference: str = ""
    """Of the figure: the method over which others are shown too."""
    lenders: Mapping[str, str] = field(default_factory=dict)
    """By row, another of the same net, images and seeds, of which ours stand here too."""

    def methods(self, rows: Sequence[Row]) -> list[str]:
        """The paper's of any of the grid's rows, then others that were run."""
        table = next(iter(self.rows)).partition("/")[0]
        known = {method for row in self.rows for method in published.methods(row)}
        papers = [method for method in published.METHODS[table] if method in known]
        return list(dict.fromkeys([*papers, *(method for row in rows for method in row.methods)]))


GRIDS: dict[str, tuple[Grid, ...]] = {
    "gradreg": (
        Grid(
            "C2: three nets, 200 training images of each class",
            "net",
            {f"gradreg/c2-{net.lower()}": net for net in ("Baseline", "Batchnorm", "Dropout")},
        ),
        Grid(
            "C4: the size of the training set",
            "images",
            {f"gradreg/c4-{size}": f"{size:,}" for size in SIZES},
            {f"gradreg/c4-{size}": size for size in SIZES},
            "double-back",
        ),
        Grid(
            "C6: whole Jacobians and a random projection",
            "net",
            {"gradreg/c6": "Dropout"},
            lenders={"gradreg/c6": "gradreg/c2-dropout"},
        ),
        Grid(
            "The same on a wider LeNet, of 20, 50 and 500",
            "experiment",
            {
                **{f"gradreg/{WIDE}c2-{net.lower()}": f"C2, {net}" for net in ("Baseline", "Batchnorm", "Dropout")},
                **{f"gradreg/{WIDE}c4-{size}": f"C4, {size:,} images" for size in WIDE_SIZES},
                f"gradreg/{WIDE}c6": "C6",
            },
            lenders={f"gradreg/{WIDE}c6": f"gradreg/{WIDE}c2-dropout"},
        ),
    )
}
"""By table."""

NOTES_OF_GRIDS = """\
Test accuracy in percent after the last epoch, mean (standard deviation over runs): of the paper, of the published
replication, and here."""


def grid_table(grid: Grid, rows: Sequence[Row]) -> str:
    """Up to three lines a row: paper, replication, and what was found here.

    Args:
        rows: those of the grid that were run, at one size.
    """
    run = {row.name: row for row in rows}
    methods = grid.methods(rows)
    lines = [[grid.head, "", *(label(method, rows[0].table) for method in methods)]]
    for name, said in grid.rows.items():
        of_row = [*published_lines(name, methods), here_line(run.get(name), methods)]
        lines += [["" if i else said, *line] for i, line in enumerate(of_row)]
    return markdown_table(lines, texts=2)


def published_lines(row: str, methods: Sequence[str]) -> list[list[str]]:
    """Of the paper and of the replication, where either has anything of the row."""
    cells = [published.cell(row, method) or published.Cell() for method in methods]
    found = {
        "paper": [percent(cell.accuracy, cell.accuracy_std) for cell in cells],
        "replication": [percent(cell.replication, cell.replication_std) for cell in cells],
    }
    return [[who, *line] for who, line in found.items() if set(line) != {NOTHING}]


def here_line(row: Row | None, methods: Sequence[str]) -> list[str]:
    if row is None:
        return [f"here: {NOT_RUN}", *[NOTHING] * len(methods)]
    counts = sorted({len(row.of(method)) for method in methods if row.of(method)})
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    accuracies = [[run.last("test_accuracy") for run in row.of(method).values()] for method in methods]
    return [f"here, {seeds} {'seed' if seeds == '1' else 'seeds'}", *map(percent_over_seeds, accuracies)]


def lent(grid: Grid, row: Row, run: Sequence[Row]) -> Row:
    """What stands in the table of a row: its own runs, and those of ours from the same seeds of its lender, where that
    was run by the same protocol.

    Args:
        run: all rows of the paper.
    """
    name = grid.lenders.get(row.name)
    lenders = [other for other in run if other.name == name and other.protocol == row.protocol]
    runs = [one for other in lenders for one in other.runs if one.method in ours_of(other.name)]
    return replace(row, runs=(*row.runs, *(one for one in runs if one.seed in row.seeds)))


def lending_note(grid: Grid, rows: Sequence[Row], shown: Sequence[Row]) -> list[str]:
    """From where rows have what they show beyond their own runs."""
    names = [grid.lenders[own.name] for own, row in zip(rows, shown, strict=True) if len(row.runs) > len(own.runs)]
    words = ", ".join(f"`{name}`" for name in names)
    return [f"Ours are the runs of {words}: the net, images and seeds are the same."] if names else []
