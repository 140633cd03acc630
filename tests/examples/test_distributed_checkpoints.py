"""Checkpoints of the example on many ranks: they are whole, or known not to be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from tests.examples import gpt_ranks
from tests.examples.gpt_ranks import Damages
from tests.specopt.sharding.ranks import run, run_with_deaths


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is left of checkpoints after 1, 2 and 3 steps."""
    folder = tmp_path_factory.mktemp("kept")
    run(2, gpt_ranks.saved_three_times, folder, folder=tmp_path_factory.mktemp("ranks"))
    return folder


def test_the_newest_checkpoint_and_the_one_before_it_are_kept(kept: Path) -> None:
    assert sorted(path.name for path in kept.iterdir()) == ["step-00000002", "step-00000003"]


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


@pytest.fixture(scope="module")
def damages(kept: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Damages]:
    scratch, ranks = tmp_path_factory.mktemp("damaged"), tmp_path_factory.mktemp("ranks")
    newest, every = (damaged(kept, scratch / str(len(steps)), *steps) for steps in ((3,), (2, 3)))
    shutil.copytree(kept, scratch / "vanishing")
    (scratch / "fresh" / "saves").mkdir(parents=True)
    return run(2, gpt_ranks.damages, newest, every, scratch / "vanishing", kept, scratch / "fresh", folder=ranks)


def damaged(kept: Path, folder: Path, *steps: int) -> dict[str, Path]:
    """Copies of checkpoints by what is wrong with those of the given steps."""
    folders = {told: folder / str(i) for i, told in enumerate(DAMAGE)}
    for told, copy in folders.items():
        shutil.copytree(kept, copy)
        for step in steps:
            DAMAGE[told](copy / f"step-{step:08d}")
    return folders


@pytest.mark.parametrize("told", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning_of_rank_0(damages: list[Damages], told: str) -> None:
    (step, (warning,), _), second = (rank.beside[told] for rank in damages)
    assert step == 2 and second[:2] == (2, [])
    assert "step-00000003" in warning and told in warning


@pytest.mark.parametrize("told", DAMAGE)
def test_a_damaged_checkpoint_does_not_outlive_the_next(damages: list[Damages], told: str) -> None:
    assert [rank.beside[told][2] for rank in damages] == [["step-00000002"]] * 2


@pytest.mark.parametrize("told", DAMAGE)
def test_where_no_checkpoint_is_whole_there_is_an_error_and_nothing_is_taken_up(
    damages: list[Damages], told: str
) -> None:
    for rank in damages:
        message, is_as_it_was = rank.refused[told]
        assert is_as_it_was and "remove them to start anew" in message
        assert message.count(told) == 2


def test_a_file_that_vanishes_while_it_is_read_is_named_and_nothing_is_taken_up(damages: list[Damages]) -> None:
    for rank in damages:
        message, is_as_it_was = rank.vanished
        assert is_as_it_was and "__1_0.distcp" in message


def test_a_checkpoint_of_another_recipe_is_refused_by_what_differs(damages: list[Damages]) -> None:
    assert all("batch is 12 there and 6 here" in rank.other_recipe for rank in damages)


def test_a_checkpoint_of_another_text_is_refused_though_its_characters_are_the_same(damages: list[Damages]) -> None:
    for rank in damages:
        message, there, here = rank.other_text
        assert there != here and f"text is {there} there and {here} here" in message


def test_where_the_optimizer_refuses_a_state_the_weights_stay_the_same_bits_too(damages: list[Damages]) -> None:
    for rank in damages:
        message, is_as_it_was = rank.by_the_optimizer
        assert is_as_it_was and "block must be" in message


def test_a_checkpoint_that_not_all_ranks_see_is_an_error_on_all_of_them(damages: list[Damages]) -> None:
    for rank in damages:
        for step in (3, 4):
            told = rank.saves[0][f"disk of its own, {step}"]
            assert "has to be on a disk that all ranks see" in told
            assert ".metadata by rank 1" in told and "__1_0.distcp" in told


def test_a_save_that_one_rank_cannot_make_is_an_error_on_all_of_them(damages: list[Damages]) -> None:
    for rank in damages:
        errors = rank.saves[0]
        assert "cannot be written (rank 1: NotADirectoryError" in errors["no folder"]
        assert "rank 0 has failed: NotADirectoryError" in errors["no name"]


def test_a_save_that_fails_removes_no_checkpoint(damages: list[Damages]) -> None:
    assert [rank.saves[1] for rank in damages] == [["step-00000001", "step-00000002"]] * 2


@pytest.mark.parametrize(
    ("rank", "sync"),
    [
        pytest.param(1, 0, id="its part", marks=pytest.mark.full),
        pytest.param(0, 1, id="the metadata", marks=pytest.mark.full),
        pytest.param(0, 2, id="whole.json"),
        pytest.param(0, 3, id="the name of the whole", marks=pytest.mark.full),
    ],
)
def test_a_death_while_a_checkpoint_is_written_leaves_the_one_before(rank: int, sync: int, tmp_path: Path) -> None:
    """``sync``: how often the rank that dies has waited for the disk before."""
    folder, first, second = (tmp_path / name for name in ("out", "first", "second"))
    first.mkdir()
    second.mkdir()
    save, timeout = gpt_ranks.killed_in_a_save, timedelta(seconds=30)
    found = run_with_deaths(2, save, folder, rank, sync, folder=first, timeout=timeout)
    assert list(found) == [1 - rank] and all(found.values()), "nobody has heard of the death"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000004.part"]
    assert run(1, gpt_ranks.step_taken_up, folder, folder=second) == [2]
