"""Times of methods are ratios, taken in turns, of steps as they are trained."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from papers.data import load
from papers.methods import Method
from papers.objective import Batch
from papers.runs.machine import Machine
from papers.runs.timing import time_methods
from papers.runs.training import Training
from papers.tables.kept import Kept
from papers.tables.reproducing import times_of

from tests.examples.tiny import CAP, VANILLA, recipe_of


def test_times_are_ratios_to_the_first_recipe() -> None:
    found = time_methods([recipe_of(VANILLA), recipe_of(CAP)], load("digits"), steps=5)
    assert found["digits/mlp/vanilla"] == 1.0
    assert found["digits/mlp/cap"] > 0


@pytest.mark.parametrize(("every", "least"), [(50, 172), (1, 52)])
def test_times_have_the_share_of_what_is_done_in_each_50th_step(
    every: int, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = {"vanilla": 0, "full": 0}

    def step(self: Training, batch: Batch) -> float:
        name = self.recipe.method.name
        taken[name] += 1
        slower = 1.32 if name == "full" else 1.0
        return slower + (15.5 if name == "full" and every > 1 and taken[name] % every == 0 else 0.0)

    monkeypatch.setattr(Training, "time_step", step)
    full = Method("full", norm_scale={"mode": "cap", "rank": "full", "every": every})
    found = time_methods([recipe_of(VANILLA), recipe_of(full)], load("digits"))
    assert found["digits/mlp/full"] == pytest.approx(1.63 if every > 1 else 1.32)
    assert taken == {"vanilla": least, "full": least}


def test_a_machine_that_becomes_slower_from_step_to_step_changes_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {"vanilla": 0, "third": 0}

    def step(self: Training, batch: Batch) -> float:
        name = self.recipe.method.name
        taken[name] += 1
        total = sum(taken.values())
        hindered = 5.0 if total % 17 == 0 else 1.0
        return (1.2 if name == "third" and taken[name] % 3 == 0 else 1.0) * 1.002**total * hindered

    monkeypatch.setattr(Training, "time_step", step)
    third = Method("third", norm_scale={"mode": "cap", "every": 3})
    found = time_methods([recipe_of(VANILLA), recipe_of(third)], load("digits"))
    assert found["digits/mlp/third"] == pytest.approx(3.2 / 3, abs=0.01)


def test_each_method_is_timed_after_its_own_first_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = {"vanilla": 0, "third": 0}

    def step(self: Training, batch: Batch) -> float:
        taken[self.recipe.method.name] += 1
        return 1.0

    monkeypatch.setattr(Training, "time_step", step)
    third = Method("third", norm_scale={"mode": "cap", "every": 3})
    time_methods([recipe_of(VANILLA), recipe_of(third)], load("digits"))
    assert taken == {"vanilla": 22 + 30, "third": 3 * 22 + 30}


def test_steps_are_timed_in_the_layout_that_runs_have(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(Training, "time_step", lambda run, batch: seen.append(run.settings.channels_last) or 1.0)
    machine = Machine(device="cpu", channels_last=True)
    times_of([recipe_of(VANILLA)], load("digits"), machine, math.inf)
    assert set(seen) == {True}
    folder = Path("runs")
    assert Kept(folder, machine).times_path("a/b") != Kept(folder, replace(machine, channels_last=False)).times_path(
        "a/b"
    )


def test_times_are_of_runs_as_they_are_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    time_methods([recipe_of(VANILLA)], load("digits"), steps=1)
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
