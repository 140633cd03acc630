"""Steps of cut kernels that hold numbers that are none, are skipped, or are cut off."""

from __future__ import annotations

import copy
import os
import signal
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard

from specopt.sharding import exchange
from specopt.tracker.common import STATS, Stat
from tests.specopt.sharding.convolutions import Pair, made, mesh, step
from tests.specopt.sharding.ranks import all_reduces, digest, run, run_with_deaths, state_tensors
from tests.specopt.sharding.skipping import bits_of, skipping
from tests.specopt.sharding.test_cut_off import error_of
from tests.specopt.sharding.twins import wholes

KINDS = ("penalty", "cap", "decay")


def with_a_nan(kind: str) -> tuple[list[str], list[int], list[float]]:
    pair = Pair(kind, mesh(), [Shard(0)])
    with torch.no_grad():
        for params in (pair.sharded, pair.plain):
            first = params[0].to_local() if isinstance(params[0], DTensor) else params[0]
            if params is pair.plain or dist.get_rank() == 0:
                first[0, 0, 0, 0] = torch.nan
    for number in range(2):
        pair.step(number)
    nans = [int(weight.isnan().sum()) for weight in wholes(pair.sharded)]
    return pair.differences(), nans, [float(pair.ours.state[param][STATS][Stat.VALID]) for param in pair.sharded]


def skipped(kind: str, seen: bool) -> bool:
    """Whether weights and state are the same bits after a step that a scaler skips, the host or the device alone
    knowing that it does."""
    params, optimizer = made(kind)
    step(params, optimizer)
    before = bits_of(optimizer)
    with skipping(optimizer, seen=seen):
        step(params, optimizer)
    return before == bits_of(optimizer)


def base_fails(kind: str) -> dict[str, Any]:
    """At the start of the base's step."""
    params, optimizer = made(kind)
    other, undisturbed = made(kind)
    step(params, optimizer)
    step(other, undisturbed)
    before = digest(state_tensors(optimizer))
    with mock.patch.object(optimizer, "_base_step", side_effect=ValueError("betas are odd")):
        found: dict[str, Any] = {"first": error_of(step, params, optimizer)}
    found["saving"] = error_of(optimizer.state_dict)
    if not found["saving"]:
        found["as before"] = digest(state_tensors(optimizer)) == before
        step(params, optimizer)
        step(other, undisturbed)
        found["goes on"] = digest(state_tensors(optimizer)) == digest(state_tensors(undisturbed))
    return found


def gathering_fails() -> str:
    """Behind the base update."""
    params, optimizer = made("cap")
    step(params, optimizer)
    with mock.patch.object(exchange._Pack, "wait", side_effect=RuntimeError("Connection closed by peer")):
        error_of(step, params, optimizer)
    return error_of(optimizer.state_dict)


def killed() -> list[str]:
    """What a survivor is told by the step in which rank 1 dies before the sum behind the update, by state_dict() then,
    and once a state is loaded."""
    warnings.simplefilter("ignore")
    params, optimizer = made("penalty and cap")
    step(params, optimizer)
    before = copy.deepcopy(optimizer.state_dict())

    def die(call: int, begun: bool) -> None:
        if (call, begun) == (1, False) and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with all_reduces(die):
        told = [error_of(step, params, optimizer), error_of(optimizer.state_dict)]
    optimizer.load_state_dict(before)
    return [*told, error_of(optimizer.state_dict)]


def everything() -> dict[str, Any]:
    warnings.simplefilter("ignore")
    return {
        "nan": {kind: with_a_nan(kind) for kind in KINDS},
        "skipped": {kind: (skipped(kind, seen=True), skipped(kind, seen=False)) for kind in KINDS},
        "base fails": {kind: base_fails(kind) for kind in KINDS},
        "gathering fails": gathering_fails(),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(2, everything, folder=tmp_path_factory.mktemp("failures"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_on_one_rank_is_not_spread_and_is_seen_on_all(found: list[dict[str, Any]], kind: str) -> None:
    for rank in found:
        assert rank["nan"][kind] == ([], [1, 0, 0, 0, 0], [0.0, 1.0, 1.0, 1.0, 1.0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_step_leaves_kernels_and_state_as_they_were(found: list[dict[str, Any]], kind: str) -> None:
    assert all(rank["skipped"][kind] == (True, True) for rank in found)


@pytest.mark.parametrize("kind", ["cap", "decay"])
def test_an_error_before_anything_is_sent_or_written_cuts_nothing_off(found: list[dict[str, Any]], kind: str) -> None:
    for rank in found:
        assert rank["base fails"][kind] == {"first": "betas are odd", "saving": "", "as before": True, "goes on": True}


def test_an_error_behind_the_sum_of_a_penalty_cuts_the_step_off(found: list[dict[str, Any]]) -> None:
    for rank in found:
        told = rank["base fails"]["penalty"]
        assert told["first"] == "betas are odd"
        assert "those of no step" in told["saving"] and "ValueError: betas are odd" in told["saving"]


def test_a_sum_that_fails_behind_the_update_cuts_the_step_off(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert "those of no step" in rank["gathering fails"] and "Connection closed" in rank["gathering fails"]


def test_a_rank_that_dies_before_the_sum_behind_the_update_leaves_nothing_to_be_saved(tmp_path: Path) -> None:
    survivors = run_with_deaths(2, killed, folder=tmp_path, timeout=timedelta(seconds=30))
    first, then, healed = survivors[0]
    assert first and "those of no step" in then and first in then and healed == ""
