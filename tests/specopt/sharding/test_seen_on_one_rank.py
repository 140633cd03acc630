"""A monitor of sharded weights on one of the ranks, the others knowing nothing of it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import specopt
from benchmarks.collectives import Collectives
from specopt.tracker.common import STATS, Stat
from tests.specopt.helpers import with_spectrum
from tests.specopt.sharding.cases import KINDS
from tests.specopt.sharding.ranks import run

STEPS = 3


def watched(kind: str) -> dict[str, Any]:
    """What a monitor on rank 0 has noted, what the state told after each step, and how many collectives were made."""
    mesh, generator = init_device_mesh("cpu", (2,)), torch.Generator().manual_seed(0)
    weights = [with_spectrum(shape, torch.float32, 0.2, generator) for shape in ((40, 30), (30, 44), (50, 6))]
    params: list[Any] = [nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)])) for weight in weights]
    optimizer = KINDS[kind]([{"params": params}])
    monitor = specopt.SpectralMonitor(optimizer, every=1) if dist.get_rank() == 0 else None
    told = []
    with Collectives() as made:
        for _ in range(STEPS):
            for param in params:
                param.grad = torch.full_like(param, 0.1)
            optimizer.step()
            told.append([float(optimizer.state[param][STATS][Stat.SIGMA]) for param in params])
    noted = [] if monitor is None else monitor.history["sigma"].tolist()
    return {"noted": noted, "told": told, "collectives": made.count}


def refused(**asked: bool) -> str:
    param: Any = nn.Parameter(distribute_tensor(torch.eye(20), init_device_mesh("cpu", (2,)), [Shard(0)]))
    optimizer = specopt.NormScaleAdamW([param])
    try:
        specopt.SpectralMonitor(optimizer, **asked)
    except ValueError as error:
        param.grad = torch.ones_like(param)
        optimizer.step()  # it has left no hook that would refuse it
        return str(error)
    return "was not refused"


def refused_later() -> str:
    """The error of a step where a shard was added to what is monitored."""
    whole, shard = (nn.Parameter(torch.eye(20)) for _ in range(2))
    optimizer = specopt.NormScaleAdamW([whole])
    specopt.SpectralMonitor(optimizer, weights=True)
    cut: Any = nn.Parameter(distribute_tensor(shard.detach(), init_device_mesh("cpu", (2,)), [Shard(0)]))
    optimizer.add_param_group({"params": [cut]})
    whole.grad, cut.grad = torch.ones_like(whole), torch.ones_like(cut)
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    return "was not refused"


def on_each_rank() -> dict[str, Any]:
    warnings.simplefilter("ignore")
    asked = {"weights": refused(weights=True), "gradients": refused(gradients=True), "later": refused_later()}
    return {**{kind: watched(kind) for kind in ("set", "snr")}, **asked}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(2, on_each_rank, folder=Path(tmp_path_factory.mktemp("seen")))


@pytest.mark.parametrize("kind", ["set", "snr"])
def test_one_rank_notes_what_all_have_found_and_sends_nothing_for_it(found: list[dict[str, Any]], kind: str) -> None:
    first, second = (rank[kind] for rank in found)
    assert first["noted"] == first["told"] == second["told"] and len(first["told"]) == STEPS
    assert first["collectives"] == second["collectives"] > 0


@pytest.mark.parametrize("what", ["weights", "gradients"])
def test_a_monitor_of_norms_of_shards_is_refused_before_any_step(found: list[dict[str, Any]], what: str) -> None:
    for rank in found:
        assert f"a SpectralMonitor with {what}=True reads whole weights" in rank[what]


def test_norms_of_shards_that_are_added_later_are_refused_in_the_step(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert "a SpectralMonitor with weights=True reads whole weights" in rank["later"]
