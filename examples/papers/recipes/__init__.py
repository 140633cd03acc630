"""Every recipe by its name, ``table/row/method``, such as ``snr/vgg-cifar10-b64/snr``.

Beside those of the tables a row has the candidates of examples/search.py (:func:`papers.candidates.runnable`), such as
``normscale/mlp-5x2000/cap-8-gain-2``: :func:`find` knows them, and neither :func:`names` nor :func:`rows` lists them.
"""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase

from ..candidates import runnable
from ..recipe import Recipe
from . import first, gradreg, normscale, snr

__all__ = ["TABLES", "find", "names", "rows"]

TABLES = ("snr", "normscale", "gradreg")
"""The papers'."""

_ALL: dict[str, Recipe] = {
    recipe.name: recipe for made in (snr, normscale, gradreg, first) for recipe in made.recipes()
}


def _by_row() -> dict[str, tuple[Recipe, ...]]:
    found: dict[str, tuple[Recipe, ...]] = {}
    for recipe in _ALL.values():
        found[recipe.row] = (*found.get(recipe.row, ()), recipe)
    return found


_CANDIDATES: dict[str, Recipe] = {one.name: one for row in _by_row().values() for one in runnable(row)}


def find(name: str) -> Recipe:
    """The recipe of that name, of a table or of a candidate.

    Raises:
        ValueError: there is none; the near ones are told.
    """
    known = _CANDIDATES | _ALL
    if name in known:
        return known[name]
    near = difflib.get_close_matches(str(name).removeprefix("search/"), known, n=5, cutoff=0.5)
    told = f"; near: {', '.join(near)}" if near else ""
    raise ValueError(f"recipe must be the name of one, such as digits/mlp/snr, got {name!r}{told}")


def names(pattern: str = "*") -> tuple[str, ...]:
    """Of recipes that match, in the order of the tables: ``names("snr/vgg-*/snr")``."""
    return tuple(name for name in _ALL if fnmatchcase(name, pattern))


def rows(table: str) -> dict[str, tuple[Recipe, ...]]:
    """The recipes of a table by row, in the order to run them.

    Raises:
        ValueError: another table.
    """
    if table not in TABLES:
        raise ValueError(f"table must be one of {', '.join(TABLES)}, got {table!r}")
    return {row: recipes for row, recipes in _by_row().items() if row.startswith(f"{table}/")}
