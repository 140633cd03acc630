"""Runs on the disk: trained, gone on with after a stop, or given back where they are finished."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..data import Images, load
from ..recipe import Recipe, completed
from . import checkpoint
from .board import Board, board_of
from .figures import draw_run
from .log import Log, finite
from .machine import Machine, commit, described, deterministic
from .member import Member
from .training import Training

LARGEST_SEED = 2**31 - 1
"""Times a million epochs it still fits a generator's 64 bits."""


class Run:
    """A recipe from several seeds, each in its folder ``folder/<recipe's name>/seed-<seed>``: logs, figures and result.
    Those that are not finished are trained at once; their checkpoint is in the seed's folder where it is one seed, else
    in a folder of their own.

    Args:
        folder: of all runs.
        resume: go on with runs that are there; without it, one that is there is an error.

    Raises:
        ValueError: a run of other settings is there, data that cannot be had, a recipe that fits no data, or a seed
            that is none.
        OSError: the folder cannot be written, or has no room for the runs.
    """

    def __init__(
        self,
        recipe: Recipe,
        seeds: Sequence[int],
        folder: Path,
        machine: Machine = Machine(),
        *,
        resume: bool = True,
    ) -> None:
        check_seeds(seeds)
        self.commit = commit()  # the tree may change while a run trains
        self.recipe, self.seeds, self.settings = recipe, tuple(seeds), machine.settings
        self.folders = {seed: checkpoint.folder_of(recipe, [seed], folder) for seed in seeds}
        self.results = self._finished()
        left = [seed for seed in seeds if seed not in self.results]
        if left:
            self.folder = checkpoint.folder_of(recipe, left, folder)
        for there in {self.folder, *self.folders.values()} if left else self.folders.values():
            if not resume and ((there / checkpoint.NAME).exists() or (there / checkpoint.RESULT).exists()):
                raise ValueError(f"{there} holds a run already: --resume goes on with it")
        if left:
            self.training = self._prepared(left, images_of(recipe, machine))

    def _identity(self, seeds: Sequence[int]) -> dict[str, Any]:
        return checkpoint.identity_of(self.recipe, seeds, self.settings)

    def _finished(self) -> dict[int, dict[str, Any]]:
        found = {seed: finished(there, self._identity([seed])) for seed, there in self.folders.items()}
        return {seed: result for seed, result in found.items() if result is not None}

    def _prepared(self, seeds: Sequence[int], images: Images) -> Training:
        deterministic()
        training = Training(self.recipe, images, seeds, self.settings)
        size = sum(checkpoint.size_of(member.model, self.recipe.epochs) for member in training.members)
        checkpoint.reserve(self.folder, size)
        for seed in seeds:
            self.folders[seed].mkdir(parents=True, exist_ok=True)
        state = checkpoint.load(self.folder, self._identity(seeds))
        if state is not None:
            training.load(state)
        return training

    def finish(self, *, show: bool = True, deadline: float | None = None) -> list[dict[str, Any]] | None:
        """Trains to the end; gives back the results of finished runs at once.

        Args:
            show: a progress bar, TensorBoard's files and figures.
            deadline: of ``time.monotonic()``, looked at before each epoch.

        Returns:
            What result.json holds, by seed; None where the deadline came first, and another call goes on.
        """
        if len(self.results) < len(self.seeds):
            if not self._to_the_end(show, deadline):
                return None
            for member in self.training.members:
                self._keep(member, show)
        return [self.results[seed] for seed in self.seeds]

    def _keep(self, member: Member, show: bool) -> None:
        there = self.folders[member.seed]
        if show:
            draw_run(member.log, there)  # before the result, with which a run is finished
        about = self._identity([member.seed]) | {"commit": self.commit, "together": list(self.training.seeds)}
        found = result_of(member.log, self.settings.device, about)
        checkpoint.write_text(there / checkpoint.RESULT, json.dumps(found, indent=1, allow_nan=False))
        self.results[member.seed] = found

    def _to_the_end(self, show: bool, deadline: float | None) -> bool:
        """Whether it came there before the deadline. After each measured epoch the checkpoint, then the logs, are on
        the disk."""
        training, recipe = self.training, self.recipe
        boards = [
            board_of(self.folders[each.seed], each.log, training.epochs_done) for each in training.members if show
        ]
        with tqdm(
            total=recipe.epochs * training.steps,
            initial=training.epochs_done * training.steps,
            desc=f"{recipe.name} seed {' '.join(map(str, training.seeds))}",
            unit="step",
            disable=None if show else True,
        ) as bar:
            self._show(boards)
            while training.epochs_done < recipe.epochs:
                if deadline is not None and time.monotonic() > deadline:
                    return False
                training.run_epoch(bar)
                if training.epochs_done in recipe.measured:
                    checkpoint.save(self.folder, training.state())
                    self._write(bar)
                    self._show(boards)
        self._write(bar)
        return True

    def _show(self, boards: Sequence[Board | None]) -> None:
        for board, log in zip(boards, self.training.logs, strict=False):
            if board is not None:
                board.add(log)

    def _write(self, bar: tqdm[Any]) -> None:
        for member in self.training.members:
            member.log.write(self.folders[member.seed])
        last = [log.epochs[-1] for log in self.training.logs]
        bar.set_postfix(
            {part: f"{statistics.fmean(row[f'{part}_accuracy'] for row in last):.4f}" for part in ("test", "train")}
        )


def check_seeds(seeds: Sequence[int]) -> None:
    for seed in seeds:
        if not 0 <= seed <= LARGEST_SEED:
            raise ValueError(f"seed must be from 0 to {LARGEST_SEED}, got {seed}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be one at least, all different, got {list(seeds)}")


def result_of(log: Log, device: str, about: dict[str, Any]) -> dict[str, Any]:
    here = {"torch": torch.__version__, "machine": described(device)}
    found: dict[str, Any] = finite({**about, **here, **log.as_dict()})
    return found | {"step_ms": log.median_step()}


def finished(run: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The result of a finished run.

    Raises:
        ValueError: it is damaged, or of another recipe or other settings, naming what differs.
    """
    found = checkpoint.read_result(run)
    if found is not None:
        found |= {"recipe": completed(found.get("recipe") or {})}
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
