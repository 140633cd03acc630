"""docs/results.md, whose tables, claims and figures come from recorded results.

A block of the page is ``<!-- table: snr -->`` or ``<!-- claims: snr -->``, and all that follows up to ``<!-- end -->``.
"""

from __future__ import annotations

import re
from pathlib import Path

from .recipes import TABLES
from .results import Row, read_all
from .row_figures import draw_row
from .table import claims_section, table_section

BLOCK = re.compile(r"<!-- (?P<kind>table|claims): (?P<table>[\w-]+) -->\n.*?<!-- end -->", re.DOTALL)
FIGURES = "results"
"""Folder of figures beside the page."""


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
        return [(what, path.relative_to(docs).as_posix()) for what, path in draw_row(row, docs / FIGURES)]

    def block(found: re.Match[str]) -> str:
        table = found["table"]
        if table not in TABLES:
            raise ValueError(f"a block's table must be one of {', '.join(TABLES)}, got {table!r}")
        is_table = found["kind"] == "table"
        text = table_section(table, rows, figures=figures) if is_table else claims_section(table, rows)
        return f"<!-- {found['kind']}: {table} -->\n{text}\n<!-- end -->"

    return BLOCK.sub(block, page)
