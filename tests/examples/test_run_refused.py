"""What is refused before a training begins."""

from __future__ import annotations

import importlib
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from papers.runs import checkpoint, folders
from papers.runs.running import Run

from tests.examples.tiny import CAP, recipe_of, train


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
