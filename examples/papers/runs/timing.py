"""What a training step costs under each method, side by side."""

from __future__ import annotations

import math
import statistics
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
    device: str,
    *,
    steps: int = 30,
    bf16: bool = False,
    deadline: float = math.inf,
) -> dict[str, float]:
    """A training step's time over that of the first recipe in the same block, by name: medians over blocks.

    Every recipe trains its own network, and before any of its steps is timed as many as its tracker takes to settle. A
    block is as many steps of each, recipe after recipe, as the least common multiple of their methods' ``every``, so
    that work done in some steps alone has its share in each.

    Args:
        steps: of each recipe, at least; at least three blocks are taken.
        deadline: of ``time.monotonic()``, looked at before each step.

    Raises:
        OutOfTime: the deadline came first.
        ValueError: no recipe, or fewer than one step.
    """
    if not recipes or steps < 1:
        raise ValueError(f"recipes and steps must be one at least, got {len(recipes)} and {steps}")
    deterministic()  # as the runs themselves are
    runs = [Training(recipe, images, [0], Settings(device, bf16)) for recipe in recipes]
    batches = [_without_end(run) for run in runs]
    for recipe, run, some in zip(recipes, runs, batches, strict=True):
        _block([run], [some], COLD * tracked_period(recipe), deadline)
    block = math.lcm(*map(period, recipes))
    times = torch.stack(
        [_block(runs, batches, block, deadline) for _ in range(max(LEAST_BLOCKS, math.ceil(steps / block)))]
    )
    ratios = times / times[:, :1]
    return {recipe.name: statistics.median(column.tolist()) for recipe, column in zip(recipes, ratios.T, strict=True)}


def period(recipe: Recipe) -> int:
    """Steps after which those of the recipe's method repeat."""
    return int(recipe.method.norm_scale.get("every", 1))


def tracked_period(recipe: Recipe) -> int:
    """Steps from one look of a tracker to the next."""
    return 1 if recipe.method.norm_scale.get("rank") == "full" else period(recipe)


def _block(runs: Sequence[Training], batches: Sequence[Iterator[Batch]], steps: int, deadline: float) -> Tensor:
    """Seconds of so many steps, by run."""
    sums = torch.zeros(len(runs), dtype=torch.float64)
    for i, (run, some) in enumerate(zip(runs, batches, strict=True)):
        for _ in range(steps):
            in_time(deadline)
            sums[i] += run.time_step(next(some))
    return sums


def _without_end(run: Training) -> Iterator[Batch]:
    epoch = 0
    while True:
        run.begin(epoch)
        yield from run.batches(epoch)
        epoch += 1
