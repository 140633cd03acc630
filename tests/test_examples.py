"""The examples run as a user runs them, with tiny settings."""

from __future__ import annotations

import gzip
import importlib
import json
import math
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.examples.formats import write_mnist

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


@pytest.mark.full
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


@pytest.mark.parametrize("option", ["--epochs", pytest.param("--seeds", marks=pytest.mark.full)])
def test_demo_refuses_to_run_nothing(option: str, tmp_path: Path) -> None:
    done = run("demo.py", option, "0", "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert f"{option} must be 1 or more, got 0" in done.stderr


def test_swap_one_line_reports_accuracy_and_sigma(tmp_path: Path) -> None:
    done = run("swap_one_line.py", "--epochs", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before, *after = done.stdout.splitlines()
    assert float(before.removeprefix("largest sigma before training: ")) > 0
    told = [re.fullmatch(r"(\w+) +largest sigma (\S+), test accuracy (\S+)", line) for line in after]
    sigmas = {line[1]: float(line[2]) for line in told if line}
    assert sigmas["SNRSGD"] < sigmas["SGD"] and all(line and float(line[3]) > 0.5 for line in told)


def test_swap_one_line_refuses_to_train_nothing(tmp_path: Path) -> None:
    done = run("swap_one_line.py", "--epochs", "0", cwd=tmp_path)
    assert done.returncode == 2 and "--epochs must be 1 or more, got 0" in done.stderr


FIGURES = {
    *("none", "penalty", "decay", "set", "rescale", "frobenius", "cap-1", "cap-16", "cap-full", "penalty-and-cap"),
    *("conv-matrix", "conv-operator"),
}


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Standard output of a guide of three steps, and the folder it wrote to."""
    folder = tmp_path_factory.mktemp("guide")
    done = run("guide.py", "--steps", "3", "--width", "80", "--out", "made/here", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, folder / "made/here"


def guide_results(folder: Path) -> dict[str, dict[str, Any]]:
    return {result["rule"]: result for result in json.loads((folder / "guide.json").read_text())["results"]}


def test_guide_writes_a_figure_for_each_rule(guide: tuple[str, Path]) -> None:
    figures = {file.stem: file.read_bytes() for file in guide[1].glob("*.png")}
    assert figures.keys() == FIGURES
    assert all(figure.startswith(b"\x89PNG") for figure in figures.values())


def test_guide_prints_and_writes_a_line_for_each_rule_and_base(guide: tuple[str, Path]) -> None:
    table = (guide[1] / "table.md").read_text()
    assert table in guide[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(lines) == len(FIGURES) + 2  # SGD is in AdamW's figure, and AdamW of the convolution in that of its caps
    assert [line.split("|")[1].strip() for line in lines] == list(guide_results(guide[1]))


def test_guide_results_are_finite_and_of_bases_one(guide: tuple[str, Path]) -> None:
    results = guide_results(guide[1])
    assert all(math.isfinite(number) for number in numbers(list(results.values())))
    assert all(results[base]["over_base"] == 1 for base in ("AdamW", "SGD", "AdamW (conv)"))


def test_guide_starts_every_rule_from_the_same_spectrum_at_its_target(guide: tuple[str, Path]) -> None:
    starts = [result["spectrum_before"] for result in guide_results(guide[1]).values()]
    assert all(start == starts[0] for start in starts[:11])
    assert all(abs(sigma - 1) < 1e-5 for sigma in starts[0])
    assert starts[11] == starts[12] == starts[13]


def test_guide_measures_caps_that_hold(guide: tuple[str, Path]) -> None:
    results = guide_results(guide[1])
    assert results['cap, rank "full"']["sigma_1"] < 1 + 1e-5
    assert results["cap of the operator"]["sigma_1"] < 1 + 1e-3
    assert results["cap, rank 16"]["sigma_1"] < results["cap, rank 1"]["sigma_1"] < results["AdamW"]["sigma_1"]


def test_guide_spectrum_of_a_circular_convolution_is_that_of_its_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    spectrum = importlib.import_module("guide_training").spectrum
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular", bias=False).double()
    basis = torch.eye(3 * 25, dtype=torch.float64).view(-1, 3, 5, 5)
    dense = conv(basis).flatten(1).detach()
    torch.testing.assert_close(spectrum(conv, 5), torch.linalg.svdvals(dense))


@pytest.mark.full
def test_guide_reads_mnist_in_its_publishers_files(tmp_path: Path) -> None:
    write_mnist(tmp_path / "MNIST" / "raw")
    options = ("--data-dir", tmp_path, "--out", tmp_path / "out", "--steps", "1", "--width", "16")
    done = run("guide.py", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\nMNIST, width 16, 1 steps" in done.stdout


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--steps", "0", "--steps must be 1 or more, got 0"),
        ("--width", "15", "--width must be 16 or more, got 15"),
        ("--data-dir", "nowhere", "cannot read nowhere/MNIST/raw/train-images-idx3-ubyte.gz (No such file"),
        ("--out", "file/below", "--out file/below: cannot write there"),
    ],
)
def test_guide_refuses_what_makes_no_sense_before_training(option: str, value: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("guide.py", option, value, cwd=tmp_path)
    assert done.returncode == 2
    assert told in done.stderr
    assert "step/s" not in done.stderr
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"no gzip", "Not a gzipped file"),
        (gzip.compress(b"0" * 99)[:-12], "cannot read"),
        (gzip.compress(struct.pack(">BBBB3I", 0, 0, 8, 3, 40, 28, 28)), "has 16 bytes unpacked, must have 31376"),
        (gzip.compress(b""), "must be idx of unsigned bytes with 3 dimensions"),
        (gzip.compress(struct.pack(">BBBB3I", 0, 0, 8, 3, 1, 2, 1) + b"xx"), "must hold N x 28 x 28 bytes"),
    ],
    ids=["no-gzip", "cut-gzip", "cut", "nothing", "small"],  # gzip's own bytes hold the time
)
def test_guide_refuses_broken_data_by_name(
    content: bytes, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    load = importlib.import_module("guide_data").load
    raw = write_mnist(tmp_path / "MNIST" / "raw")
    assert load(tmp_path).train_x.shape == (40, 1, 28, 28)
    (raw / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(raw))) as found:
        load(tmp_path)
    assert told in str(found.value)
