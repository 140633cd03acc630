"""Tables as text: a head, a rule and rows, in columns that are as wide as their widest cell."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def in_columns(rows: Sequence[Sequence[str]], left: Collection[int] | None = None) -> str:
    """
    Args:
        rows: the head first.
        left: columns that begin on one line, the others end on one; None for all.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(_padded(row, widths, range(len(widths)) if left is None else left)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _padded(row: Sequence[str], widths: Sequence[int], left: Collection[int]) -> list[str]:
    cells = enumerate(zip(row, widths, strict=True))
    return [cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in cells]
