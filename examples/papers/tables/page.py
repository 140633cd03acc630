"""docs/results.md, whose tables, claims and figures come from recorded results.

A block of the page is ``<!-- table: snr -->``, ``<!-- claims: snr -->``, ``<!-- standing: all -->`` or
``<!-- search: FILE -->``, and all that follows up to ``<!-- end -->``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..recipes import TABLES
from .claims.section import claims_section
from .grid_figures import draw_grid
from .grids import Grid
from .records import read_all
from .results import Row
from .row_figures import draw_row
from .standing import standing_section
from .table import table_section

BLOCK = re.compile(r"<!-- (?P<kind>table|claims|standing|search): (?P<name>[\w-]+) -->\n.*?<!-- end -->", re.DOTALL)
FIGURES = "results"
"""Folder of figures beside the page."""
SEARCHES = "search"
"""Folder of what examples/search.py has written, in that of the results."""


def rendered(page: str, recorded: Path, docs: Path) -> str:
    """The page with every block as the recorded results have it, and its figures drawn anew.

    Args:
        recorded: folder of JSON files.
        docs: folder of the page.

    Raises:
        ValueError: a block of a table that is not known, or a file that does not hold results.
    """
    rows = read_all(recorded)

    def figures(row: Row) -> list[tuple[str, str]]:
        return addressed(draw_row(row, docs / FIGURES), docs)

    def grid_figures(grid: Grid, there: Sequence[Row]) -> list[tuple[str, str]]:
        return addressed(draw_grid(grid, there, docs / FIGURES), docs)

    sections: dict[str, Callable[[str], str]] = {
        "table": lambda table: table_section(table, rows, figures=figures, grid_figures=grid_figures),
        "claims": lambda table: claims_section(table, rows),
        "standing": lambda _: standing_section(TABLES, rows),
        "search": lambda name: search_section(recorded / SEARCHES / f"{name}.json"),
    }
    known = {"table": TABLES, "claims": TABLES, "standing": ("all",)}

    def block(found: re.Match[str]) -> str:
        kind, name = found["kind"], found["name"]
        if kind in known and name not in known[kind]:
            raise ValueError(f"a {kind} block must be of {' or '.join(known[kind])}, got {name!r}")
        return f"<!-- {kind}: {name} -->\n{sections[kind](name)}\n<!-- end -->"

    return BLOCK.sub(block, page)


def addressed(drawn: Sequence[tuple[str, Path]], folder: Path) -> list[tuple[str, str]]:
    """What each figure shows, and its address on a page in ``folder``."""
    return [(what, path.relative_to(folder).as_posix()) for what, path in drawn]


def search_section(path: Path) -> str:
    """What examples/search.py has written, best first.

    Raises:
        ValueError: a file of something else.
    """
    if not path.exists():
        return "Not run."
    try:
        return _search_table(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} must hold what examples/search.py writes, and does not: {error!r}") from None


def _search_table(found: Mapping[str, Any]) -> str:
    rows = sorted(found["rows"], key=lambda row: -float(row["validation_accuracy"]))
    lines = [f"| {row['method']} | {row['validation_accuracy']:.4f} | {row['time_over_none']:.2f} |" for row in rows]
    precision = "bfloat16 autocast" if found["bf16"] else "float32"
    about = (
        f"`{found['recipe']}`, {found['scale']} scale, {found['epochs']} epochs, {len(rows[0]['seeds'])} seed(s); "
        f"{found['held_out']:.0%} of the training images held out; {found['machine']}, {precision}, commit "
        f"{found['commit']}. Best: `{found['best']}`; within {found['most_time']:g} of the time: "
        f"{'`' + found['best_within_time'] + '`' if found['best_within_time'] else 'none'}."
    )
    head = "| method | validation accuracy | step / first method's |\n| --- | ---: | ---: |"
    return "\n".join([head, *lines, "", about])
