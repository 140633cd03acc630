"""A table's runs: which there are, all that are missing made, row by row, until a budget ends."""

from __future__ import annotations

import difflib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from .checkpoint import write_text
from .data import Images
from .recipe import FULL, Recipe, Scale
from .recipes import rows as recipes_of
from .results import Row, compact, how_of, in_words, row_of
from .running import RESULT, Run, device_of, images_of
from .timing import time_methods

TIMED_STEPS = 30
TOO_LATE = "the budget ended before"

Plan = Mapping[str, tuple[Recipe, ...]]
"""Recipes by row, in the order to run them."""


@dataclass(frozen=True)
class Machine:
    """Where data are, and how runs are computed.

    Raises:
        ValueError: a device that is not there.
    """

    data_dir: Path | None = None
    download: bool = False
    device: str = "auto"
    bf16: bool = False

    def __post_init__(self) -> None:
        device_of(self.device)

    @property
    def how(self) -> dict[str, str]:
        """Device and precision, as a row's protocol has them."""
        return how_of({"device": device_of(self.device), "bf16": self.bf16})


def train(recipe: Recipe, seed: int, folder: Path, machine: Machine, deadline: float | None) -> dict[str, Any] | None:
    """The result of a run, gone on with or made; None where the deadline came first. At full scale with the bar,
    TensorBoard files and figures of a single run, which take longer than a small run itself."""
    run = Run(
        recipe,
        seed,
        folder,
        data_dir=machine.data_dir,
        download=machine.download,
        device=machine.device,
        bf16=machine.bf16,
    )
    return run.finish(show=recipe.scale == FULL.name, deadline=deadline)


def images_for(recipe: Recipe, machine: Machine) -> Images:
    return images_of(recipe.data, machine.data_dir, machine.download)


def times_of(recipes: Sequence[Recipe], images: Images, machine: Machine) -> dict[str, float]:
    device = device_of(machine.device)
    return time_methods(recipes, images, device, steps=TIMED_STEPS, bf16=machine.bf16)


@dataclass(frozen=True)
class Tools:
    """What does the work."""

    train: Callable[[Recipe, int, Path, Machine, float | None], dict[str, Any] | None] = train
    images: Callable[[Recipe, Machine], Any] = images_for
    times: Callable[[Sequence[Recipe], Any, Machine], dict[str, float]] = times_of


TOOLS = Tools()


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
            lasting(recipe.scaled(scale), epochs) for recipe in found[row] if recipe.method.name in chosen_methods
        )
        for row in chosen_rows
    }


def lasting(recipe: Recipe, epochs: int | None) -> Recipe:
    """For so many epochs, where they are asked for."""
    if epochs in (None, recipe.epochs):
        return recipe
    return replace(recipe, epochs=epochs, threshold=None)


def chosen(what: str, patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """The names that match a pattern, in their order."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names
            raise ValueError(f"{what} must match one of the table's, got {pattern!r}; near: {', '.join(near)}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


@dataclass
class Outcome:
    stopped: bool = False
    """The budget ended before all was run."""
    reasons: dict[str, str] = field(default_factory=dict)
    """By row, why not all of it was run."""


def run_all(
    plan: Plan,
    seeds: int,
    folder: Path,
    machine: Machine,
    *,
    deadline: float | None = None,
    tools: Tools = TOOLS,
    tell: Callable[[str], None] = print,
) -> Outcome:
    """Every missing run: row by row, seed by seed over all methods of a row, so that a stop leaves rows that compare.
    Then times of the rows that are finished. A row whose data cannot be had, or that the device has no memory for, is
    passed over.

    Args:
        deadline: of ``time.monotonic()``.

    Raises:
        ValueError: a folder that holds runs of other settings.
        OSError: a folder that cannot be written, or a full disk.
    """
    outcome = Outcome()
    for row, recipes in plan.items():
        if is_finished(recipes, seeds, folder, machine):
            continue
        if outcome.stopped:
            outcome.reasons[row] = TOO_LATE
            continue
        try:
            images = tools.images(recipes[0], machine)
        except (ValueError, OSError) as error:
            outcome.reasons[row] = str(error)
            tell(f"{row}: not run: {error}")
            continue
        try:
            outcome.stopped = not run_row(recipes, seeds, folder, machine, deadline, tools, tell)
            if not outcome.stopped and is_to_be_timed(recipes, folder, machine):
                outcome.stopped = is_past(deadline)
                if not outcome.stopped:
                    time_row(recipes, images, folder, machine, tools, tell)
        except torch.OutOfMemoryError as error:
            outcome.reasons[row] = f"the device has too little memory ({str(error).splitlines()[0]})"
            tell(f"{row}: {outcome.reasons[row]}")
        if outcome.stopped:
            outcome.reasons[row] = TOO_LATE
    return outcome


def is_past(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline


def is_finished(recipes: Sequence[Recipe], seeds: int, folder: Path, machine: Machine) -> bool:
    """All is run, and timed where it is to be."""
    runs = all(result_of(recipe, seed, folder, machine) is not None for seed in range(seeds) for recipe in recipes)
    return runs and not is_to_be_timed(recipes, folder, machine)


def run_row(
    recipes: Sequence[Recipe],
    seeds: int,
    folder: Path,
    machine: Machine,
    deadline: float | None,
    tools: Tools,
    tell: Callable[[str], None],
) -> bool:
    """Whether all runs came to their end."""
    for seed in range(seeds):
        for recipe in recipes:
            if result_of(recipe, seed, folder, machine) is not None:
                continue
            if is_past(deadline):
                return False
            found = tools.train(recipe, seed, folder, machine, deadline)
            if found is None:
                return False
            last = found["epochs"][-1]
            tell(f"{recipe.name} seed {seed}: test {last['test_accuracy']:.4f}, train {last['train_accuracy']:.4f}")
    return True


def result_of(recipe: Recipe, seed: int, folder: Path, machine: Machine) -> dict[str, Any] | None:
    """Of a finished run.

    Raises:
        ValueError: it is of another recipe, or computed on another type of device or in another precision.
    """
    path = folder / recipe.name / f"seed-{seed}" / RESULT
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(recipe.as_dict()))
    differing = [name for name, value in wanted.items() if found["recipe"].get(name) != value]
    if differing:
        raise ValueError(f"{path} is of another recipe, with other {', '.join(differing)}: move it away, or take --out")
    if (how := how_of(found["settings"])) != machine.how:
        words = f"{in_words(how)} instead of {in_words(machine.how)}"
        raise ValueError(f"{path} was computed otherwise, {words}: move it away, or take --out")
    return found


def time_row(
    recipes: Sequence[Recipe],
    images: Any,
    folder: Path,
    machine: Machine,
    tools: Tools,
    tell: Callable[[str], None],
) -> None:
    """Of all methods, side by side."""
    tell(f"{recipes[0].row}: times of {len(recipes)} methods")
    found = tools.times(recipes, images, machine)
    times = {recipe.method.name: found[recipe.name] for recipe in recipes}
    write_text(times_path(folder, recipes[0].row, machine), json.dumps(times))


def is_to_be_timed(recipes: Sequence[Recipe], folder: Path, machine: Machine) -> bool:
    """Not without the row's first method, over which times are told, and not again."""
    row = recipes[0].row
    first = recipes_of(row.partition("/")[0])[row][0]
    known = times_in(folder, row, machine)
    return recipes[0].name == first.name and not all(recipe.method.name in known for recipe in recipes)


def times_path(folder: Path, row: str, machine: Machine) -> Path:
    return folder / row / f"times-{'-'.join(machine.how.values())}.json"


def times_in(folder: Path, row: str, machine: Machine) -> dict[str, float]:
    path = times_path(folder, row, machine)
    found: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def collected(plan: Plan, seeds: int, folder: Path, machine: Machine) -> list[Row]:
    """What the folder holds of the plan's runs, those of earlier calls too; rows of which there is any."""
    rows = []
    for row, recipes in plan.items():
        found = [result_of(recipe, seed, folder, machine) for seed in range(seeds) for recipe in recipes]
        runs = [compact(result) for result in found if result is not None]
        if runs:
            rows.append(row_of(recipes, runs, times_in(folder, row, machine)))
    return rows
