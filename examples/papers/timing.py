"""What a training step costs under each method, side by side."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .data import Images
from .recipe import Recipe
from .running import deterministic
from .training import Settings, Training

COLD = 22
"""Steps before any is timed: what a tracker does more of at the start, compilation, and allocation."""
LEAST_BLOCKS = 3
"""Of which a median is worth its name."""


def time_methods(
    recipes: Sequence[Recipe], images: Images, device: str, *, steps: int = 30, bf16: bool = False
) -> dict[str, float]:
    """A training step's time over that of the first recipe in the same block, by name: medians over blocks.

    Every recipe trains its own network on the same batches. A block is as many steps of each, recipe after recipe, as
    the longest ``every`` among their methods, so that work done in each ``every``-th step has its share in each block.

    Args:
        steps: of each recipe, at least; at least three blocks are taken.

    Raises:
        ValueError: no recipe, or fewer than one step.
    """
    if not recipes or steps < 1:
        raise ValueError(f"recipes and steps must be one at least, got {len(recipes)} and {steps}")
    deterministic()  # as the runs themselves are
    runs = [Training(recipe, images, 0, Settings(device, bf16)) for recipe in recipes]
    batches = [_without_end(run) for run in runs]
    _block(runs, batches, COLD)
    block = max(period(recipe) for recipe in recipes)
    times = torch.stack([_block(runs, batches, block) for _ in range(max(LEAST_BLOCKS, math.ceil(steps / block)))])
    ratios = times / times[:, :1]
    return {recipe.name: statistics.median(column.tolist()) for recipe, column in zip(recipes, ratios.T, strict=True)}


def period(recipe: Recipe) -> int:
    """Steps after which those of the recipe's method repeat."""
    return int(recipe.method.norm_scale.get("every", 1))


def _block(runs: Sequence[Training], batches: Sequence[Iterator[tuple[Tensor, Tensor]]], steps: int) -> Tensor:
    """Seconds of so many steps, by run."""
    sums = [sum(run.time_step(*next(some)) for _ in range(steps)) for run, some in zip(runs, batches, strict=True)]
    return torch.tensor(sums, dtype=torch.float64)


def _without_end(run: Training) -> Iterator[tuple[Tensor, Tensor]]:
    epoch = 0
    while True:
        yield from run.train.epoch(epoch)
        epoch += 1
