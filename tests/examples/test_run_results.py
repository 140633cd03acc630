"""What a run leaves: figures, boards, results, and what is measured beside it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from papers.data import load
from papers.runs import checkpoint, machine, running
from papers.runs.log import Log, finite
from papers.runs.machine import Machine
from papers.runs.running import Run
from papers.runs.training import Training

from tests.examples.tiny import CAP, RECIPE, VANILLA, one_epoch, only, recipe_of


def test_run_writes_figures_and_tensorboard_files(tmp_path: Path) -> None:
    recipe = recipe_of(CAP, epochs=1)
    Run(recipe, [0], tmp_path).finish()
    folder = tmp_path / recipe.name / "seed-0"
    for name in ("curves", "spectral_norms", "stable_ranks", "ranks"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").iterdir())


def test_board_has_the_epoch_that_a_kill_came_after(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = recipe_of(CAP)
    one_epoch(recipe, tmp_path)  # as killed after the checkpoint
    Run(recipe, [0], tmp_path).finish()
    events = EventAccumulator(str(tmp_path / recipe.name / "seed-0" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("test_accuracy")] == [1, 2, 3]


def test_board_of_a_run_that_goes_on_has_each_epoch_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = recipe_of(CAP)
    run = Run(recipe, [0], tmp_path)
    run.training.run_epoch()
    board = running.board_of(run.folder, run.training.logs[0], 0)
    board.add(run.training.logs[0])
    board.writer.close()
    checkpoint.save(run.folder, run.training.state())
    Run(recipe, [0], tmp_path).finish()
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("test_accuracy")] == [0, 1, 2, 3]


def test_run_is_not_finished_without_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    recipe = recipe_of(CAP, epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(running, "draw_run", killed)
        with pytest.raises(KeyboardInterrupt):
            Run(recipe, [0], tmp_path).finish()
    Run(recipe, [0], tmp_path).finish()
    assert (tmp_path / recipe.name / "seed-0" / "curves.png").exists()


def test_result_names_the_commit_that_the_run_began_with_and_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "commit", lambda: "before")
    run = Run(recipe_of(VANILLA, epochs=1), [0], tmp_path, Machine(device="cpu"))
    monkeypatch.setattr(running, "commit", lambda: "after")
    result = only(run)
    assert result["commit"] == "before"
    assert result["machine"] == f"CPU ({machine.processor()}), {torch.get_num_threads()} threads"
    assert machine.processor()


def test_result_tells_what_was_run_and_what_was_found(tmp_path: Path) -> None:
    recipe = recipe_of(CAP, epochs=2)
    result = only(Run(recipe, [0], tmp_path))
    assert json.loads((tmp_path / recipe.name / "seed-0" / "result.json").read_text()) == json.loads(json.dumps(result))
    assert [row["epoch"] for row in result["epochs"]] == [0, 1, 2]
    layer = (
        result["layers"]["body.0.weight"]
        if "body.0.weight" in result["layers"]
        else next(iter(result["layers"].values()))
    )
    assert len(layer["sigma"]) == len(layer["rank"]) == 3
    assert layer["target"] == pytest.approx(math.sqrt(96 / 64))
    assert result["step_ms"] > 0


def test_training_that_diverges_is_logged_as_such_and_stays_json(tmp_path: Path) -> None:
    result = only(Run(replace(recipe_of(VANILLA), lr=1e30), [0], tmp_path), show=True)
    assert result["epochs"][-1]["test_loss"] is None
    assert finite({"a": [math.nan, 1.0, math.inf]}) == {"a": [None, 1.0, None]}


def test_schedule_falls_at_the_stated_fractions_whatever_the_epochs() -> None:
    training = Training(replace(RECIPE, epochs=4, milestones=(0.25, 0.5)), load("digits"), [0])
    for _ in range(4):
        training.run_epoch()
    assert [row["lr"] for row in training.logs[0].epochs] == pytest.approx([0.05, 0.05, 0.005, 5e-4, 5e-4])


def test_ranks_are_counted_at_the_start_at_the_end_and_between() -> None:
    training = Training(replace(RECIPE, epochs=8), load("digits"), [0])
    for _ in range(8):
        training.run_epoch()
    for layer in training.logs[0].layers.values():
        assert [math.isfinite(rank) for rank in layer["rank"]] == [epoch % 2 == 0 for epoch in range(9)]


def test_history_of_a_log_holds_its_norms_for_the_plots() -> None:
    log = Log(targets={"a": 2.0})
    for epoch in range(2):
        values = {"sigma": 1.0 + epoch, "stable_rank": 3.0, "frobenius": 4.0, "rank": 5.0}
        log.add({"epoch": epoch, "lr": 0.1}, {"a": values, "b": values})
    history = log.history()
    assert history["sigma"].tolist() == [[1.0, 1.0], [2.0, 2.0]]
    assert history["target"][0, 0] == 2.0
    assert math.isnan(history["target"][0, 1])
