"""The trainer: the same log from the same seed, through kills and resumes, and no start where a run cannot end."""

from __future__ import annotations

import importlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from papers.data import Images, load
from papers.data.reading import Split
from papers.methods import Method
from papers.objective import Batch
from papers.recipe import SCALES, Recipe
from papers.runs import checkpoint, folders, machine, running
from papers.runs.log import Log, finite
from papers.runs.machine import Machine, Settings
from papers.runs.running import Run
from papers.runs.timing import time_methods
from papers.runs.training import Training
from papers.tables.kept import Kept
from papers.tables.reproducing import times_of
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
VANILLA = Method("vanilla")
SNR = Method("snr", snr_lambda=0.01)
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
METHODS = (VANILLA, SNR, CAP, Method("adversarial", adversarial=0.5, weight_decay=1e-4))


def recipe_of(method: Method, **changes: Any) -> Recipe:
    lr = 1e-3 if method.base == "adamw" else 0.05
    return replace(RECIPE, name=f"digits/mlp/{method.name}", method=method, lr=lr, **changes)


def logs(run: Path) -> dict[str, str]:
    return {name: (run / name).read_text() for name in ("log.csv", "layers.csv", "log.json")}


def train(script: str, *options: str | Path, **how: Any) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, options)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_two_runs_of_one_seed_write_the_same_log(method: Method, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        Run(recipe_of(method, epochs=2), [3], tmp_path / folder).finish(show=False)
    first, second = (logs(tmp_path / folder / f"digits/mlp/{method.name}/seed-3") for folder in ("a", "b"))
    assert first == second


def test_another_seed_writes_another_log(tmp_path: Path) -> None:
    first, second = (only(Run(recipe_of(VANILLA, epochs=1), [seed], tmp_path)) for seed in (0, 1))
    assert first["epochs"] != second["epochs"]


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of noise, 32 x 32, in the place of CIFAR-10."""
    generator = torch.Generator().manual_seed(0)

    def images(count: int) -> Split:
        x = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return Split(x, torch.randint(10, (count,), generator=generator))

    made = Images.of("cifar10", 10, images(96), images(32))
    monkeypatch.setattr(running, "images_of", lambda *_: made)


CONVOLUTIONS = Recipe(
    name="noise/nin/snr",
    data="cifar10",
    model="nin",
    model_options={"scale": 0.05},
    method=SNR,
    batch=32,
    epochs=3,
    lr=0.05,
    label_noise=0.2,
)


@pytest.mark.parametrize("recipe", [*map(recipe_of, METHODS), CONVOLUTIONS], ids=lambda recipe: recipe.name)
def test_run_that_stops_after_each_epoch_ends_in_the_log_of_one_that_does_not(
    recipe: Recipe, noise: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if recipe.data == "digits":
        monkeypatch.setattr(running, "images_of", lambda *_: load("digits"))
    whole = only(Run(recipe, [0], tmp_path / "whole"))
    stops = 0
    while (result := one_epoch(recipe, tmp_path / "stopped")) is None:
        stops += 1
    assert stops == recipe.epochs
    first, second = (logs(tmp_path / folder / recipe.name / "seed-0") for folder in ("whole", "stopped"))
    assert first == second
    assert {**result, "step_ms": 0} == {**whole, "step_ms": 0}


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


def test_run_that_is_killed_anywhere_ends_in_the_log_of_one_that_is_not(tmp_path: Path) -> None:
    options = ("--recipe", "digits/mlp/snr", "--scale", "tiny", "--epochs", "5", "--device", "cpu")
    whole = train("train.py", *options, "--out", tmp_path / "whole")
    assert whole.wait() == 0, whole.communicate()[1]
    killed = tmp_path / "killed/digits/mlp/snr/seed-0"
    process = train("train.py", *options, "--out", tmp_path / "killed", "--resume")
    while process.poll() is None and not (killed / "log.csv").exists():
        time.sleep(0.002)
    time.sleep(0.05)  # into another epoch
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    last = train("train.py", *options, "--out", tmp_path / "killed", "--resume")
    assert last.wait() == 0, last.communicate()[1]
    assert logs(killed) == logs(tmp_path / "whole/digits/mlp/snr/seed-0")


def test_deadline_leaves_a_run_that_the_same_call_goes_on_with(tmp_path: Path) -> None:
    recipe = recipe_of(SNR)
    assert Run(recipe, [0], tmp_path).finish(show=False, deadline=time.monotonic()) is None
    assert not (tmp_path / recipe.name / "seed-0" / "result.json").exists()
    assert Run(recipe, [0], tmp_path).finish(show=False, deadline=math.inf) is not None


def test_finished_run_is_read_and_not_repeated(tmp_path: Path) -> None:
    recipe = recipe_of(VANILLA, epochs=1)
    first = only(Run(recipe, [0], tmp_path))
    again = Run(recipe, [0], tmp_path)
    assert again.results == {0: first}
    assert not hasattr(again, "training")


def test_run_of_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    Run(recipe_of(VANILLA, epochs=1), [0], tmp_path).finish(show=False)
    with pytest.raises(ValueError, match=r"recipe\.lr is 0\.05 there and 0\.1 here"):
        Run(replace(recipe_of(VANILLA, epochs=1), lr=0.1), [0], tmp_path)
    unfinished = recipe_of(SNR)
    one_epoch(unfinished, tmp_path)
    with pytest.raises(ValueError, match=r"recipe\.batch is 64 there and 32 here"):
        Run(replace(unfinished, batch=32), [0], tmp_path)


def test_run_that_is_there_is_not_written_over_without_resume(tmp_path: Path) -> None:
    one_epoch(recipe_of(SNR), tmp_path)
    with pytest.raises(ValueError, match="holds a run already: --resume"):
        Run(recipe_of(SNR), [0], tmp_path, resume=False)


def test_damaged_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    one_epoch(recipe_of(SNR), tmp_path)
    file = tmp_path / "digits/mlp/snr/seed-0" / folders.CHECKPOINT
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"checkpoint\.pt cannot be read"):
        Run(recipe_of(SNR), [0], tmp_path)


@pytest.mark.parametrize("method", [CAP, Method("adamw", base="adamw")], ids=lambda method: method.name)
def test_counts_of_steps_stay_on_the_cpu_when_a_run_goes_on(
    method: Method, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **how: loaded.append(how["map_location"]) or load(*args, **how))
    recipe = recipe_of(method)
    one_epoch(recipe, tmp_path, device=str(device))
    optimizer = Run(recipe, [0], tmp_path, Machine(device=str(device))).training.optimizer
    steps = [state["step"] for state in optimizer.state.values() if "step" in state]
    assert loaded == ["cpu"] and steps
    assert {step.device.type for step in steps if isinstance(step, Tensor)} == {"cpu"}
    moments = [state["exp_avg"].device.type for state in optimizer.state.values()]
    assert set(moments) == {device.type}


def test_checkpoint_stays_whole_where_its_successor_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, {"epochs_done": 1})

    def fails(state: Mapping[str, Any], path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, {"epochs_done": 2})
    assert torch.load(tmp_path / folders.CHECKPOINT) == {"epochs_done": 1}
    assert [file.name for file in tmp_path.iterdir()] == [folders.CHECKPOINT]


# --- what is refused before training ----------------------------------------------------------------------------------


def refused(process: subprocess.Popen[str]) -> str:
    out, error = process.communicate()
    assert process.returncode == 2, out + error
    assert "step/s" not in error  # no progress bar, so no training
    return error


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str | Path) -> str:
    """What train.py says before it trains, called in this process."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options)])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module("train").main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "step/s" not in error
    return error


def test_folder_that_cannot_be_written_fails_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    told = refusal(monkeypatch, capsys, "--recipe", "digits/mlp/snr", "--out", tmp_path / "file" / "below")
    assert "cannot write" in told
    assert str(tmp_path / "file") in told


def test_disk_without_room_fails_before_training(tmp_path: Path) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    options = ("--recipe", "digits/mlp/snr", "--out", tmp_path)
    told = refused(train("train.py", *options, preexec_fn=small_files))
    assert "cannot write" in told
    assert "MiB there" in told
    assert not list(tmp_path.rglob("*.pt*"))


def test_reserved_room_is_given_back(tmp_path: Path) -> None:
    checkpoint.reserve(tmp_path / "a" / "b", 2**22)
    assert list(tmp_path.rglob("*")) == [tmp_path / "a", tmp_path / "a" / "b"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--recipe", "digits/mlp/snrr"), "digits/mlp/snr"),
        (("--recipe", "digits/mlp/snr", "--epochs", "0"), "epochs must be an integer of at least 1, got 0"),
        (("--recipe", "digits/mlp/snr", "--seeds", "-1"), "seed must be from 0 to 2147483647, got -1"),
        (
            ("--recipe", "digits/mlp/snr", "--seeds", "0", str(2**31)),
            "seed must be from 0 to 2147483647, got 2147483648",
        ),
        (
            ("--recipe", "digits/mlp/snr", "--seeds", "1", "2", "1"),
            "seeds must be one at least, all different, got [1, 2, 1]",
        ),
        (("--recipe", "digits/mlp/snr", "--device", "abacus"), "device must be auto or one of cpu"),
        (("--recipe", "digits/mlp/snr", "--device", "meta"), "device must be auto or one of cpu"),
        (("--recipe", "digits/mlp/snr", "--device", "cuda:99"), "got 'cuda:99'"),
        (("--recipe", "normscale/mlp-5x2000/none"), "folder"),
        (("--recipe", "normscale/mlp-5x2000/none", "--data-dir", "nowhere"), "cifar-100-binary"),
    ],
)
def test_wrong_argument_fails_before_training(
    options: tuple[str, ...],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert told in refusal(monkeypatch, capsys, *options, "--out", tmp_path)


def test_seed_that_cannot_be_run_fails_before_the_first_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "digits/mlp/snr/seed-7"
    folder.mkdir(parents=True)
    (folder / folders.CHECKPOINT).write_text("of another")
    told = refusal(monkeypatch, capsys, "--recipe", "digits/mlp/snr", "--seeds", "0", "7", "--out", tmp_path)
    assert f"{folder} holds a run already" in told
    assert not (tmp_path / "digits/mlp/snr/seed-0" / folders.CHECKPOINT).exists()


def test_room_is_made_for_the_logs_of_all_epochs(tmp_path: Path) -> None:
    recipe = recipe_of(CAP, epochs=8)
    run = Run(recipe, [0], tmp_path)
    for _ in range(recipe.epochs):
        run.training.run_epoch()
    run.finish(show=False)
    written = sum(file.stat().st_size for file in run.folder.iterdir() if file.name != folders.CHECKPOINT)
    model = run.training.model
    assert checkpoint.size_of(model, recipe.epochs) - checkpoint.size_of(model, 0) > written


# --- what a run leaves ------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("side", "most"), [(32, 250), (33, 64)])
def test_gradients_are_measured_in_batches_that_memory_holds(side: int, most: int) -> None:
    generator = torch.Generator().manual_seed(0)
    split = Split(
        torch.randint(256, (300, 3, side, side), dtype=torch.uint8, generator=generator),
        torch.randint(10, (300,), generator=generator),
    )
    training = Training(replace(CONVOLUTIONS, label_noise=0.0), Images.of("cifar10", 10, split, split), [0])
    (member,) = training.members
    batches, whole = list(member._differentiated()), next(member._tests())
    assert max(len(x) for x, _ in batches) == most < 500
    assert torch.equal(torch.cat([x for x, _ in batches]), whole[0])


def test_bfloat16_and_channels_last_train(noise: None) -> None:
    settings = Settings("cpu", bf16=True, channels_last=True)
    training = Training(replace(CONVOLUTIONS, epochs=1), running.images_of(CONVOLUTIONS, Machine()), [0], settings)
    training.run_epoch()
    assert all(p.dtype == torch.float32 for p in training.model.parameters())
    assert math.isfinite(training.logs[0].epochs[-1]["test_loss"])


def test_published_defects_share_one_target_and_crop_test_images(noise: None) -> None:
    method = Method("spectral", base="adamw", norm_scale={"mode": "set"})
    recipe = replace(CONVOLUTIONS, method=method, published=True, start="orthogonal", label_noise=0.0)
    images = running.images_of(CONVOLUTIONS, Machine())
    training, honest = (Training(one, images, [0]).members[0] for one in (recipe, replace(recipe, published=False)))
    assert len(set(training.log.targets.values())) == 1 < len(set(honest.log.targets.values()))
    assert training.mean != honest.mean == images.mean
    plain, cropped = (next(run._tests())[0] * torch.tensor(run.std).view(3, 1, 1) for run in (honest, training))
    assert not torch.allclose(plain.sum((1, 2, 3)), cropped.sum((1, 2, 3)), rtol=1e-2)


def test_scaled_recipe_is_smaller_and_keeps_its_name() -> None:
    small = CONVOLUTIONS.scaled(SCALES["cpu"])
    assert small.name == CONVOLUTIONS.name
    assert small.model_options["scale"] == 0.25
    assert small.train == 4000
    assert small.batch == 32
