"""The examples run as a user runs them, with tiny settings."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("SGD", "SNRSGD", "AdamW", "NormScaleAdamW spectral", "NormScaleAdamW frobenius")


def run(script: str, *options: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, options)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def numbers(tree: Any) -> Iterator[float]:
    if isinstance(tree, int | float):
        yield tree
    elif isinstance(tree, dict | list):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from numbers(branch)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Standard output of a demo of two epochs, and the folder it wrote to."""
    folder = tmp_path_factory.mktemp("demo")
    done = run("demo.py", "--epochs", "2", "--seeds", "1", "--device", "cpu", "--out", "made/here", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, folder / "made/here"


def test_demo_prints_a_line_for_each_of_five_methods(demo: tuple[str, Path]) -> None:
    lines = demo[0].splitlines()
    for line, method in zip(lines[2:7], METHODS, strict=True):
        name, *cells = re.split(r"  +", line)
        assert name == method
        assert len(cells) == 8


def test_demo_writes_a_figure(demo: tuple[str, Path]) -> None:
    assert (demo[1] / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_demo_writes_finite_results_of_five_methods(demo: tuple[str, Path]) -> None:
    written = json.loads((demo[1] / "demo.json").read_text())
    assert tuple(result["method"] for result in written["results"]) == METHODS
    assert all(len(run["test"]) == 3 for runs in written["curves"].values() for run in runs)
    assert all(math.isfinite(number) for number in numbers(written))


def test_demo_methods_start_from_the_same_weights(demo: tuple[str, Path]) -> None:
    curves = json.loads((demo[1] / "demo.json").read_text())["curves"]
    starts = [(run["train"][0], run["test"][0], run["sigmas"][0]) for (run,) in curves.values()]
    assert all(start == starts[0] for start in starts)


def test_demo_repeats_itself_but_for_the_times(demo: tuple[str, Path], tmp_path: Path) -> None:
    run("demo.py", "--epochs", "2", "--seeds", "1", "--device", "cpu", "--out", tmp_path, cwd=tmp_path)
    first, second = (json.loads((f / "demo.json").read_text())["curves"] for f in (demo[1], tmp_path))
    for curves in (first, second):
        for (run_,) in curves.values():
            del run_["step_ms"]
    assert first == second


def test_demo_refuses_a_folder_it_cannot_write_to_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("demo.py", "--epochs", "1000000", "--out", tmp_path / "file" / "below", cwd=tmp_path)
    assert done.returncode == 2
    assert "--out" in done.stderr
    assert "cannot write there" in done.stderr
    assert "epoch/s" not in done.stderr  # no progress bar, so no training
    assert done.stdout == ""


@pytest.mark.parametrize("option", ["--epochs", "--seeds"])
def test_demo_refuses_to_run_nothing(option: str, tmp_path: Path) -> None:
    done = run("demo.py", option, "0", "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert f"{option} must be 1 or more, got 0" in done.stderr


def test_swap_one_line_reports_accuracy_and_sigma(tmp_path: Path) -> None:
    done = run("swap_one_line.py", "--epochs", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = dict(line.split(":") for line in done.stdout.splitlines())
    assert float(found["test accuracy"]) > 0.5
    assert all(float(found[f"largest sigma {when}"]) > 0 for when in ("before", "after"))
