"""A table's runs: which there are, all that are missing made, row by row, until a budget ends."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch

from . import checkpoint
from .data import Images
from .planning import Plan
from .recipe import FULL, Recipe
from .recipes import rows as recipes_of
from .results import Row, compact, how_of, in_words, row_of
from .running import RESULT, Run, device_of, images_of
from .timing import OutOfTime, in_time, time_methods
from .training import Settings

TIMED_STEPS = 30
TOO_LATE = "the budget ended before"


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

    def identity(self, recipe: Recipe, seed: int) -> dict[str, Any]:
        """What the checkpoint of a run on this machine holds."""
        settings = Settings(device_of(self.device), self.bf16)
        return {"recipe": recipe.as_dict(), "seed": seed, "settings": asdict(settings)}


def train(recipe: Recipe, seed: int, folder: Path, machine: Machine, deadline: float) -> dict[str, Any] | None:
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


def times_of(recipes: Sequence[Recipe], images: Images, machine: Machine, deadline: float) -> dict[str, float]:
    device = device_of(machine.device)
    return time_methods(recipes, images, device, steps=TIMED_STEPS, bf16=machine.bf16, deadline=deadline)


@dataclass(frozen=True)
class Tools:
    """What does the work."""

    train: Callable[[Recipe, int, Path, Machine, float], dict[str, Any] | None] = train
    images: Callable[[Recipe, Machine], Any] = images_for
    times: Callable[[Sequence[Recipe], Any, Machine, float], dict[str, float]] = times_of


TOOLS = Tools()


def check(plan: Plan, seeds: int, folder: Path, machine: Machine) -> None:
    """That what the folder holds of the plan's runs can be gone on with, before any time is spent.

    Raises:
        ValueError: results, checkpoints or times that are damaged or of other settings, all of them.
    """
    lost = []
    for recipe, seed in product(chain.from_iterable(plan.values()), range(seeds)):
        try:
            if result_of(recipe, seed, folder, machine) is None:
                checkpoint.load(folder_of(recipe, seed, folder), machine.identity(recipe, seed))
        except (ValueError, OSError) as error:
            lost.append(str(error))
    for row in plan:
        try:
            times_in(folder, row, machine)
        except (ValueError, OSError) as error:
            lost.append(str(error))
    if lost:
        raise ValueError("\n".join(lost))


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
    Then times of the row. What keeps a row from being finished is told and keeps no other row.

    Args:
        deadline: of ``time.monotonic()``.
    """
    outcome = Outcome()
    ends = math.inf if deadline is None else deadline
    for row, recipes in plan.items():
        why = TOO_LATE
        try:
            if is_finished(recipes, seeds, folder, machine):
                continue
            if not outcome.stopped:
                why = finish_row(recipes, seeds, folder, machine, ends, tools, tell)
        except OutOfTime:
            outcome.stopped = True
        except (ValueError, OSError) as error:
            why = str(error)
        if why:
            outcome.reasons[row] = why
            tell(f"{row}: {why}")
    return outcome


def is_finished(recipes: Sequence[Recipe], seeds: int, folder: Path, machine: Machine) -> bool:
    """All is run, and timed where it is to be."""
    runs = all(result_of(recipe, seed, folder, machine) is not None for seed in range(seeds) for recipe in recipes)
    return runs and not is_to_be_timed(recipes, folder, machine)


def finish_row(
    recipes: Sequence[Recipe],
    seeds: int,
    folder: Path,
    machine: Machine,
    deadline: float,
    tools: Tools,
    tell: Callable[[str], None],
) -> str:
    """Why not all of the row was run and timed, or nothing.

    Raises:
        OutOfTime: the deadline came first.
        ValueError: data that cannot be had.
        OSError: a folder that cannot be written, or a full disk.
    """
    images = tools.images(recipes[0], machine)
    lost = run_row(recipes, seeds, folder, machine, deadline, tools, tell)
    left = [recipe for recipe in recipes if recipe.method.name not in lost]
    if left and is_to_be_timed(left, folder, machine):
        try:
            time_row(left, images, folder, machine, deadline, tools, tell)
        except torch.OutOfMemoryError as error:
            lost["times"] = too_little_memory(error)
    return "; ".join(f"{what}: {why}" for what, why in lost.items())


def run_row(
    recipes: Sequence[Recipe],
    seeds: int,
    folder: Path,
    machine: Machine,
    deadline: float,
    tools: Tools,
    tell: Callable[[str], None],
) -> dict[str, str]:
    """Methods that the device has no memory for, and what it said; they are not tried again from other seeds.

    Raises:
        OutOfTime: the deadline came first.
    """
    lost: dict[str, str] = {}
    for seed, recipe in product(range(seeds), recipes):
        if recipe.method.name in lost or result_of(recipe, seed, folder, machine) is not None:
            continue
        in_time(deadline)
        try:
            found = tools.train(recipe, seed, folder, machine, deadline)
        except torch.OutOfMemoryError as error:
            lost[recipe.method.name] = too_little_memory(error)
            continue
        if found is None:
            raise OutOfTime
        last = found["epochs"][-1]
        tell(f"{recipe.name} seed {seed}: test {last['test_accuracy']:.4f}, train {last['train_accuracy']:.4f}")
    return lost


def too_little_memory(error: torch.OutOfMemoryError) -> str:
    return f"the device has too little memory ({str(error).splitlines()[0]})"


def result_of(recipe: Recipe, seed: int, folder: Path, machine: Machine) -> dict[str, Any] | None:
    """Of a finished run.

    Raises:
        ValueError: it is damaged, of another recipe, or computed on another type of device or in another precision.
    """
    path = folder_of(recipe, seed, folder) / RESULT
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        there, how = dict(found["recipe"]), how_of(found["settings"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}): remove it to finish that run anew") from None
    wanted = json.loads(json.dumps(recipe.as_dict()))
    differing = [name for name, value in wanted.items() if there.get(name) != value]
    if differing:
        raise ValueError(f"{path} is of another recipe, with other {', '.join(differing)}: move it away, or take --out")
    if how != machine.how:
        words = f"{in_words(how)} instead of {in_words(machine.how)}"
        raise ValueError(f"{path} was computed otherwise, {words}: move it away, or take --out")
    return found


def folder_of(recipe: Recipe, seed: int, folder: Path) -> Path:
    return folder / recipe.name / f"seed-{seed}"


def time_row(
    recipes: Sequence[Recipe],
    images: Any,
    folder: Path,
    machine: Machine,
    deadline: float,
    tools: Tools,
    tell: Callable[[str], None],
) -> None:
    """Of all methods, side by side.

    Raises:
        OutOfTime: the deadline came first.
    """
    in_time(deadline)
    tell(f"{recipes[0].row}: times of {len(recipes)} methods")
    found = tools.times(recipes, images, machine, deadline)
    times = {recipe.method.name: found[recipe.name] for recipe in recipes}
    checkpoint.write_text(times_path(folder, recipes[0].row, machine), json.dumps(times))


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
    try:
        found: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error!r}): remove it to take times anew") from None
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
