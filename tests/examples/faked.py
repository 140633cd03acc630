"""reproduce.py with a training that takes no time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import reproduce
import torch
from papers.recipe import SCALES, Recipe
from papers.runs.machine import Machine
from papers.tables.reproducing import Tools

from tests.examples.results_samples import result

MLP = "normscale/mlp-5x2000"


class Fake:
    """Training that takes no time and writes what a finished run leaves; it stops before the ``limit``-th run."""

    def __init__(
        self,
        limit: int | None = None,
        lost: Sequence[str] = (),
        full: Sequence[str] = (),
        broken: Sequence[str] = (),
    ) -> None:
        self.limit, self.lost, self.full, self.broken = limit, lost, full, broken
        self.trained: list[tuple[str, int]] = []
        self.together: list[list[int]] = []
        self.timed: list[list[str]] = []

    def train(
        self, recipe: Recipe, seeds: Sequence[int], folder: Path, machine: Machine, deadline: float | None
    ) -> list[dict[str, Any]] | None:
        if self.limit is not None and len(self.trained) >= self.limit:
            return None
        if recipe.name in self.broken:
            raise OSError(28, "No space left on device", str(folder))
        if recipe.row in self.full or recipe.name in self.full:
            raise torch.OutOfMemoryError("CUDA out of memory.\nMore of it")
        self.together.append(list(seeds))
        return [self.one(recipe, seed, folder, machine) for seed in seeds]

    def one(self, recipe: Recipe, seed: int, folder: Path, machine: Machine) -> dict[str, Any]:
        self.trained.append((recipe.name, seed))
        found = result(recipe.name, seed, SCALES["tiny"], test=0.5 + 0.01 * seed)
        found["recipe"] = recipe.as_dict()
        found["settings"] = {"device": machine.settings.device, "bf16": machine.bf16}
        path = folder / recipe.name / f"seed-{seed}" / "result.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(found))
        return found

    def images(self, recipe: Recipe, machine: Machine) -> None:
        if recipe.data in self.lost:
            raise ValueError(f"{recipe.data} is not there")

    def times(self, recipes: Sequence[Recipe], images: object, machine: Machine, deadline: float) -> dict[str, float]:
        self.timed.append([recipe.name for recipe in recipes])
        return {recipe.name: 1 + 0.1 * i for i, recipe in enumerate(recipes)}

    @property
    def tools(self) -> Tools:
        return Tools(self.train, self.images, self.times)


def reproduced(
    fake: Fake, folder: Path, *words: str | Path, table: str = "normscale", unfinished: str | None = None
) -> str:
    """Runs the program, which ends with an error where rows are ``unfinished``; its report."""
    ends = nullcontext() if unfinished is None else pytest.raises(SystemExit, match=f"not finished.*: {unfinished}$")
    with ends:
        reproduce.main([table, "--scale", "tiny", "--out", str(folder), *map(str, words)], fake.tools)
    return (folder / "tiny" / f"{table}.md").read_text()
