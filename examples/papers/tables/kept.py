"""What there is of a table's runs, in their folder or recorded: results, and times of a row's methods side by side."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

from ..recipe import Recipe, completed
from ..recipes import rows as recipes_of
from ..runs import checkpoint, folders
from ..runs.machine import Machine
from . import records
from .planning import Plan
from .results import Row, compact, how_of, in_words, own_of, row_of


@dataclass(frozen=True)
class Kept:
    """Of runs on one machine.

    Args:
        record: the folder of results that are recorded already, whose runs are not made again.
    """

    folder: Path
    machine: Machine
    record: Path | None = None

    @property
    def how(self) -> dict[str, str]:
        """Device and precision, as a row's protocol has them."""
        settings = self.machine.settings
        return how_of({"device": settings.device, "bf16": settings.bf16})

    def result(self, recipe: Recipe, seed: int) -> dict[str, Any] | None:
        """Of a finished run.

        Raises:
            ValueError: it is damaged, of another recipe, or computed on another type of device or in another precision.
        """
        run = folders.folder_of(recipe, [seed], self.folder)
        found = checkpoint.read_result(run)
        if found is None:
            return None
        path = run / folders.RESULT
        try:
            there, how = completed(found["recipe"]), how_of(found["settings"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} cannot be read ({error!r}): remove it to finish that run anew") from None
        wanted = json.loads(json.dumps(recipe.as_dict()))
        differing = [name for name, value in wanted.items() if there.get(name) != value]
        if differing:
            differing_words = ", ".join(differing)
            raise ValueError(f"{path} is of another recipe, with other {differing_words}: move it away, or take --out")
        if how != self.how:
            words = f"{in_words(how)} instead of {in_words(self.how)}"
            raise ValueError(f"{path} was computed otherwise, {words}: move it away, or take --out")
        return found

    def recorded(self, recipes: Sequence[Recipe]) -> Row:
        """What is recorded of the recipes' row; no runs where nothing is.

        Raises:
            ValueError: it is of another protocol, or of other settings of a method.
        """
        row = row_of(recipes, how=self.how)
        if self.record is None:
            return row
        methods = {recipe.method.name: own_of(recipe.as_dict()) for recipe in recipes}
        return records.recorded(self.record, row, methods) or row

    def missing(self, recipe: Recipe, seeds: Iterable[int]) -> list[int]:
        """Those seeds of which there is no result.

        Raises:
            ValueError: as :meth:`result` and :meth:`recorded`.
        """
        known = self.recorded([recipe]).of(recipe.method.name)
        return [seed for seed in seeds if self.result(recipe, seed) is None and seed not in known]

    def times_path(self, row: str) -> Path:
        layout = ["channels-last"] if self.machine.settings.channels_last else []
        return self.folder / row / f"times-{'-'.join([*self.how.values(), *layout])}.json"

    def times(self, row: str) -> dict[str, float]:
        """A training step's time over that of the row's first method, by method; of those that were timed.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.times_path(row)
        try:
            found: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError as error:
            raise ValueError(f"{path} cannot be read ({error!r}): remove it to take times anew") from None
        return found

    def keep_times(self, row: str, times: dict[str, float]) -> None:
        checkpoint.write_text(self.times_path(row), json.dumps(times))

    def is_to_be_timed(self, recipes: Sequence[Recipe]) -> bool:
        """Not without the row's first method, over which times are told, and not again."""
        row = recipes[0].row
        first = recipes_of(row.partition("/")[0])[row][0]
        known = {**self.recorded(recipes).times, **self.times(row)}
        return recipes[0].name == first.name and not all(recipe.method.name in known for recipe in recipes)

    def is_finished(self, recipes: Sequence[Recipe], seeds: int) -> bool:
        """Whether all is run, and timed where it is to be."""
        runs = not any(self.missing(recipe, range(seeds)) for recipe in recipes)
        return runs and not self.is_to_be_timed(recipes)

    def check(self, plan: Plan, seeds: int) -> None:
        """That what is there of the plan's runs can be gone on with, before any time is spent.

        Raises:
            ValueError: results, checkpoints or times that are damaged or of other settings, all of them.
        """
        lost = []
        for recipe in chain.from_iterable(plan.values()):
            try:
                missing = set(self.missing(recipe, range(seeds)))
                for some in folders.begun(recipe, self.folder):
                    if missing & set(some):
                        identity = checkpoint.identity_of(recipe, some, self.machine.settings)
                        checkpoint.load(folders.folder_of(recipe, some, self.folder), identity)
            except (ValueError, OSError) as error:
                lost.append(str(error))
        for row in plan:
            try:
                self.times(row)
            except (ValueError, OSError) as error:
                lost.append(str(error))
        if lost:
            raise ValueError("\n".join(dict.fromkeys(lost)))

    def rows(self, plan: Plan, seeds: int) -> list[Row]:
        """What there is of the plan's runs, those of earlier calls too; rows of which there is any."""
        rows = []
        for row, recipes in plan.items():
            recorded = self.recorded(recipes)
            runs = []
            for seed, recipe in product(range(seeds), recipes):
                found = self.result(recipe, seed)
                run = recorded.of(recipe.method.name).get(seed) if found is None else compact(found)
                if run is not None:
                    runs.append(run)
            if runs:
                rows.append(row_of(recipes, runs, {**recorded.times, **self.times(row)}))
        return rows
