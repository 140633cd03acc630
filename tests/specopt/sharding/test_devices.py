"""Replicas and shards on the devices at hand: over gloo on CPUs, and over nccl where there are two GPUs or more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import specopt
from benchmarks.ranks import run
from tests.specopt.helpers import with_spectrum
from tests.specopt.sharding.cases import KINDS
from tests.specopt.sharding.ranks import digest, state_tensors

GPUS = torch.cuda.device_count()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(GPUS < 2, reason="nccl takes two GPUs"))]
CHOSEN = ("snr", "set", "frobenius", "full", "every second", "penalty and cap")
"""None that makes singular values equal, whose directions would then go by rounding."""
STEPS = 6


def network(device: torch.device) -> nn.Sequential:
    """Of weights whose singular values are apart."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 18))
    for layer in model[::2]:
        assert isinstance(layer, nn.Linear)
        layer.weight.data = with_spectrum(tuple(layer.weight.shape), torch.float32, 0.2, generator)
        layer.bias.data.zero_()
    return model.to(device)


def own_device(kind: str) -> torch.device:
    return torch.device(kind, dist.get_rank()) if kind == "cuda" else torch.device(kind)


def loss_of(model: nn.Module, seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = torch.randn(16, 24, generator=generator), torch.randint(18, (16,), generator=generator)
    return nn.functional.cross_entropy(model(inputs.to(device)), labels.to(device))


def replicas(kind: str) -> dict[str, list[str]]:
    """By optimizer the bits of weights and state after each step, from other data on each rank."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    device = own_device(kind)
    found: dict[str, list[str]] = {}
    for name in CHOSEN:
        model = network(device)
        replica = DistributedDataParallel(model)
        optimizer = KINDS[name](specopt.param_groups(model))
        found[name] = []
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(replica, 100 * dist.get_rank() + step, device).backward()
            optimizer.step()
            found[name].append(digest(state_tensors(optimizer)))
    return found


def shards(kind: str) -> dict[str, float]:
    """By optimizer the largest distance of a sharded weight from a whole one after some steps of both, over how far
    that has come."""
    device, found = own_device(kind), {}
    mesh = init_device_mesh(kind, (dist.get_world_size(),))
    for name in CHOSEN:
        whole, cut = network(device), network(device)
        before = [param.detach().clone() for param in whole.parameters()]
        for layer in cut[::2]:
            fully_shard(layer, mesh=mesh)
        fully_shard(cut, mesh=mesh)
        optimizers = [KINDS[name](specopt.param_groups(model)) for model in (whole, cut)]
        for step in range(STEPS):
            for model, optimizer in zip((whole, cut), optimizers, strict=True):
                optimizer.zero_grad()
                loss_of(model, step, device).backward()
                optimizer.step()
        found[name] = max(map(distance, cut.parameters(), whole.parameters(), before))
    return found


def distance(cut: Any, whole: Tensor, before: Tensor) -> float:
    assert isinstance(cut, DTensor)
    return float(((cut.full_tensor() - whole).norm() / (whole - before).norm()).detach())


@pytest.mark.parametrize("device", DEVICES)
def test_replicas_have_the_same_bits(device: str) -> None:
    first, *others = run(max(2, min(GPUS, 4)), device, replicas, device)
    assert all(len(set(seen)) == STEPS for seen in first.values())
    assert all(other == first for other in others)


@pytest.mark.parametrize("device", DEVICES)
def test_shards_train_as_whole_weights_do(device: str) -> None:
    for errors in run(max(2, min(GPUS, 4)), device, shards, device):
        assert {name: error for name, error in errors.items() if error > 1e-2} == {}


def offloaded() -> str:
    """The device of the blocks of a weight that lies on the CPU though its mesh is of other devices: "meta" stands for
    what CPUOffloadPolicy leaves on a GPU."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = nn.Parameter(distribute_tensor(torch.eye(40, 30), mesh, [Shard(0)]))
    gradient = distribute_tensor(torch.ones(40, 30), mesh, [Shard(0)])
    optimizer = specopt.SNRSGD([weight], lr=0.1, block=8, max_passes=1)
    mesh._device_type = "meta"
    for _ in range(2):
        weight.grad = gradient
        optimizer.step()
    blocks = [value for value in optimizer.state[weight].values() if isinstance(value, DTensor)]
    assert blocks
    return " ".join(block.to_local().device.type for block in blocks)


def test_blocks_lie_where_their_weight_does_not_where_its_mesh_does() -> None:
    assert set(run(2, "cpu", offloaded)) == {"cpu"}
