"""What a training step costs under each method, side by side."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..data import Images
from ..objective import Batch
from ..recipe import Recipe
from .machine import Settings, deterministic
from .training import Training

COLD = 22
"""Steps before any is timed, of those in which a tracker looks at weights: what it does more of at the start,
compilation, and allocation."""
LEAST_BLOCKS = 3
"""Of which a median is worth its name."""


class OutOfTime(Exception):
    """A deadline came before the end."""


def in_time(deadline: float) -> None:
    """
    Raises:
        OutOfTime: the deadline, of ``time.monotonic()``, is past.
    """
    if time.monotonic() >= deadline:
        raise OutOfTime


def time_methods(
    recipes: Sequence[Recipe],
    images: Images,
    settings: Settings = Settings(),
    *,
    steps: int = 30,
    deadline: float = math.inf,
) -> dict[str, float]:
    """A training step's time over that of the first recipe beside it, by name.

    Every recipe trains its own network, and before any of its steps is timed as many as its tracker takes to settle.
    The recipes take turns, a step each, for a machine's speed changes from one second to the next. A block is as many
    turns as the least common multiple of their methods' ``every``: of each turn the median over blocks, and of a block
    the mean, so that work done in some steps alone has its share.

    Args:
        settings: how the runs are computed whose steps these stand for.
        steps: of each recipe, at least; at least three blocks are taken.
        deadline: of ``time.monotonic()``, looked at before each step.

    Raises:
        OutOfTime: the deadline came first.
        ValueError: no recipe, or fewer than one step.
    """
    if not recipes or steps < 1:
        raise ValueError(f"recipes and steps must be one at least, got {len(recipes)} and {steps}")
    deterministic()  # as the runs themselves are
    runs = [Training(recipe, images, [0], settings) for recipe in recipes]
    batches = [_without_end(run) for run in runs]
    for recipe, run, some in zip(recipes, runs, batches, strict=True):
        for _ in range(COLD * tracked_period(recipe)):
            _turn([run], [some], deadline)
    block = math.lcm(*map(period, recipes))
    blocks = max(LEAST_BLOCKS, math.ceil(steps / block))
    times = torch.stack([_turn(runs, batches, deadline) for _ in range(blocks * block)]).view(blocks, block, -1)
    ratios = (times / times[:, :, :1]).quantile(0.5, dim=0).mean(0)
    return {recipe.name: ratio for recipe, ratio in zip(recipes, ratios.tolist(), strict=True)}


def period(recipe: Recipe) -> int:
    """Steps after which those of the recipe's method repeat."""
    return int(recipe.method.norm_scale.get("every", 1))


def tracked_period(recipe: Recipe) -> int:
    """Steps from one look of a tracker to the next."""
    return 1 if recipe.method.norm_scale.get("rank") == "full" else period(recipe)


def _turn(runs: Sequence[Training], batches: Sequence[Iterator[Batch]], deadline: float) -> Tensor:
    """Seconds of one step of each."""
    seconds = []
    for run, some in zip(runs, batches, strict=True):
        in_time(deadline)
        seconds.append(run.time_step(next(some)))
    return torch.tensor(seconds, dtype=torch.float64)


def _without_end(run: Training) -> Iterator[Batch]:
    epoch = 0
    while True:
        run.begin(epoch)
        yield from run.batches(epoch)
        epoch += 1
