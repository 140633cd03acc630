"""The example on many ranks: one training, whatever the ranks and the way, restarted or not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.examples import gpt_ranks
from tests.examples.gpt_ranks import Found
from tests.specopt.sharding.ranks import run

ROOT = Path(__file__).resolve().parents[2]
CLOSE = {"rtol": 1e-4, "atol": 0.0}
"""Between trainings of other ranks: caps make more of rounding from step to step."""


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Found]:
    """A checkpoint of four ranks, and their training."""
    folder = tmp_path_factory.mktemp("checkpoints")
    found: Found = run(4, gpt_ranks.trained, "hsdp", folder, folder=tmp_path_factory.mktemp("ranks"))[0]
    return folder, found


@pytest.fixture(scope="module")
def of_two(of_four: tuple[Path, Found], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    folder, ranks = tmp_path_factory.mktemp("checkpoints"), tmp_path_factory.mktemp("ranks")
    first, second = run(2, gpt_ranks.on_two_ranks, folder, of_four[0], folder=ranks)
    assert all(first[name].losses == second[name].losses for name in first)
    return dict(first)


def test_every_way_makes_the_same_losses(of_four: tuple[Path, Found], of_two: dict[str, Found]) -> None:
    reference = of_two["ddp"]
    assert reference.losses[-1] < 0.97 * reference.losses[0]
    for found in (of_two["fsdp2"], of_two["hsdp"], of_four[1]):
        torch.testing.assert_close(found.losses, reference.losses, **CLOSE)
        assert found.held_out == pytest.approx(reference.held_out, rel=CLOSE["rtol"])


def test_fewer_held_out_windows_than_ranks_have_the_loss_that_they_have_alone(
    of_four: tuple[Path, Found], of_two: dict[str, Found]
) -> None:
    for found in (*(of_two[way] for way in gpt_ranks.WAYS), of_four[1]):
        first, second, both = found.few
        assert both == pytest.approx((first + second) / 2, rel=1e-5)
        assert found.few == pytest.approx(of_two["ddp"].few, rel=CLOSE["rtol"])


def test_the_sigma_of_the_table_is_that_of_the_projections_and_near_the_cap(
    of_four: tuple[Path, Found], of_two: dict[str, Found]
) -> None:
    for found in (of_two["ddp"], of_two["fsdp2"], of_four[1]):
        assert found.sigma == pytest.approx(found.exact, rel=1e-3)
        assert found.exact < 1.1 * gpt_ranks.RECIPE.cap


@pytest.mark.parametrize("world", [1, 2])
def test_a_checkpoint_of_four_ranks_goes_on_the_same_on_fewer_and_otherwise(
    of_four: tuple[Path, Found], of_two: dict[str, Found], world: int, tmp_path: Path
) -> None:
    folder, whole = of_four
    found = of_two["resumed"] if world == 2 else run(1, gpt_ranks.resumed, folder, "ddp", folder=tmp_path)[0]
    assert all(map(torch.equal, found.half, whole.half)), "loading has changed a weight"
    torch.testing.assert_close(found.losses, whole.losses[gpt_ranks.HALF :], **CLOSE)
    assert found.held_out == pytest.approx(whole.held_out, rel=CLOSE["rtol"])


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


def test_without_torchrun_one_process_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_distributed.py", *SMALL, "--steps", "8", "--out", "made/here"])
    gpt_ranks.main()
    out = capfd.readouterr().out
    head, *lines = (re.split(r"  +", line.strip()) for line in out.splitlines())
    assert head == ["step", "loss", "held-out loss", "largest sigma", "cap", "ms a step"]
    assert [line[0] for line in lines] == ["4", "8"]
    assert float(lines[1][1]) < float(lines[0][1]) and float(lines[1][3]) < 1.2
    mine = tmp_path / "made" / "here" / "photos.part"
    mine.mkdir()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--steps", "12"])
    gpt_ranks.main()
    assert mine.exists() and "Goes on from step 8" in capfd.readouterr().out
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--lr", "0.5"])
    with pytest.raises(SystemExit) as stopped:
        gpt_ranks.main()
    told = capfd.readouterr().err
    assert stopped.value.code == 2 and told.startswith("train_distributed.py: error: ") and len(told.splitlines()) == 1
    assert "lr" in told


@pytest.mark.parametrize(
    ("options", "world", "told"),
    [
        ("--parallel hsdp", "3", "--parallel hsdp takes a multiple of 2 ranks, 2 replicas"),
        ("--parallel hsdp", "1", "replicas of the same shards, got 1: torchrun --nproc-per-node"),
        ("--batch 10", "4", "--batch must be a multiple of the number of ranks, 4, got 10"),
        ("--width 70", "1", "--width must be a multiple of 4, got 70"),
        ("--steps 0", "1", "--steps must be 1 or more, got 0"),
        ("--cap nan", "1", "--cap must be positive and finite, got nan"),
        ("--seed 8589934592", "1", "--seed must be from 0 to 2**33 - 1, got 8589934592"),
        ("--timeout 1e300", "1", "--timeout must be from 1 to 1e6 seconds, got 1e+300"),
        ("--timeout 1e-9", "1", "--timeout must be from 1 to 1e6 seconds, got 1e-09"),
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


@pytest.mark.parametrize(
    ("machines", "ranks_here", "mesh"),
    [
        ("1", [4], (2, 2)),
        ("3", [3, 3, 3], (3, 3)),
        ("2", [3, 1], (2, 2)),
    ],
)
def test_every_rank_makes_the_same_mesh_of_replicas_one_a_machine(
    machines: str, ranks_here: list[int], mesh: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    parallel, world = gpt_ranks.parallel, sum(ranks_here)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)
    monkeypatch.setattr(parallel, "init_device_mesh", lambda _, shape, **__: shape)
    monkeypatch.setenv("GROUP_WORLD_SIZE", machines)
    for here in ranks_here:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
        parallel.check("hsdp", world, world)
        assert parallel._mesh("hsdp", torch.device("cpu")) == mesh


def test_a_group_of_gpus_is_not_bound_to_one_so_that_sums_have_communicators_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Any] = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *given, **named: made.append((given, named)))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with gpt_ranks.parallel.process_group(torch.device("cuda", 0), timeout=1):
        (((backend,), named),) = made
    assert backend == "nccl" and named.get("device_id") is None


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
