"""Ranks, and the three ways of a model over them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import Store
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from .model import GPT
from .starting import meet

WAYS = ("ddp", "fsdp2", "hsdp")


def world_size() -> int:
    """How many ranks torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def replicas() -> int:
    """Of the shards under "hsdp", the same on every rank: one for each machine, as shards stay where links are fast; of
    one machine two. Where machines have unequal numbers of ranks, some shards lie on two of them."""
    machines = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    return machines if machines > 1 else 2


def check(way: str, world: int, batch: int) -> None:
    """What can be said before any rank waits for another.

    Raises:
        ValueError: so many ranks cannot go this way, or not share a batch.
    """
    if way == "hsdp" and world % replicas():
        raise ValueError(
            f"--parallel hsdp takes a multiple of {replicas()} ranks, {replicas()} replicas of the same shards, got "
            f"{world}: torchrun --nproc-per-node 4"
        )
    if batch % world:
        raise ValueError(f"--batch must be a multiple of the number of ranks, {world}, got {batch}")


def device_of(asked: str) -> torch.device:
    """This rank's device, made torch's current one.

    Args:
        asked: "auto" (a GPU for every rank of this machine where torch sees any), "cpu" or "cuda".

    Raises:
        ValueError: GPUs that are not there.
    """
    there, rank = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    if asked == "cpu" or (asked == "auto" and there == 0):
        return torch.device("cpu")
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if there < ranks:
        raise ValueError(
            f"--device {asked}: torch sees {there} GPUs for {ranks} ranks here; take fewer, or --device cpu"
        )
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


@contextmanager
def process_group(device: torch.device, timeout: float) -> Iterator[None]:
    """All ranks that torchrun has started, or this process alone: over nccl on GPUs, over gloo on CPUs.

    The group is not bound to the device by ``device_id``: specopt's sums over a part of the ranks (hsdp) would have to
    share the communicator of the shards (``specopt/sharding/communicators.py``).

    Args:
        device: of this rank, torch's current one.
        timeout: seconds that a rank waits for another in a collective before it fails.
    """
    patience = timedelta(seconds=timeout)
    store: Store = dist.HashStore()  # type: ignore[attr-defined] # which torch does not list as exported
    rank, world = 0, 1
    if "RANK" in os.environ:
        store, rank, world = next(rendezvous("env://", timeout=patience))
    backend = "nccl" if device.type == "cuda" else "gloo"
    fresh = meet(store, rank, world, patience)
    dist.init_process_group(backend, store=fresh, rank=rank, world_size=world, timeout=patience)
    try:
        yield
    except SystemExit:  # which all ranks come to; after any other exception it would wait for ranks that are no more
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def spread_out(model: GPT, way: str, device: torch.device) -> nn.Module:
    """What is called in training. The parameters of ``model`` are afterwards those to be trained: whole ones under
    "ddp", DTensors cut by rows under "fsdp2", and under "hsdp" with a second dimension of replicas."""
    model.to(device)
    if way == "ddp":
        return DistributedDataParallel(model)
    mesh = _mesh(way, device)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _mesh(way: str, device: torch.device) -> DeviceMesh:
    world = dist.get_world_size()
    if way == "fsdp2":
        return init_device_mesh(device.type, (world,))
    shape = (replicas(), world // replicas())
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def share_of(batch: Tensor) -> Tensor:
    """This rank's part of what all ranks see: as large as any other's, or by one larger."""
    return batch.tensor_split(dist.get_world_size())[dist.get_rank()]


def summed(values: Tensor) -> Tensor:
    """Over all ranks."""
    dist.all_reduce(values)
    return values


def mean_of_shares(loss: Tensor) -> float:
    """Of losses of equal shares of a batch."""
    return float(summed(loss.double())) / dist.get_world_size()
