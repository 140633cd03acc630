"""Every recipe by its name, ``table/row/method``, such as ``snr/vgg-cifar10-b64/snr``."""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase

from ..recipe import Recipe
from . import first, normscale, snr

__all__ = ["TABLES", "find", "names", "rows"]

TABLES = ("snr", "normscale")
"""The papers'."""

_ALL: dict[str, Recipe] = {recipe.name: recipe for made in (snr, normscale, first) for recipe in made.recipes()}


def find(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: there is none; the near ones are told.
    """
    if name in _ALL:
        return _ALL[name]
    near = difflib.get_close_matches(str(name), _ALL, n=5, cutoff=0.5)
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
    found: dict[str, tuple[Recipe, ...]] = {}
    for name in names(f"{table}/*"):
        recipe = _ALL[name]
        found[recipe.row] = (*found.get(recipe.row, ()), recipe)
    return found
