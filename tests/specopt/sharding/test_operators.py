"""Convolutions under control as operators, their kernels cut up: every step has the bits of that of whole ones."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from tests.specopt.sharding.convolutions import RULES, Pair, group_of, optimizer_of
from tests.specopt.sharding.ranks import run
from tests.specopt.sharding.test_meshes import part_of
from tests.specopt.sharding.twins import wholes

PRECISIONS = (torch.bfloat16, torch.float16, torch.float64)
BOTH = "penalty and cap"
ON_A_LINE: dict[str, tuple[Placement, tuple[str, ...]]] = {
    "output channels": (Shard(0), tuple(RULES)),
    "input channels": (Shard(1), (BOTH,)),
    "pixels": (Shard(2), (BOTH,)),
    "replicas": (Replicate(), (BOTH,)),
}
ON_A_PLANE: dict[str, tuple[Placement, Placement]] = {
    "replicas of shards (HSDP)": (Replicate(), Shard(0)),
    "both dimensions": (Shard(0), Shard(1)),
    "one dimension twice": (Shard(1), Shard(1)),
}

STRIDED = "strided (FSDP x TP)"


def differences(kind: str, mesh: Any, placements: Any, steps: int, dtype: torch.dtype = torch.float32) -> list[str]:
    pair = Pair(kind, mesh, placements, dtype)
    found = []
    for number in range(steps):
        pair.step(number)
        found += [f"step {number}: {difference}" for difference in pair.differences()]
    return found


def on_a_line(steps: int) -> dict[Any, Any]:
    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found: dict[Any, Any] = {}
    for name, (place, kinds) in ON_A_LINE.items():
        found |= {(kind, name): differences(kind, mesh, [place], steps) for kind in kinds}
    return found | {dtype: differences(BOTH, mesh, [Shard(0)], steps, dtype) for dtype in PRECISIONS}


def on_a_plane() -> dict[Any, Any]:
    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("outer", "inner"))
    found: dict[str, Any] = {name: differences(BOTH, mesh, places, steps=2) for name, places in ON_A_PLANE.items()}
    return found | {STRIDED: strided(mesh)}


def strided(mesh: Any) -> list[bool]:
    """By step whether a kernel has the bits of a whole one, whose output channels are cut for tensor parallelism on the
    inner dimension of a mesh, and then by ``fully_shard`` on the outer."""
    (geometry,), shape = ["conv2d(5x5)"], (16, 3, 2, 2)
    start, *gradients = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    model = nn.ParameterList([distribute_tensor(start, mesh["inner"], [Shard(0)])])
    fully_shard(model, mesh=mesh["outer"])
    params: list[Any] = [model[0], nn.Parameter(start.clone())]
    optimizers = [optimizer_of(BOTH, [group_of([param], [geometry])]) for param in params]
    assert "Strided" in str(params[0].placements)
    found = []
    for gradient in gradients:
        params[0].grad, params[1].grad = part_of(gradient, params[0]), gradient
        for optimizer in optimizers:
            optimizer.step()
        found.append(torch.equal(wholes(params[:1])[0], params[1]))
    return found


@pytest.fixture(
    scope="module",
    params=[(2, 2), *(pytest.param((world, 6), marks=pytest.mark.full) for world in (2, 3, 4))],
    ids=lambda param: f"{param[0]} ranks, {param[1]} steps",
)
def line(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    world, steps = request.param
    return run(world, on_a_line, steps, folder=tmp_path_factory.mktemp("line"))


@pytest.mark.parametrize(
    ("place", "kind"), [(place, kind) for place, (_, kinds) in ON_A_LINE.items() for kind in kinds]
)
def test_steps_of_cut_kernels_have_the_bits_of_whole_ones(line: list[dict[Any, Any]], place: str, kind: str) -> None:
    for rank in line:
        assert rank[kind, place] == []


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_so_have_kernels_of_other_precision(line: list[dict[Any, Any]], dtype: torch.dtype) -> None:
    for rank in line:
        assert rank[dtype] == []


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return run(4, on_a_plane, folder=tmp_path_factory.mktemp("plane"))


def test_so_have_kernels_that_fully_shard_cuts_behind_tensor_parallelism(plane: list[dict[Any, Any]]) -> None:
    for rank in plane:
        assert rank[STRIDED] == [True, True]


@pytest.mark.parametrize("place", ON_A_PLANE)
def test_so_have_kernels_on_a_mesh_of_two_dimensions(plane: list[dict[Any, Any]], place: str) -> None:
    for rank in plane:
        assert rank[place] == []
