"""What a training step costs under each method, side by side."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .data import Images
from .recipe import Recipe
from .training import Settings, Training

COLD = 22
"""Steps before any is timed: what a tracker does more of at the start, compilation, and allocation."""


def time_methods(
    recipes: Sequence[Recipe], images: Images, device: str, *, steps: int = 30, bf16: bool = False
) -> dict[str, float]:
    """A training step's time over that of the first recipe in the same turn, by name: medians of ``steps`` ratios.

    Every recipe trains its own network on the same batches, a step of each in turn.

    Raises:
        ValueError: no recipe, or fewer than one step.
    """
    if not recipes or steps < 1:
        raise ValueError(f"recipes and steps must be one at least, got {len(recipes)} and {steps}")
    runs = [Training(recipe, images, 0, Settings(device, bf16)) for recipe in recipes]
    batches = [_without_end(run) for run in runs]
    times = torch.empty(COLD + steps, len(runs), dtype=torch.float64)
    for row in times:
        for i, (run, some) in enumerate(zip(runs, batches, strict=True)):
            row[i] = run.time_step(*next(some))
    ratios = times[COLD:] / times[COLD:, :1]
    return {recipe.name: statistics.median(column.tolist()) for recipe, column in zip(recipes, ratios.T, strict=True)}


def _without_end(run: Training) -> Iterator[tuple[Tensor, Tensor]]:
    epoch = 0
    while True:
        yield from run.train.epoch(epoch)
        epoch += 1
