"""Which recipes of a table a call asks for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from ..recipe import Recipe, Scale
from ..recipes import rows as recipes_of

Plan = Mapping[str, tuple[Recipe, ...]]
"""Recipes by row, in the order to run them."""


def planned(
    table: str,
    *,
    rows: Sequence[str] = ("*",),
    methods: Sequence[str] = (),
    scale: Scale,
    epochs: int | None = None,
) -> Plan:
    """The recipes of a table that are asked for, scaled.

    Args:
        rows: patterns, with or without the table's name before them.
        methods: patterns; without any, all but those with the defects of published code.
        epochs: in place of the scale's; the paper's threshold of the gap does not carry over to other than its own.

    Raises:
        ValueError: a pattern that nothing matches, with the near names.
    """
    found = recipes_of(table)
    chosen_rows = chosen("rows", [f"{table}/{pattern.removeprefix(f'{table}/')}" for pattern in rows], list(found))
    known = list(dict.fromkeys(recipe.method.name for recipes in found.values() for recipe in recipes))
    stated = [method for method in known if not method.endswith("-published")]
    chosen_methods = chosen("methods", methods, known) if methods else stated
    return {
        row: tuple(
            recipe.scaled(scale).lasting(epochs) for recipe in found[row] if recipe.method.name in chosen_methods
        )
        for row in chosen_rows
    }


def chosen(what: str, patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """The names that match a pattern, in their order."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names
            raise ValueError(f"{what} must match one of the table's, got {pattern!r}; near: {', '.join(near)}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
