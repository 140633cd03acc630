"""A rank dies in a step: the others fail, and none of them has a state to save that is not of a whole step."""

from __future__ import annotations

import copy
import os
import signal
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import specopt
from tests.specopt.sharding.ranks import all_reduces, digest, run_with_deaths, state_tensors

TIMEOUT = timedelta(seconds=30)
STEPS = 3
"""Before the one in which a rank dies."""
FEW: dict[str, Any] = {"block": 8, "max_passes": 4}
KINDS: dict[str, Callable[[Any], Any]] = {
    "snr": lambda groups: specopt.SNRSGD(groups, lr=0.05, momentum=0.9, snr_lambda=0.05, **FEW),
    "set": lambda groups: specopt.NormScaleAdamW(groups, lr=2e-3, **FEW),
}
PLACES: dict[str, Callable[[int], tuple[int, bool]]] = {
    "before the first sum": lambda sums: (0, False),
    "before the second sum": lambda sums: (1, False),
    "before the last sum": lambda sums: (sums - 1, False),
    "with the last sum on its way": lambda sums: (sums - 1, True),
}
"""Of so many sums in a step, the one at which a rank dies, and whether it has begun it."""


class Found(NamedTuple):
    """Of a survivor."""

    raised: list[str]
    """By the step, and by the first and the second call of state_dict()."""
    seconds: float
    """Until the last of these."""
    whole: bool
    """Whether what state_dict() returned has the bits that the step leaves where nobody dies; True where it raised."""
    recovered: bool
    """Whether the state of the step before, loaded, is there again."""


class Trained:
    """A sharded model after a few steps."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(30, 37), nn.Tanh(), nn.Linear(37, 22), nn.Tanh(), nn.Linear(22, 3))
        fully_shard(self.model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        self.optimizer = KINDS[kind](specopt.param_groups(self.model))
        for step in range(STEPS):
            self.backward(step)
            self.optimizer.step()

    def backward(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        inputs, labels = torch.randn(8, 30, generator=generator), torch.randint(3, (8,), generator=generator)
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(inputs), labels).backward()

    def digest(self) -> str:
        self.optimizer.state_dict()  # takes up what is on its way
        return digest(state_tensors(self.optimizer))


def killed_in_a_step(kind: str, place: str) -> Found:
    warnings.simplefilter("ignore")
    sums = 0

    def count(call: int, begun: bool) -> None:
        nonlocal sums
        sums = call + 1

    undisturbed = Trained(kind)
    undisturbed.backward(STEPS)
    with all_reduces(count):
        undisturbed.optimizer.step()
    expected, chosen = undisturbed.digest(), PLACES[place](sums)
    assert sums >= 2, "a step of one sum has no places to tell apart"

    def die(call: int, begun: bool) -> None:
        if (call, begun) == chosen:
            os.kill(os.getpid(), signal.SIGKILL)

    mortal = Trained(kind)
    before = copy.deepcopy(mortal.optimizer.state_dict())
    mortal.backward(STEPS)
    start = time.monotonic()
    with all_reduces(die if dist.get_rank() == 1 else lambda call, begun: None):
        attempts = [mortal.optimizer.step, mortal.optimizer.state_dict, mortal.optimizer.state_dict]
        raised = [error_of(attempt) for attempt in attempts]
    seconds = time.monotonic() - start
    whole = bool(raised[2]) or mortal.digest() == expected
    mortal.optimizer.load_state_dict(before)
    return Found(raised, seconds, whole, same(mortal.optimizer.state_dict(), before))


def late_for_a_sum(patience: float) -> tuple[str, float]:
    """The error of the ranks that wait for one that sleeps in its step, and after how many seconds it came."""
    warnings.simplefilter("ignore")
    trained = Trained("set")
    trained.backward(STEPS)
    dist.barrier()
    start = time.monotonic()
    if dist.get_rank() == 1:
        time.sleep(3 * patience)
        os.kill(os.getpid(), signal.SIGKILL)
    return error_of(trained.optimizer.step), time.monotonic() - start


def error_of(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except RuntimeError as error:
        return str(error) or type(error).__name__
    return ""


def same(mine: Any, other: Any) -> bool:
    if isinstance(mine, dict):
        return mine.keys() == other.keys() and all(same(mine[key], other[key]) for key in mine)
    if isinstance(mine, torch.Tensor):
        return digest([mine]) == digest([other])
    return bool(mine == other)


SHORT = [("set", "before the second sum", 2), ("set", "with the last sum on its way", 2)]
LONG = [(kind, place, world) for kind in KINDS for place in PLACES for world in (2, 3)]


@pytest.mark.parametrize(
    ("kind", "place", "world"),
    [*SHORT, *(pytest.param(*case, marks=pytest.mark.full) for case in LONG if case not in SHORT)],
)
def test_a_rank_that_dies_in_a_step_leaves_no_half_step_to_be_saved(
    kind: str, place: str, world: int, tmp_path: Path
) -> None:
    survivors = run_with_deaths(world, killed_in_a_step, kind, place, folder=tmp_path, timeout=TIMEOUT)
    assert survivors.keys() == set(range(world)) - {1}
    for found in survivors.values():
        assert found.seconds < 2 * TIMEOUT.total_seconds()
        assert found.whole and found.recovered
        if place != "with the last sum on its way":  # which may have come through
            assert any(found.raised), "nobody has heard of the death"
            assert "cut off" in found.raised[2] and "from a checkpoint" in found.raised[2]


@pytest.mark.full
def test_a_rank_that_does_not_come_is_waited_for_until_the_time_out(tmp_path: Path) -> None:
    patience = timedelta(seconds=10)
    survivors = run_with_deaths(2, late_for_a_sum, 10.0, folder=tmp_path, timeout=patience)
    message, seconds = survivors[0]
    assert "timed out" in message.lower()
    assert 9 < seconds < 20
