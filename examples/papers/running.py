"""Runs on the disk: trained, gone on with after a stop, or given back where they are finished."""

from __future__ import annotations

import json
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import checkpoint
from .board import board_of
from .data import Images, load
from .figures import draw_run
from .log import finite
from .machine import Machine, Settings, commit, described, deterministic
from .recipe import Recipe
from .training import Training

LARGEST_SEED = 2**31 - 1
"""Times a million epochs it still fits a generator's 64 bits."""


class Run:
    """A recipe and a seed in their folder ``folder/<recipe's name>/seed-<seed>``: checkpoint, logs, figures and result.

    Args:
        folder: of all runs.
        resume: go on with a run that is there; without it, one that is there is an error.

    Raises:
        ValueError: a run of other settings is there, data that cannot be had, a recipe that fits no data, or a seed
            that is none.
        OSError: the folder cannot be written, or has no room for the run.
    """

    def __init__(
        self, recipe: Recipe, seed: int, folder: Path, machine: Machine = Machine(), *, resume: bool = True
    ) -> None:
        if not 0 <= seed <= LARGEST_SEED:
            raise ValueError(f"seed must be from 0 to {LARGEST_SEED}, got {seed}")
        self.commit = commit()  # the tree may change while a run trains
        self.folder = checkpoint.folder_of(recipe, seed, folder)
        self.identity = checkpoint.identity_of(recipe, seed, machine.settings)
        if not resume and (self.folder / checkpoint.NAME).exists():
            raise ValueError(f"{self.folder} holds a run already: --resume goes on with it")
        self.result = finished(self.folder, self.identity)
        if self.result is None:
            self.training = self._prepared(recipe, seed, machine.settings, images_of(recipe, machine))

    def _prepared(self, recipe: Recipe, seed: int, settings: Settings, images: Images) -> Training:
        deterministic()
        training = Training(recipe, images, seed, settings)
        checkpoint.reserve(self.folder, checkpoint.size_of(training.model, recipe.epochs))
        state = checkpoint.load(self.folder, self.identity)
        if state is not None:
            training.load(state)
        return training

    def finish(self, *, show: bool = True, deadline: float | None = None) -> dict[str, Any] | None:
        """Trains to the end; gives back the result of a finished run at once.

        Args:
            show: a progress bar, TensorBoard's files and figures.
            deadline: of ``time.monotonic()``, looked at before each epoch.

        Returns:
            What result.json holds; None where the deadline came first, and another run of the same goes on.
        """
        if self.result is None and to_the_end(self.training, self.folder, show, deadline):
            if show:
                draw_run(self.training.log, self.folder)  # before the result, with which a run is finished
            self.result = result_of(self.training, self.identity | {"commit": self.commit})
            checkpoint.write_text(self.folder / checkpoint.RESULT, json.dumps(self.result, indent=1, allow_nan=False))
        return self.result


def to_the_end(training: Training, run: Path, show: bool, deadline: float | None) -> bool:
    """Whether it came there before the deadline. After each epoch the checkpoint, then the logs, are on the disk."""
    recipe, steps = training.recipe, training.train.steps
    board = board_of(run, training.epochs_done) if show else None
    if board is not None:
        board.add(training.log)
    with tqdm(
        total=recipe.epochs * steps,
        initial=training.epochs_done * steps,
        desc=f"{recipe.name} seed {training.seed}",
        unit="step",
        disable=None if show else True,
    ) as bar:
        while training.epochs_done < recipe.epochs:
            if deadline is not None and time.monotonic() > deadline:
                return False
            training.run_epoch(bar)
            checkpoint.save(run, training.state())
            training.log.write(run)
            row = training.log.epochs[-1]
            bar.set_postfix(test=f"{row['test_accuracy']:.4f}", train=f"{row['train_accuracy']:.4f}")
            if board is not None:
                board.add(training.log)
    training.log.write(run)
    return True


def result_of(training: Training, about: dict[str, Any]) -> dict[str, Any]:
    here = {"torch": torch.__version__, "machine": described(training.settings.device)}
    found: dict[str, Any] = finite({**about, **here, **training.log.as_dict()})
    return found | {"step_ms": training.log.median_step()}


def finished(run: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a finished run.

    Raises:
        ValueError: it is damaged, or of another recipe or other settings, naming what differs.
    """
    found = checkpoint.read_result(run)
    if found is not None:
        wanted = json.loads(json.dumps(identity))
        differing = list(checkpoint.differences(wanted, {name: found.get(name) for name in wanted}))
        if differing:
            raise ValueError(f"{run / checkpoint.RESULT} is of another run: {'; '.join(differing)}")
    return found


def images_of(recipe: Recipe, machine: Machine) -> Images:
    """Read once for all runs of a table's row."""
    return _images(recipe.data, machine.data_dir, machine.download)


@lru_cache(maxsize=1)
def _images(name: str, data_dir: Path | None, download: bool) -> Images:
    return load(name, data_dir, download=download)
