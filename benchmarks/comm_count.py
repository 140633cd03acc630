"""Small networks on the ranks at hand, one optimizer step after the other: what is seen to be sent, beside what
:mod:`benchmarks.comm_bytes` says of it. A payload that is not as predicted ends the benchmark."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import specopt
from benchmarks import workloads
from benchmarks.collectives import Collective, Collectives
from benchmarks.comm_bytes import Payload, Rule, Weight, frobenius, norm_scale, penalty, sent
from specopt.sharding.cut import cut_dimensions, sharers_of
from specopt.tracker.common import COLD_STEPS

RANK = 2
SIDES = (" (W V)", " (Wᵀ U)")
"""Of a half product."""
SHARDED: dict[str, Callable[[], Any]] = {
    "qkv": ColwiseParallel,
    "out": RowwiseParallel,
    "up": ColwiseParallel,
    "down": RowwiseParallel,
}
"""The layers of a block under tensor parallelism."""


class Kind(NamedTuple):
    """An optimizer, and what each of its steps in turn should send."""

    make: Callable[[nn.Module, int], torch.optim.Optimizer]
    rules: Callable[[int], tuple[Rule, ...]]
    settling: int = 2
    """Steps before it is looked at: more than the cold ones where a step may make more than one pair."""


def _scaled(model: nn.Module, block: int) -> torch.optim.Optimizer:
    return specopt.NormScaleAdamW(model, lr=1e-4, block=block, max_passes=1)


def _capped(model: nn.Module, block: int) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"mode": "cap", "rank": RANK, "max_passes": 2, "tolerance": 0.1}
    return specopt.NormScaleAdamW(model, lr=1e-4, block=block, **options)


def _whole(model: nn.Module, block: int) -> torch.optim.Optimizer:
    return specopt.NormScaleAdamW(model, lr=1e-4, norm="frobenius")


def _penalized(model: nn.Module, block: int) -> torch.optim.Optimizer:
    return specopt.SNRSGD(model, lr=0.05, momentum=0.9, block=block, max_passes=1)


KINDS = {
    "NormScaleAdamW": Kind(_scaled, lambda block: (partial(norm_scale, block=block),)),
    f"cap of rank {RANK}": Kind(_capped, lambda block: (partial(norm_scale, block=block, rank=RANK),), COLD_STEPS),
    "Frobenius": Kind(_whole, lambda block: (frobenius,)),
    "SNRSGD": Kind(_penalized, lambda block: tuple(partial(penalty, block=block, right=r) for r in (True, False))),
}


def gpt(block: int) -> nn.Module:
    """Two blocks whose matrices are tracked, and a head that is solved."""
    return workloads.gpt(width=3 * block, tokens=block, length=block).model


def half_precision(block: int) -> nn.Module:
    return gpt(block).to(torch.bfloat16)


def convolutions(block: int) -> nn.Module:
    """Kernels (out, in, 3, 3), of which the last is solved."""
    channels = [(block, 4 * block), (4 * block, 3 * block), (3 * block, block)]
    return nn.Sequential(*(nn.Conv2d(inputs, outputs, 3) for inputs, outputs in channels))


def by_rows(model: nn.Module, mesh: Any) -> None:
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def by_columns(model: nn.Module, mesh: Any) -> None:
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda param: Shard(min(param.ndim - 1, 1)))


def with_tensor_parallelism(model: nn.Module, mesh: Any) -> None:
    for block in blocks_of(model):
        parallelize_module(block, mesh["inner"], {name: style() for name, style in SHARDED.items()})
    by_rows(model, mesh["outer"])


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return list(getattr(model, "blocks", []))


class Layout(NamedTuple):
    """A network, how it is cut up, and whether over a line of ranks or a plane of them."""

    build: Callable[[int], nn.Module]
    cut: Callable[[nn.Module, Any], None]
    plane: bool = False


LAYOUTS = {
    "GPT, fully_shard": Layout(gpt, by_rows),
    "GPT in bfloat16, fully_shard": Layout(half_precision, by_rows),
    "GPT, HSDP": Layout(gpt, by_rows, plane=True),
    "GPT, fully_shard x TP": Layout(gpt, with_tensor_parallelism, plane=True),
    "convolutions, fully_shard": Layout(convolutions, by_rows),
    "convolutions, by input channels": Layout(convolutions, by_columns),
}


def mesh_of(plane: bool, device: str) -> Any:
    world = dist.get_world_size()
    if not plane:
        return init_device_mesh(device, (world,))
    return init_device_mesh(device, (2, world // 2), mesh_dim_names=("outer", "inner"))


def weight_of(param: DTensor) -> Weight:
    """A parameter that is one matrix, as it lies on its mesh."""
    return Weight(tuple(param.shape), frozenset(cut_dimensions(param)), sharers_of(param).ranks, param.dtype)


def controlled(optimizer: torch.optim.Optimizer) -> list[Any]:
    groups = [group for group in optimizer.param_groups if group["spectral"]]
    return [param for group in groups for param in group["params"] if param.ndim > 1]


def noise(param: Any, step: int) -> Any:
    """A gradient that no rank has to ask another one for, the same on all replicas."""
    return 0.01 * torch.sin((1000 + step) * param.detach() + step)


def steps_of(layout: Layout, kind: Kind, block: int, device: str) -> Iterator[tuple[list[Collective], list[Payload]]]:
    """What the settled steps send, and what they should."""
    torch.manual_seed(0)
    model = layout.build(block).to(device)
    layout.cut(model, mesh_of(layout.plane, device))
    optimizer = kind.make(model, block)
    weights = [weight_of(param) for param in controlled(optimizer)]
    rules = kind.rules(block)
    for step in range(kind.settling + len(rules)):
        for param in model.parameters():
            param.grad = noise(param, step)
        with Collectives() as made:
            optimizer.step()
        if step >= kind.settling:
            yield made.calls, sent(weights, rules[(step - kind.settling) % len(rules)])


def check(calls: list[Collective], predicted: list[Payload], what: str) -> None:
    """
    Raises:
        AssertionError: what was sent is not what the formula says, with both.
    """
    found = [(call.name, call.bytes, call.dtype) for call in calls]
    wanted = [("allreduce_", payload.bytes, payload.dtype) for payload in predicted]
    if found != wanted:
        raise AssertionError(f"{what}: the formula says {wanted}, and a step has sent {found}")


CASES = tuple(product(LAYOUTS, KINDS))


def count(block: int, device: str, cases: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """On every rank: a row for each layout and kind that these ranks can have. A plane takes four of them."""
    warnings.simplefilter("ignore")
    world = dist.get_world_size()
    rows = []
    for name, title in cases:
        if LAYOUTS[name].plane and (world < 4 or world % 2):
            continue
        turns = list(steps_of(LAYOUTS[name], KINDS[title], block, device))
        for turn, (calls, predicted) in enumerate(turns):
            check(calls, predicted, f"{name}, {title}, {world} ranks")
            side = ("", SIDES[turn])[len(turns) > 1]
            rows.append({"name": name, "rule": title + side} | _row(predicted))
    return rows


def _row(predicted: list[Payload]) -> dict[str, Any]:
    now = [payload for payload in predicted if not payload.late]
    late = [payload for payload in predicted if payload.late]
    row: dict[str, Any] = {"reductions": len(predicted), "now_bytes": sum(payload.bytes for payload in now)}
    row["now_dtype"] = ", ".join(dict.fromkeys(str(payload.dtype).removeprefix("torch.") for payload in now))
    if late:
        row["late_bytes"] = sum(payload.bytes for payload in late)
        row["late_dtype"] = str(late[0].dtype).removeprefix("torch.")
    return row


COLUMNS = {
    "name": "network",
    "ranks": "ranks",
    "rule": "optimizer",
    "reductions": "all-reduces",
    "now_bytes": "now (bytes)",
    "now_dtype": "in",
    "late_bytes": "late (bytes)",
    "late_dtype": "in ",
}
