"""The choice of a setting: by held-out training images alone."""

from __future__ import annotations

import importlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from papers.candidates import candidates
from papers.data import load
from papers.recipe import SCALES
from papers.recipes import find
from papers.runs.training import Training
from papers.tables.page import search_section

RECIPE = find("digits/mlp/adamw")


def rows(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_validation_run_sees_no_test_image_and_trains_on_none_it_is_judged_by() -> None:
    digits = load("digits")
    for seed in (0, 1):
        images = Training(replace(RECIPE, validation=0.1), digits, [seed]).members[0].images
        assert len(images.test_x) == 120
        train, test = rows(images.train_x), rows(images.test_x)
        assert not test & train
        assert not (train | test) & rows(digits.test_x)


def test_every_seed_is_judged_by_the_same_images() -> None:
    digits = load("digits")
    first, second = (Training(replace(RECIPE, validation=0.1), digits, [seed]).members[0].images for seed in (0, 1))
    assert rows(first.test_x) == rows(second.test_x)


def test_candidates_differ_in_their_method_alone_and_have_a_name_each() -> None:
    found = list(candidates(RECIPE))
    assert found[0].method == RECIPE.method
    assert len({one.name for one in found}) == len(found) > 10
    assert len({repr(replace(one, name="", method=RECIPE.method)) for one in found}) == 1
    assert all(one.validation > 0 for one in found)


def test_every_candidate_trains() -> None:
    digits = load("digits")
    for one in candidates(RECIPE.scaled(SCALES["tiny"])):
        training = Training(replace(one, epochs=1), digits, [0])
        training.run_epoch()
        assert training.logs[0].epochs[-1]["test_loss"] < 10


def test_search_writes_the_best_and_the_best_within_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "found" / "search.json"
    options = ["--recipe", "digits/mlp/adamw", "--scale", "tiny", "--epochs", "1", "--only", "snr-*", "--seeds", "2"]
    options += ["--out", str(tmp_path / "runs"), "--record", str(record), "--most-time", "1e-9"]
    monkeypatch.setattr(sys, "argv", ["search.py", *options])
    importlib.import_module("search").main()
    found = json.loads(record.read_text())
    assert [row["method"] for row in found["rows"]] == ["adamw", "snr-0.01", "snr-0.1"]
    assert all(len(row["seeds"]) == 2 for row in found["rows"])
    assert found["best"] == max(found["rows"][1:], key=lambda row: row["validation_accuracy"])["method"]
    assert found["best_within_time"] is None
    section = search_section(record)
    assert section.count("\n| snr-") == 2
    assert f"Best: `{found['best']}`; within 1e-09 of the time: none." in section
    assert f"best: {found['best']}; within 1e-09 of the time: None" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--only", "snr-*", "cup-*"), "--only must match one of snr-0.01, .*, got 'cup-*'"),
        *[
            (("--recipe", name), f"--recipe must be the row's method without control or penalty, got '{name}'")
            for name in ("digits/mlp/set-gain-1", "normscale/mlp-5x2000/spectral", "gradreg/c6/spect-reg")
        ],
        (("--most-time", "0"), "--most-time must be a positive finite number, got 0.0"),
        (("--most-time", "nan"), "--most-time must be a positive finite number, got nan"),
        (("--record", "{folder}/file/search.json"), "cannot write 1 MiB there"),
        (("--record", "{folder}"), "--record must be a file, and .* is a folder"),
    ],
)
def test_wrong_argument_fails_before_any_training(
    options: tuple[str, ...],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    asked = [option.format(folder=tmp_path) for option in options]
    monkeypatch.setattr(sys, "argv", ["search.py", "--recipe", "digits/mlp/adamw", "--out", str(tmp_path), *asked])
    search = importlib.import_module("search")
    monkeypatch.setattr(search, "trained", lambda _: pytest.fail("it trains"))
    with pytest.raises(SystemExit) as stopped:
        search.main()
    assert stopped.value.code == 2
    assert re.search(told.replace("*'", r"\*'"), capsys.readouterr().err.replace("\n", " "))


def test_penalties_leave_shortcuts_alone_and_all_other_candidates_the_last_layer_too() -> None:
    for one in list(candidates(RECIPE))[1:]:
        assert one.method.spared == (("*downsample*",) if one.method.snr_lambda else ("*downsample*", "head*"))


def test_page_refuses_a_file_that_no_search_wrote(tmp_path: Path) -> None:
    assert search_section(tmp_path / "none.json") == "Not run."
    (tmp_path / "other.json").write_text('{"rows": [{"method": "a"}]}')
    with pytest.raises(ValueError, match=r"other\.json must hold what examples/search\.py writes"):
        search_section(tmp_path / "other.json")
