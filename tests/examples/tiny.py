"""Recipes that train in no time, and ways to train them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from papers.methods import Method
from papers.recipe import Recipe
from papers.runs import checkpoint
from papers.runs.machine import Machine
from papers.runs.running import Run

ROOT = Path(__file__).resolve().parents[2]

VANILLA = Method("vanilla")

CAP = Method("cap", base="adamw", norm_scale={"mode": "cap", "rank": 2})

RECIPE = Recipe(
    name="digits/mlp/vanilla",
    data="digits",
    model="mlp",
    model_options={"depth": 3, "width": 96},
    method=VANILLA,
    batch=64,
    epochs=3,
    lr=0.05,
    augment=False,
    train=256,
    test=100,
)


def recipe_of(method: Method, **changes: Any) -> Recipe:
    lr = 1e-3 if method.base == "adamw" else 0.05
    return replace(RECIPE, name=f"digits/mlp/{method.name}", method=method, lr=lr, **changes)


def train(script: str, *options: str | Path, **how: Any) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, options)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)


def only(run: Run, *, show: bool = False) -> dict[str, Any]:
    """The result of its one seed."""
    results = run.finish(show=show)
    assert results is not None
    (result,) = results
    return result


def one_epoch(recipe: Recipe, folder: Path, device: str = "auto") -> dict[str, Any] | None:
    """Another one of the run, by objects that know what the disk knows; then what :meth:`Run.finish` gives back."""
    run = Run(recipe, [0], folder, Machine(device=device))
    if not run.results and run.training.epochs_done < recipe.epochs:
        torch.manual_seed(time.time_ns() % 2**32)  # as a new process would have it
        run.training.run_epoch()
        checkpoint.save(run.folder, run.training.state())
        return None
    return only(run)
