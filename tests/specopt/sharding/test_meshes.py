"""Steps on meshes of two dimensions, and of parameters that hold several matrices."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from tests.specopt.helpers import with_spectrum
from tests.specopt.sharding.cases import KINDS, SHAPES, judged, twin_steps
from tests.specopt.sharding.ranks import digest, run, state_tensors
from tests.specopt.sharding.twins import Gap, Twins

MESHES: dict[str, tuple[tuple[Placement, Placement], tuple[str, ...]]] = {
    "replicas of row shards (HSDP)": ((Replicate(), Shard(0)), ("snr", "set")),
    "replicas of column shards": ((Replicate(), Shard(1)), ("snr", "set")),
    "tiles (FSDP x rowwise TP)": ((Shard(0), Shard(1)), ("snr", "set", "frobenius", "full", "penalty and cap")),
}
STRIDED = "strided row shards (FSDP x colwise TP)"
STRIDED_KINDS = ("snr", "set", "full")
VIEWS: dict[str, tuple[int, ...]] = {
    "rows:2": (40, 30),
    "columns:2": (24, 60),
    "transposed": (30, 40),
    "transposed:2": (8, 20, 3, 3),
    "stack": (3, 24, 20),
    "stack-transposed": (3, 20, 24),
    "bilinear": (20, 5, 6),
}


PLACES = (Shard(0), Shard(1), Replicate())
VIEWED = [(view, kind, place) for view in VIEWS for kind in ("snr", "set") for place in PLACES]
VIEWED += [(view, "full", place) for view in ("stack-transposed", "columns:2") for place in PLACES[:2]]
READ_BY_ROWS = {
    ("rows:2", 0),
    ("stack", 0),
    ("bilinear", 0),
    ("transposed", 1),
    ("transposed:2", 1),
    ("columns:2", 1),
    ("stack", 1),
}
"""Views and the dimension of the parameter that is cut, where it cuts the rows of the matrices."""


def on_a_plane(steps: int) -> dict[Any, Any]:
    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("outer", "inner"))
    found: dict[Any, Any] = {}
    for name, (placements, kinds) in MESHES.items():
        for kind in kinds:
            found[name, kind] = judged(twin_steps(kind, mesh, placements, steps, torch.float32), kind=kind)
    found |= {(STRIDED, kind): judged(strided_steps(kind, mesh, steps)) for kind in STRIDED_KINDS}
    line = init_device_mesh("cpu", (dist.get_world_size(),))
    for view, kind, place in VIEWED:
        found[view, kind, place] = viewed(kind, line, place, view, VIEWS[view])
    found["bits"] = bits_of_replicas(mesh)
    return found


def strided_steps(kind: str, mesh: Any, steps: int) -> list[list[Gap]]:
    """Rows that are cut for tensor parallelism on the inner dimension of a mesh, and then by ``fully_shard``."""
    generator = torch.Generator().manual_seed(0)
    weights = [with_spectrum(shape, torch.float32, 0.2, generator) for shape in ((40, 30), (24, 36), (16, 50))]
    model = torch.nn.ParameterList(distribute_tensor(weight, mesh["inner"], [Shard(0)]) for weight in weights)
    fully_shard(model, mesh=mesh["outer"])
    sharded, plain = list(model), [torch.nn.Parameter(weight.clone()) for weight in weights]
    twins = Twins(*(KINDS[kind]([{"params": params}]) for params in (sharded, plain)), sharded, plain)
    assert all(torch.equal(mine, weight) for mine, weight in zip(twins.before, weights, strict=True))
    assert all("Strided" in str(param.placements) for param in sharded)
    found = []
    for _ in range(steps):
        for param in sharded:
            param.grad = part_of(0.1 * torch.randn(param.shape, generator=generator), param)
        found.append(twins.step())
    return found


def part_of(whole: Tensor, like: Any) -> Any:
    """This rank's rows of a tensor, as a DTensor; they follow one another."""
    local = like.to_local()
    _, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    mine = whole[offset[0] : offset[0] + len(local)].clone()
    return DTensor.from_local(
        mine, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def viewed(kind: str, mesh: Any, place: Placement, view: str, shape: tuple[int, ...]) -> float:
    """The largest error of two steps, relative to the update."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    # what is read transposed to be tracked has another state when it is whole: so that is solved here
    is_turned = isinstance(place, Shard) and (view, place.dim) not in READ_BY_ROWS
    block = 32 if kind == "set" and is_turned else 8

    def make(groups: Any) -> Any:
        return KINDS[kind]([{**groups[0], "view": view, "block": block}])

    twins = Twins.of(make, [weight], mesh, [place])
    errors = []
    for _ in range(2):
        twins.give([0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)])
        errors.append(twins.step()[0].error)
    return max(errors)


def bits_of_replicas(mesh: Any) -> dict[str, str]:
    """Of weights and state after a few steps, this rank's."""
    found = {}
    for kind in ("snr", "set"):
        generator = torch.Generator().manual_seed(0)
        whole = [with_spectrum(shape, torch.float32, 0.2, generator) for shape in SHAPES]
        params = [torch.nn.Parameter(distribute_tensor(weight, mesh, [Replicate(), Shard(0)])) for weight in whole]
        optimizer = KINDS[kind]([{"params": params}])
        for _ in range(5):
            for param in params:
                grad = torch.randn(param.shape, generator=generator)
                param.grad = distribute_tensor(grad, mesh, [Replicate(), Shard(0)], src_data_rank=None)
            optimizer.step()
        optimizer.state_dict()  # takes up what is on its way
        found[kind] = digest(state_tensors(optimizer))
    return found


@pytest.fixture(
    scope="module",
    params=[(4, 3), pytest.param((4, 40), marks=pytest.mark.full)],
    ids=lambda param: f"{param[0]} ranks, {param[1]} steps",
)
def plane(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    world, steps = request.param
    return run(world, on_a_plane, steps, folder=tmp_path_factory.mktemp("plane"))


@pytest.mark.parametrize(
    ("mesh", "kind"),
    [(mesh, kind) for mesh, (_, kinds) in MESHES.items() for kind in kinds]
    + [(STRIDED, kind) for kind in STRIDED_KINDS],
)
def test_a_step_on_a_mesh_of_two_dimensions_is_that_of_the_whole_weight(
    plane: list[dict[Any, Any]], mesh: str, kind: str
) -> None:
    for rank in plane:
        assert rank[mesh, kind] == {}


@pytest.mark.parametrize(("view", "kind", "place"), VIEWED, ids=str)
def test_the_matrices_of_a_sharded_parameter_are_those_of_its_view(
    plane: list[dict[Any, Any]], view: str, kind: str, place: Placement
) -> None:
    for rank in plane:
        assert rank[view, kind, place] < 1e-6


@pytest.mark.parametrize("kind", ["snr", "set"])
def test_replicas_of_shards_stay_the_same_bits(plane: list[dict[Any, Any]], kind: str) -> None:
    first, second, *others = (rank["bits"][kind] for rank in plane)
    assert others == [first, second] and first != second
