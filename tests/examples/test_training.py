"""The trainer: the same log from the same seed, through kills and resumes, and no start where a run cannot end."""

from __future__ import annotations

import math
import signal
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
from papers.recipe import SCALES, Recipe
from papers.runs import checkpoint, folders, running
from papers.runs.machine import Machine, Settings
from papers.runs.running import Run
from papers.runs.training import Training
from torch import Tensor

from tests.examples.tiny import CAP, VANILLA, one_epoch, only, recipe_of, train

SNR = Method("snr", snr_lambda=0.01)

METHODS = (VANILLA, SNR, CAP, Method("adversarial", adversarial=0.5, weight_decay=1e-4))


def logs(run: Path) -> dict[str, str]:
    return {name: (run / name).read_text() for name in ("log.csv", "layers.csv", "log.json")}


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
