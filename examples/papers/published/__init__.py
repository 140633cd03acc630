"""What the papers report, as data: a file for each paper, by row (``snr/vgg-cifar10-b64``) and method."""

from __future__ import annotations

from . import gradreg, normscale, snr
from .cell import Cell
from .gradreg import LAMBDAS, REPLICATED
from .snr import THRESHOLDS

__all__ = ["CELLS", "LAMBDAS", "METHODS", "REPLICATED", "SOURCES", "THRESHOLDS", "Cell", "cell", "methods"]

_PAPERS = {"snr": snr, "normscale": normscale, "gradreg": gradreg}

SOURCES: dict[str, str] = {table: paper.SOURCE for table, paper in _PAPERS.items()}
"""By table."""
METHODS: dict[str, tuple[str, ...]] = {table: paper.METHODS for table, paper in _PAPERS.items()}
"""By table, those that the paper compares; all others are this library's."""
CELLS: dict[str, dict[str, Cell]] = {**snr.CELLS, **normscale.CELLS, **gradreg.CELLS}
"""By row and method."""


def cell(row: str, method: str) -> Cell | None:
    """What the paper has of a method; a run of Norm Scaling's published code is compared with the same figures. None
    for rows and methods that are not the paper's."""
    return CELLS.get(row, {}).get(method.removesuffix("-published"))


def methods(row: str) -> tuple[str, ...]:
    """Those of the row that are the paper's; not all papers have the same in all rows."""
    return gradreg.METHODS_OF_ROWS.get(row) or METHODS[row.partition("/")[0]]
