"""A sum that is on its way when the step is over: nobody loses it, and nobody waits for another rank."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import warnings
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import specopt
from specopt.sharding import exchange, pairs
from specopt.sharding.unfinished import Unfinished
from specopt.tracker.common import BLOCK
from tests.specopt.helpers import with_spectrum
from tests.specopt.sharding.cases import FEW, KINDS
from tests.specopt.sharding.ranks import digest, run
from tests.specopt.sharding.skipping import bits_of, skipping


def trained(make: Any = KINDS["set"], steps: int = 2) -> Any:
    """An optimizer whose last step has left a sum on its way."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    weights = [with_spectrum(shape, torch.float32, 0.2, generator) for shape in ((40, 30), (9, 6))]
    params = [nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)])) for weight in weights]
    optimizer = make([{"params": params}])
    for _ in range(steps):
        train(optimizer)
    return optimizer


def train(optimizer: Any, scale: float = 0.1) -> None:
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.full_like(param, scale)
    optimizer.step()


def has_late_sum(optimizer: Any) -> bool:
    return Unfinished.of(optimizer.__dict__["_workspace"]).due is not None


def block_of(optimizer: Any) -> Tensor:
    block: Tensor = optimizer.state[optimizer.param_groups[0]["params"][0]][BLOCK]
    return block


def wrapped(groups: Any) -> Any:
    return specopt.wrap(torch.optim.AdamW(groups), specopt.NormScale(**FEW))


def pickled(optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


def copied() -> dict[str, bool]:
    """Of copies made while a sum is on its way, whether they have it in them."""
    found = {}
    for make, made in itertools.product((KINDS["set"], wrapped), (copy.deepcopy, pickled)):
        optimizer = trained(make)
        before, was_late = block_of(optimizer).clone(), has_late_sum(optimizer)
        block = block_of(made(optimizer))
        optimizer.state_dict()
        taken_up = block_of(optimizer)
        found[f"{made} {make}"] = was_late and not torch.equal(before, taken_up) and torch.equal(block, taken_up)
    return found


def left() -> dict[str, Any]:
    """Optimizers of which some ranks alone take up what is on its way, or none."""
    found: dict[str, Any] = {}
    optimizer = trained()
    found["late"] = has_late_sum(optimizer)
    if dist.get_rank() == 0:
        optimizer.state_dict()
    train(optimizer)
    optimizer.state_dict()
    found["bits"] = digest([block_of(optimizer)])
    dropped = trained()
    sums = weakref.ref(dropped.__dict__["_workspace"]["unfinished"].due)
    del dropped
    gc.collect()
    found["dropped"] = sums() is None
    train(optimizer)
    found["goes on"] = bool(block_of(optimizer).isfinite().all())
    return found


def skipped() -> dict[str, bool]:
    """Whether weights and state are the same bits after a step that a scaler skips, the host or the device alone
    knowing that it does."""
    found = {}
    for kind, seen in (("set", True), ("set", False), ("snr", False), ("frobenius", False)):
        optimizer = trained(KINDS[kind])
        optimizer._take_up()
        before = bits_of(optimizer)
        with skipping(optimizer, seen=seen):
            train(optimizer, torch.inf)
        optimizer._take_up()
        found[f"{kind} {seen}"] = before == bits_of(optimizer)
    return found


def scaled() -> bool:
    """The same where a scaler finds what is not finite on one rank alone."""
    optimizer, scaler = trained(), torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    optimizer._take_up()
    before = bits_of(optimizer)
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
        if dist.get_rank() == 1:
            param.grad.to_local().fill_(torch.inf)
    scaler.step(optimizer)
    scaler.update()
    return before == bits_of(optimizer) and scaler.get_scale() == 4.0


def memory() -> dict[str, Any]:
    """What lives on after a step of what it was to sum."""
    parts: list[Any] = []
    terms = pairs.Pair.terms

    def noted(self: Any, chosen: Any) -> list[Tensor]:
        made = terms(self, chosen)
        parts.extend(weakref.ref(part) for part in made)
        return made

    with mock.patch.object(pairs.Pair, "terms", noted):
        optimizer = trained(steps=1)
    sums = optimizer.__dict__["_workspace"]["unfinished"].due.sums
    return {"made": len(parts), "left": sum(part() is not None for part in parts), "packs": buffers(sums)}


def buffers(sums: exchange._Sums) -> list[int]:
    return [pack.buffer.numel() for pack in sums.packs]


def ended(store: Path) -> dict[str, bool]:
    """A sum that is on its way when the process group is destroyed, and what another group makes of it."""
    optimizer = trained()
    before, was_late = block_of(optimizer).clone(), has_late_sum(optimizer)
    dist.barrier()
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    optimizer.state_dict()
    moved = was_late and not torch.equal(before, block_of(optimizer))
    dist.init_process_group("gloo", store=dist.FileStore(str(store), world), rank=rank, world_size=world)
    train(trained())
    return {"taken up": moved}


def everything(store: Path) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    return {
        "copied": copied(),
        "left": left(),
        "skipped": {**skipped(), "scaler": scaled()},
        "memory": memory(),
        "ended": ended(store),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(2, everything, tmp_path_factory.mktemp("again") / "store", folder=tmp_path_factory.mktemp("late"))


def test_a_copy_has_the_state_with_the_late_sum_in_it(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["copied"] and all(rank["copied"].values()), rank["copied"]


def test_one_rank_alone_may_take_up_a_late_sum_and_all_go_on_with_the_same_bits(found: list[dict[str, Any]]) -> None:
    assert all(rank["left"]["late"] and rank["left"]["goes on"] for rank in found)
    assert len({rank["left"]["bits"] for rank in found}) == 1


def test_an_optimizer_that_is_dropped_takes_its_late_sum_with_it(found: list[dict[str, Any]]) -> None:
    assert all(rank["left"]["dropped"] for rank in found)


def test_a_skipped_step_leaves_weights_and_state_as_they_were(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["skipped"] and all(rank["skipped"].values()), rank["skipped"]


def test_of_what_is_summed_late_the_packed_numbers_alone_are_kept(found: list[dict[str, Any]]) -> None:
    for rank in found:
        made = rank["memory"]
        assert made["made"] and not made["left"] and made["packs"] == [30 * FEW["block"]]


def test_a_late_sum_outlives_its_process_group(found: list[dict[str, Any]]) -> None:
    assert all(rank["ended"]["taken up"] for rank in found)
