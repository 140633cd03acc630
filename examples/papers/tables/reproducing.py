"""A table's runs: all that are missing made, row by row, until a budget ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ..data import Images
from ..recipe import FULL, Recipe
from ..runs.machine import Machine
from ..runs.running import Run, images_of
from ..runs.timing import OutOfTime, in_time, time_methods
from .kept import Kept
from .planning import Plan

TIMED_STEPS = 60
"""Ratios of equal work, on a CPU whose steps vary by 10 %, were then up to 2 % apart for VGG, and 6 % for LeNet."""
TOO_LATE = "the budget ended before"


def train(
    recipe: Recipe, seeds: Sequence[int], folder: Path, machine: Machine, deadline: float
) -> list[dict[str, Any]] | None:
    """The results of runs, gone on with or made; None where the deadline came first. At full scale with the bar,
    TensorBoard files and figures of a single run, which take longer than a small run itself."""
    return Run(recipe, seeds, folder, machine).finish(show=recipe.scale == FULL.name, deadline=deadline)


def times_of(recipes: Sequence[Recipe], images: Images, machine: Machine, deadline: float) -> dict[str, float]:
    return time_methods(recipes, images, machine.settings, steps=TIMED_STEPS, deadline=deadline)


@dataclass(frozen=True)
class Tools:
    """What does the work."""

    train: Callable[[Recipe, Sequence[int], Path, Machine, float], list[dict[str, Any]] | None] = train
    images: Callable[[Recipe, Machine], Any] = images_of
    times: Callable[[Sequence[Recipe], Any, Machine, float], dict[str, float]] = times_of


TOOLS = Tools()


@dataclass
class Outcome:
    stopped: bool = False
    """The budget ended before all was run."""
    reasons: dict[str, str] = field(default_factory=dict)
    """By row, why not all of it was run."""


@dataclass(frozen=True)
class Reproduction:
    """Runs of a plan, kept in a folder.

    Args:
        deadline: of ``time.monotonic()``.
        tell: what has been done, line by line.
    """

    kept: Kept
    seeds: int
    deadline: float = math.inf
    tools: Tools = TOOLS
    tell: Callable[[str], None] = print

    def run(self, plan: Plan) -> Outcome:
        """Every missing run: row by row, seed by seed over all methods of a row, so that a stop leaves rows that
        compare. Then times of the row. What keeps a row from being finished is told and keeps no other row."""
        outcome = Outcome()
        for row, recipes in plan.items():
            why = TOO_LATE
            try:
                if self.kept.is_finished(recipes, self.seeds):
                    continue
                if not outcome.stopped:
                    why = self._finish(recipes)
            except OutOfTime:
                outcome.stopped = True
            except (ValueError, OSError) as error:
                why = str(error)
            if why:
                outcome.reasons[row] = why
                self.tell(f"{row}: {why}")
        return outcome

    def _finish(self, recipes: Sequence[Recipe]) -> str:
        """Why not all of the row was run and timed, or nothing.

        Raises:
            OutOfTime: the deadline came first.
            ValueError: data that cannot be had.
            OSError: a folder that cannot be written, or a full disk.
        """
        images = self.tools.images(recipes[0], self.kept.machine)
        lost = self._train(recipes)
        left = [recipe for recipe in recipes if recipe.method.name not in lost]
        if left and self.kept.is_to_be_timed(left):
            try:
                self._time(left, images)
            except torch.OutOfMemoryError as error:
                lost["times"] = too_little_memory(error)
        return "; ".join(f"{what}: {why}" for what, why in lost.items())

    def _train(self, recipes: Sequence[Recipe]) -> dict[str, str]:
        """Methods that the device has no memory for, and what it said; they are not tried again from other seeds.

        Raises:
            OutOfTime: the deadline came first.
        """
        lost: dict[str, str] = {}
        for seeds, recipe in product(self.kept.machine.at_once(self.seeds), recipes):
            missing = self.kept.missing(recipe, seeds)
            if recipe.method.name in lost or not missing:
                continue
            in_time(self.deadline)
            try:
                found = self.tools.train(recipe, missing, self.kept.folder, self.kept.machine, self.deadline)
            except torch.OutOfMemoryError as error:
                lost[recipe.method.name] = too_little_memory(error)
                continue
            if found is None:
                raise OutOfTime
            for seed, result in zip(missing, found, strict=True):
                last = result["epochs"][-1]
                accuracies = f"test {last['test_accuracy']:.4f}, train {last['train_accuracy']:.4f}"
                self.tell(f"{recipe.name} seed {seed}: {accuracies}")
        return lost

    def _time(self, recipes: Sequence[Recipe], images: Any) -> None:
        """Of all methods, side by side.

        Raises:
            OutOfTime: the deadline came first.
        """
        in_time(self.deadline)
        self.tell(f"{recipes[0].row}: times of {len(recipes)} methods")
        found = self.tools.times(recipes, images, self.kept.machine, self.deadline)
        self.kept.keep_times(recipes[0].row, {recipe.method.name: found[recipe.name] for recipe in recipes})


def too_little_memory(error: torch.OutOfMemoryError) -> str:
    return f"the device has too little memory ({str(error).splitlines()[0]})"
