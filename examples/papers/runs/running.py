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
from . import checkpoint, folders
from .board import Board, board_of
from .figures import draw_run
from .log import Log, finite
from .machine import Machine, commit, described, deterministic
from .member import Member
from .training import Training

SAVED_EVERY = 60.0
"""Seconds."""
LARGEST_SEED = 2**31 - 1
"""Times a million epochs it still fits a generator's 64 bits."""


class Run:
    """A recipe from several seeds, each in its folder ``folder/<recipe's name>/seed-<seed>``: logs, figures and result.
    Those that are not finished are trained at once, with their checkpoint in the seed's folder where it is one seed,
    else in one of all, such as ``seeds-0..2``. Seeds that were begun together go on together, and first, with all that
    were begun with them.

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
        self.recipe, self.seeds, self.runs, self.machine = recipe, tuple(seeds), folder, machine
        if not resume:
            self._check_nothing_there()
        self.results = {seed: result for seed in seeds if (result := self._finished(seed)) is not None}
        left = [seed for seed in seeds if seed not in self.results]
        self.parts = folders.parts_of(left, folders.begun(recipe, folder))
        for part in self.parts[1:]:
            self._state(part)  # which fails where it would fail after hours of the first
        if self.parts:
            self.training = self._prepared(self.parts[0])

    def place(self, *seeds: int) -> Path:
        return folders.folder_of(self.recipe, seeds, self.runs)

    @property
    def folder(self) -> Path:
        """Of the checkpoint of what is trained now."""
        return self.place(*self.training.seeds)

    def _check_nothing_there(self) -> None:
        there = [(seed,) for seed in folders.finished(self.recipe, self.runs)]
        for some in (*folders.begun(self.recipe, self.runs), *there):
            if set(some) & set(self.seeds):
                raise ValueError(f"{self.place(*some)} holds a run already: --resume goes on with it")

    def _identity(self, seeds: Sequence[int]) -> dict[str, Any]:
        return checkpoint.identity_of(self.recipe, seeds, self.machine.settings)

    def _finished(self, seed: int) -> dict[str, Any] | None:
        return finished(self.place(seed), self._identity([seed]))

    def _state(self, seeds: Sequence[int]) -> dict[str, Any] | None:
        return checkpoint.load(self.place(*seeds), self._identity(seeds))

    def _prepared(self, seeds: Sequence[int]) -> Training:
        deterministic()
        training = Training(self.recipe, images_of(self.recipe, self.machine), seeds, self.machine.settings)
        size = sum(checkpoint.size_of(member.model, self.recipe.epochs) for member in training.members)
        checkpoint.reserve(self.place(*seeds), size)
        for seed in seeds:
            self.place(seed).mkdir(parents=True, exist_ok=True)
        state = self._state(seeds)
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

        Raises:
            OSError: another process trains in one of the folders.
        """
        while self.parts:
            if self.training.seeds != self.parts[0]:
                self.training = self._prepared(self.parts[0])
            with folders.locked([self.place(seed) for seed in self.training.seeds]):
                if not self._to_the_end(show, deadline):
                    return None
                for member in self.training.members:
                    self._keep(member, show)
            del self.parts[0]
        return [self.results[seed] for seed in self.seeds]

    def _keep(self, member: Member, show: bool) -> None:
        there = self.place(member.seed)
        if show:
            draw_run(member.log, there)  # before the result, with which a run is finished
        about = self._identity([member.seed]) | {"commit": self.commit, "together": list(self.training.seeds)}
        found = result_of(member.log, self.machine.settings.device, about)
        checkpoint.write_text(there / folders.RESULT, json.dumps(found, indent=1, allow_nan=False))
        self.results[member.seed] = found

    def _to_the_end(self, show: bool, deadline: float | None) -> bool:
        """Whether it came there before the deadline. The checkpoint is on the disk after each measured epoch, with the
        logs, after each ``SAVED_EVERY`` seconds, and when the deadline comes."""
        training, recipe = self.training, self.recipe
        boards = [board_of(self.place(each.seed), each.log, training.epochs_done) for each in training.members if show]
        with tqdm(
            total=recipe.epochs * training.steps,
            initial=training.epochs_done * training.steps,
            desc=f"{recipe.name} seed {' '.join(map(str, training.seeds))}",
            unit="step",
            disable=None if show else True,
        ) as bar:
            self._show(boards)
            saved, at = training.epochs_done, time.monotonic()
            while training.epochs_done < recipe.epochs:
                late = deadline is not None and time.monotonic() > deadline
                if saved < training.epochs_done and (late or time.monotonic() > at + SAVED_EVERY):
                    checkpoint.save(self.folder, training.state())
                    saved, at = training.epochs_done, time.monotonic()
                if late:
                    return False
                training.run_epoch(bar)
                if training.epochs_done in recipe.measured:
                    checkpoint.save(self.folder, training.state())
                    saved, at = training.epochs_done, time.monotonic()
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
            member.log.write(self.place(member.seed))
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
            raise ValueError(f"{run / folders.RESULT} is of another run: {'; '.join(differing)}")
    return found


def images_of(recipe: Recipe, machine: Machine) -> Images:
    """Read once for all runs of a table's row."""
    return _images(recipe.data, machine.data_dir, machine.download)


@lru_cache(maxsize=1)
def _images(name: str, data_dir: Path | None, download: bool) -> Images:
    return load(name, data_dir, download=download)
