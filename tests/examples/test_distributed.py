"""The example on many ranks: one training whatever the ranks, and checkpoints that outlive deaths and damage."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.examples import gpt_ranks
from tests.specopt.sharding.ranks import run, run_with_deaths

ROOT = Path(__file__).resolve().parents[2]
CLOSE = {"rtol": 1e-4, "atol": 0.0}
"""Between trainings of other ranks: caps make more of rounding from step to step."""


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By way what rank 0 has found."""
    return {way: run(2, gpt_ranks.trained, way, 6, folder=tmp_path_factory.mktemp(way))[0] for way in ("ddp", "fsdp2")}


def test_every_way_makes_the_same_losses(of_two_ranks: dict[str, Any], tmp_path: Path) -> None:
    found = {**of_two_ranks, "hsdp": run(4, gpt_ranks.trained, "hsdp", 6, folder=tmp_path)[0]}
    for way in found:
        for name in ("losses", "held out"):
            torch.testing.assert_close(found[way][name], found["ddp"][name], **CLOSE)
    assert found["ddp"]["losses"][-1] < 0.97 * found["ddp"]["losses"][0]


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_the_sigma_of_the_table_is_that_of_the_projections_and_near_the_cap(
    of_two_ranks: dict[str, Any], way: str
) -> None:
    found = of_two_ranks[way]
    assert found["sigma"] == pytest.approx(found["exact"], rel=1e-3)
    assert found["exact"] < 1.1 * gpt_ranks.RECIPE.cap


@pytest.fixture(scope="module")
def of_four_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A checkpoint of four ranks, with the weights there and the losses behind it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, run(4, gpt_ranks.saved, folder, "hsdp", 3, 3, folder=tmp_path_factory.mktemp("ranks"))[0]


@pytest.mark.parametrize(("world", "way"), [(1, "ddp"), (2, "fsdp2")])
def test_a_checkpoint_of_four_ranks_goes_on_the_same_on_fewer_and_otherwise(
    of_four_ranks: tuple[Path, Any], world: int, way: str, tmp_path: Path
) -> None:
    folder, (there, losses) = of_four_ranks
    for step, weights, after in run(world, gpt_ranks.resumed, folder, way, 3, folder=tmp_path):
        assert step == 3
        assert all(map(torch.equal, weights, there)), "loading has changed a weight"
        torch.testing.assert_close(after, losses, **CLOSE)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints of two ranks after 1 and 2 steps."""
    folder = tmp_path_factory.mktemp("kept")
    for steps in (1, 2):
        run(2, gpt_ranks.saved, folder, "fsdp2", steps, 0, folder=tmp_path_factory.mktemp("ranks"))
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "__1_0.distcp is missing": lambda folder: (folder / "__1_0.distcp").unlink(),
    "__0_0.distcp is not what was written": lambda folder: flip(folder / "__0_0.distcp"),
    ".metadata is not what was written": lambda folder: (folder / ".metadata").write_bytes(b""),
    "whole.json cannot be read": lambda folder: (folder / "whole.json").write_text("{"),
}


def damaged(kept: Path, folder: Path, *steps: int) -> dict[str, Path]:
    """Copies of checkpoints by what is wrong with those of the given steps."""
    folders = {told: folder / str(i) for i, told in enumerate(DAMAGE)}
    for told, copy in folders.items():
        shutil.copytree(kept, copy)
        for step in steps:
            DAMAGE[told](copy / f"step-{step:08d}")
    return folders


def all_of(function: str, folders: dict[str, Path]) -> dict[str, Any]:
    return {told: getattr(gpt_ranks, function)(folder) for told, folder in folders.items()}


def test_a_damaged_checkpoint_is_passed_over_with_a_warning_of_rank_0(kept: Path, tmp_path: Path) -> None:
    first, second = run(2, all_of, "resumed_beside_damage", damaged(kept, tmp_path, 2), folder=tmp_path)
    for told in DAMAGE:
        assert (first[told][0], second[told]) == (1, (1, []))
        (warning,) = first[told][1]
        assert "step-00000002" in warning and told in warning


def test_where_no_checkpoint_is_whole_there_is_an_error_and_nothing_is_taken_up(kept: Path, tmp_path: Path) -> None:
    for rank in run(2, all_of, "refused", damaged(kept, tmp_path, 1, 2), folder=tmp_path):
        for told in DAMAGE:
            message, is_as_it_was = rank[told]
            assert is_as_it_was and "remove them to start anew" in message
            assert message.count(told) == 2


def test_a_file_that_vanishes_while_it_is_read_is_named_and_nothing_is_taken_up(kept: Path, tmp_path: Path) -> None:
    shutil.copytree(kept, tmp_path / "copy")
    for message, is_as_it_was in run(2, gpt_ranks.read_failing_half_way, tmp_path / "copy", folder=tmp_path):
        assert is_as_it_was and "__1_0.distcp" in message


def test_a_checkpoint_of_another_recipe_is_refused_by_what_differs(kept: Path, tmp_path: Path) -> None:
    for message in run(2, gpt_ranks.refused_for_another_recipe, kept, folder=tmp_path):
        assert "batch is 12 there and 6 here" in message


@pytest.mark.parametrize(
    ("rank", "sync"), [(1, 0), (0, 2), (0, 3)], ids=["its part", "whole.json", "the name of the whole"]
)
def test_a_death_while_a_checkpoint_is_written_leaves_the_one_before(rank: int, sync: int, tmp_path: Path) -> None:
    folder, first, second = (tmp_path / name for name in ("out", "first", "second"))
    first.mkdir()
    second.mkdir()
    save, timeout = gpt_ranks.killed_in_a_save, timedelta(seconds=15)
    found = run_with_deaths(2, save, folder, rank, sync, folder=first, timeout=timeout)
    assert list(found) == [1 - rank] and all(found.values()), "nobody has heard of the death"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000004.part"]
    for step, _, _ in run(2, gpt_ranks.resumed, folder, "fsdp2", 0, folder=second):
        assert step == 2


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for steps in (1, 2, 3):
        (tmp_path / str(steps)).mkdir()
        run(1, gpt_ranks.saved, tmp_path / "out", "ddp", steps, 0, folder=tmp_path / str(steps))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["step-00000002", "step-00000003"]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


SMALL = ("--width", "68", "--layers", "1", "--context", "16", "--batch", "12", "--every", "4", "--cap", "1.05")


def test_torchrun_goes_on_by_itself_after_a_death_and_ends_as_without_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", str(ROOT / "tests" / "examples" / "mortal_train.py"), "--parallel", "fsdp2"]
    command += [*SMALL, "--steps", "10", "--out", str(tmp_path / "out"), "--timeout", "60"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Goes on from step 4" in done.stdout
    recipe = gpt_ranks.recipe_of(json.loads((tmp_path / "out" / "step-00000010" / "whole.json").read_text())["recipe"])
    (tmp_path / "ranks").mkdir()
    losses = run(2, gpt_ranks.undisturbed, tmp_path / "undisturbed", recipe, 10, folder=tmp_path / "ranks")[0]
    assert done.stdout.splitlines()[-1].split()[:2] == ["10", f"{losses[-1]:.4f}"]
    mine, theirs = (whole_of(tmp_path / name / "step-00000010") for name in ("out", "undisturbed"))
    assert mine.keys() == theirs.keys() and all(map(torch.equal, mine.values(), theirs.values()))


def whole_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by name."""
    file = checkpoint.with_suffix(".pt")
    dcp_to_torch_save(checkpoint, file)
    return dict(flat(torch.load(file, weights_only=False), ""))


def flat(tree: Any, name: str) -> Any:
    if isinstance(tree, torch.Tensor):
        yield name, tree
    elif isinstance(tree, dict):
        for key, branch in tree.items():
            yield from flat(branch, f"{name}.{key}")


def test_without_torchrun_one_process_trains(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "examples" / "train_distributed.py"),
        *SMALL,
        "--steps",
        "8",
        "--out",
        "made/here",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, *lines = (re.split(r"  +", line.strip()) for line in done.stdout.splitlines())
    assert head == ["step", "loss", "held-out loss", "largest sigma", "cap", "ms a step"]
    assert [line[0] for line in lines] == ["4", "8"]
    assert float(lines[1][1]) < float(lines[0][1]) and float(lines[1][3]) < 1.2


@pytest.mark.parametrize(
    ("options", "world", "told"),
    [
        ("--parallel hsdp", "3", "--parallel hsdp takes an even number of ranks"),
        ("--parallel hsdp", "1", "replicas of the same shards, got 1: torchrun --nproc-per-node"),
        ("--batch 10", "4", "--batch must be a multiple of the number of ranks, 4, got 10"),
        ("--width 70", "1", "--width must be a multiple of 4, got 70"),
        ("--steps 0", "1", "--steps must be 1 or more, got 0"),
        ("--cap nan", "1", "--cap must be positive and finite, got nan"),
        ("--context 100000", "1", "context must be at most"),
        ("--out file/below", "1", "--out file/below: cannot write"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_ranks_wait_for_one_another(
    options: str, world: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setattr(sys, "argv", ["train_distributed.py", *options.split()])
    with pytest.raises(SystemExit) as stopped:
        gpt_ranks.arguments()
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


def test_batches_are_a_function_of_seed_and_step() -> None:
    text = gpt_ranks.time_zones(16)
    batches = {(seed, step): text.batch(seed, step, 12) for seed in (0, 1) for step in (0, 1)}
    assert all(torch.equal(batch, text.batch(*key, 12)) for key, batch in batches.items())
    assert len({batch.numpy().tobytes() for batch in batches.values()}) == 4


def test_no_window_is_both_trained_on_and_held_out() -> None:
    text = gpt_ranks.time_zones(16)
    assert text.train.shape[1] == text.held_out.shape[1] == 17
    assert len(text.held_out) == (len(text.train) + len(text.held_out)) // 10
    start = "".join(text.characters[token] for token in text.train[0])
    assert start == "# version " + start[10:]


def test_ranks_meet_in_a_store_that_holds_the_names_of_the_dead() -> None:
    store = HashStore()
    for start, world in enumerate((3, 3, 2)):
        with ThreadPoolExecutor(world) as pool:
            met = []
            for rank in reversed(range(world)):  # who comes first finds the names of the start before
                met.append(pool.submit(gpt_ranks.meet, store, rank, world, timedelta(seconds=20)))
                time.sleep(0.1)
            stores = [each.result() for each in met]
        assert not any(each.check(["address"]) for each in stores)
        stores[0].set("address", str(start))
        assert {each.get("address") for each in stores} == {str(start).encode()}


def test_a_rank_that_waits_in_vain_for_the_others_says_so() -> None:
    with pytest.raises(TimeoutError, match=r"rank 1 of 2 has waited for the others for 0\.1 s"):
        gpt_ranks.meet(HashStore(), 1, 2, timedelta(seconds=0.1))
