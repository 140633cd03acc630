"""Errors in a step over shards: which of them cut it off, what is told then, and the way back."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from specopt.sharding.unfinished import Unfinished
from tests.specopt.sharding.cases import KINDS
from tests.specopt.sharding.ranks import digest, run, state_tensors
from tests.specopt.sharding.test_late_sums import train, trained

Told = dict[str, Any]


class Closed:
    """A sum whose process group has lost a rank."""

    def wait(self) -> None:
        raise RuntimeError("Connection closed by peer")


def bits(optimizer: Any) -> str:
    optimizer.state_dict()  # takes up what is on its way
    return digest(state_tensors(optimizer))


def error_of(attempt: Callable[..., Any], *args: Any) -> str:
    try:
        attempt(*args)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def without_its_late_sum() -> Any:
    optimizer = trained()
    due: Any = Unfinished.of(optimizer.__dict__["_workspace"]).due
    due.sums.packs[0].work = Closed()
    return optimizer


def late() -> Told:
    """Of an optimizer whose late sum fails: what it tells, and whether a state that is loaded brings it back."""
    told = without_its_late_sum()
    found: Told = {"first": error_of(told.state_dict), "then": error_of(told.state_dict)}
    before = copy.deepcopy(trained().state_dict())
    healed = without_its_late_sum()
    found["loading"] = error_of(healed.load_state_dict, before)
    found["saving"], found["training"] = error_of(healed.state_dict), error_of(train, healed)
    found["refused"] = error_of((refused := without_its_late_sum()).load_state_dict, {**before, "param_groups": []})
    found["after a refusal"] = error_of(refused.state_dict)
    return found


def base_fails(kind: str, writes: bool) -> Told:
    """Of an optimizer whose base fails at the start of its step, or once it has written to a weight."""
    optimizer, undisturbed = trained(KINDS[kind]), trained(KINDS[kind])
    before = bits(optimizer)

    def fail() -> None:
        if writes:
            optimizer.param_groups[0]["params"][1].mul_(2)
        raise ValueError("betas are odd")

    calls = []
    with mock.patch.object(optimizer, "_base_step", fail):
        found: Told = {"first": error_of(train, optimizer)}
    found["then"] = error_of(optimizer.step, lambda: calls.append(1)) if writes or kind == "snr" else ""
    found["closures"], found["saving"] = len(calls), error_of(optimizer.state_dict)
    if not found["saving"]:
        found["as before"] = bits(optimizer) == before
        train(optimizer)
        train(undisturbed)
        found["goes on"] = bits(optimizer) == bits(undisturbed)
    return found


def everything() -> dict[str, Told]:
    warnings.simplefilter("ignore")
    return {
        "late": late(),
        "at the start": base_fails("set", False),
        "once it has written": base_fails("set", True),
        "behind a sum": base_fails("snr", False),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Told]]:
    return run(2, everything, folder=Path(tmp_path_factory.mktemp("cut")))


def test_a_late_sum_that_fails_is_told_as_what_it_is(found: list[dict[str, Told]]) -> None:
    for told in (rank["late"] for rank in found):
        assert told["first"] == "Connection closed by peer"
        assert told["then"].startswith("the late sum of the last step was cut off") and told["first"] in told["then"]
        assert "those of no step" not in told["then"]


def test_loading_a_state_heals_a_late_sum_that_fails_in_the_first_call(found: list[dict[str, Told]]) -> None:
    for told in (rank["late"] for rank in found):
        assert (told["loading"], told["saving"], told["training"]) == ("", "", "")


def test_a_state_that_is_refused_heals_nothing(found: list[dict[str, Told]]) -> None:
    for told in (rank["late"] for rank in found):
        assert "Connection" not in told["refused"] != "" and "cut off" in told["after a refusal"]


def test_an_error_before_anything_is_written_cuts_nothing_off(found: list[dict[str, Told]]) -> None:
    for told in (rank["at the start"] for rank in found):
        assert told["first"] == "betas are odd" and told["saving"] == ""
        assert told["as before"] and told["goes on"]


@pytest.mark.parametrize("where", ["once it has written", "behind a sum"])
def test_a_step_that_is_cut_off_keeps_its_reason_and_runs_no_closure_again(
    found: list[dict[str, Told]], where: str
) -> None:
    for told in (rank[where] for rank in found):
        assert told["first"] == "betas are odd"
        assert "those of no step" in told["saving"] and "ValueError: betas are odd" in told["saving"]
        assert told["then"] == told["saving"] and told["closures"] == 0
