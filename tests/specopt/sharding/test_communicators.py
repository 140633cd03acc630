"""Whom sums go through: process groups of the optimizer's own."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

import specopt
from specopt.sharding import communicators, gathering
from specopt.tracker.common import BLOCK, PROBE, STATS, Stat
from tests.specopt.helpers import with_spectrum
from tests.specopt.sharding.cases import KINDS
from tests.specopt.sharding.ranks import TIMEOUT, digest, run

PLANES: dict[str, list[Placement]] = {"HSDP": [Replicate(), Shard(0)], "tiles": [Shard(0), Shard(1)]}
SHAPES = ((40, 30), (37, 50), (60, 6))


def optimizer_of(mesh: Any, placements: list[Placement], kind: str = "set") -> Any:
    weights = [with_spectrum(shape, torch.float32, 0.2, torch.Generator().manual_seed(0)) for shape in SHAPES]
    params = [nn.Parameter(distribute_tensor(weight, mesh, placements)) for weight in weights]
    return KINDS[kind]([{"params": params}])


def step(optimizer: Any) -> list[Any]:
    """Makes one, and tells the process groups that its sums went through."""
    seen: list[Any] = []

    def noted(tensor: Any, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        seen.append(group)
        return all_reduce(tensor, *args, group=group, **kwargs)

    all_reduce = dist.all_reduce
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.full_like(param, 1e-4)
    with mock.patch.object(dist, "all_reduce", noted):
        optimizer.step()
    return seen


def paths() -> dict[str, Any]:
    """By kind of mesh: the ranks that each sum of a step goes over, which of the groups are the mesh's, and the bits of
    what every rank keeps of a weight."""
    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    weights_own = [mesh.get_group(0), mesh.get_group(1), dist.group.WORLD]
    found: dict[str, Any] = {}
    for name, placements in PLANES.items():
        optimizer = optimizer_of(mesh, placements)
        for _ in range(3):
            step(optimizer)
        groups = step(optimizer)
        found[name] = [dist.get_process_group_ranks(group) for group in groups]
        found[name, "shared"] = [group for group in groups if group in weights_own]
        optimizer.state_dict()
        states = [optimizer.state[param] for param in optimizer.param_groups[0]["params"]]
        found[name, "bits"] = digest(state[key] for state in states for key in (BLOCK, PROBE, STATS) if key in state)
    found["mixed"] = mixed(mesh)
    found["experts"] = {kind: experts(mesh, kind) for kind in ("set", "snr", "full")}
    before = len(dist.distributed_c10d._world.pg_names)
    step(optimizer_of(mesh, PLANES["tiles"], "snr"))
    found["more groups"] = len(dist.distributed_c10d._world.pg_names) - before
    found["bound"] = bound(mesh)
    return found


def bound(mesh: Any) -> dict[str, tuple[bool, int]]:
    """Where the default process group is bound to a device: whether all sums went through groups of the mesh, and how
    often another was asked for (gloo has none to give there)."""
    groups, found = [mesh.get_group(0), mesh.get_group(1)], {}
    for name, placements in PLANES.items():
        communicators._made.clear()
        optimizer: Any = optimizer_of(mesh, placements)
        with mock.patch.object(dist, "new_group", side_effect=NotImplementedError) as asked:
            dist.group.WORLD.bound_device_id = torch.device("cpu", 0)  # type: ignore[union-attr]
            try:
                through = step(optimizer)
            finally:
                dist.group.WORLD.bound_device_id = None  # type: ignore[union-attr]
        found[name] = all(group in groups for group in through), asked.call_count
    return found


def mixed(mesh: Any) -> list[float]:
    """sigma_1 of the same weight, shared among one set of ranks or another, and by one rank with nobody."""
    kept, outer, inner = Replicate(), Shard(0), Shard(1)
    weight = with_spectrum((40, 30), torch.float32, 0.2, torch.Generator().manual_seed(0))
    ways: list[list[Placement]] = [[outer, kept], [kept, inner], [outer, inner], [outer, outer], [kept, kept]]
    params = [nn.Parameter(distribute_tensor(weight, mesh, way)) for way in ways]
    params += [nn.Parameter(distribute_tensor(weight, mesh[name], [outer])) for name in ("outer", "inner")]
    optimizer = KINDS["set"]([{"params": params}])
    for _ in range(2):
        step(optimizer)
    return [float(optimizer.state[param][STATS][Stat.SIGMA]) for param in params]


def experts(mesh: Any, kind: str) -> str:
    """The bits of what is kept of weights that all ranks share, beside one of which two ranks have a part of one and
    two of another, the former alone with a gradient, from the second step on."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(40, 30), (6, 30)]
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    dense = [nn.Parameter(distribute_tensor(weight, mesh, PLANES["tiles"])) for weight in weights]
    expert = nn.Parameter(distribute_tensor(torch.randn(40, 30, generator=generator), mesh["outer"], [Shard(0)]))
    optimizer: Any = KINDS[kind]([*dense, expert])
    with mock.patch.object(gathering, "TOGETHER", 1300):
        for made in range(3):
            for param in dense:
                param.grad = torch.full_like(param, 1e-2)
            expert.grad = torch.full_like(expert, 1e-2) if mesh.get_local_rank("inner") == 0 and made else None
            optimizer.step()
            specopt.spectral_report(optimizer)
    optimizer.state_dict()
    states = [optimizer.state[param] for param in dense]
    kept = [state[key] for state in states for key in (BLOCK, PROBE, STATS) if key in state]
    return str(digest([*kept, *(param.full_tensor() for param in dense)]))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return run(4, paths, folder=tmp_path_factory.mktemp("paths"))


def test_sums_go_over_all_that_share_a_weight_at_once_and_only_over_these(found: list[dict[Any, Any]]) -> None:
    for rank, paths in enumerate(found):
        assert paths["HSDP"] == [[0, 1] if rank < 2 else [2, 3]] * len(paths["HSDP"])
        assert paths["tiles"] == [[0, 1, 2, 3]] * len(paths["HSDP"])  # as many, though two dimensions cut them


def test_sums_share_no_communicator_with_gradients_and_gathered_weights(found: list[dict[Any, Any]]) -> None:
    assert all(paths[name, "shared"] == [] for paths in found for name in PLANES)


def test_where_a_group_would_be_split_from_the_world_a_part_of_it_asks_for_none(found: list[dict[Any, Any]]) -> None:
    for paths in found:
        assert paths["bound"] == {"HSDP": (True, 0), "tiles": (True, 1)}


@pytest.mark.parametrize("name", PLANES)
def test_what_every_rank_keeps_is_the_same_bits_on_all(found: list[dict[Any, Any]], name: str) -> None:
    assert len({paths[name, "bits"] for paths in found}) == 1


def test_optimizers_of_the_same_ranks_share_their_communicator(found: list[dict[Any, Any]]) -> None:
    assert {paths["more groups"] for paths in found} == {0}


def test_weights_of_one_optimizer_may_be_shared_among_different_ranks(found: list[dict[Any, Any]]) -> None:
    for rank in found:
        assert rank["mixed"] == pytest.approx([found[0]["mixed"][0]] * 7, rel=1e-3)


@pytest.mark.parametrize("kind", ["set", "snr", "full"])
def test_sums_are_in_step_though_other_weights_take_other_rounds(found: list[dict[Any, Any]], kind: str) -> None:
    assert len({paths["experts"][kind] for paths in found}) == 1


# --- what becomes of them ---------------------------------------------------------------------------------------------


def lives(store: Path) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {"own": own_of_a_step()}
    (own,) = (group for group in dist.distributed_c10d._world.pg_map if group.group_desc == "specopt")
    found["time-out"] = own._get_backend(torch.device("cpu")).options._timeout
    del own
    dist.barrier()
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    gc.collect()
    groups = [x for x in gc.get_objects() if isinstance(x, dist.ProcessGroup)]
    found["kept"] = [group for group in groups if group.group_desc == "specopt"]
    dist.init_process_group("gloo", store=dist.FileStore(str(store), world), rank=rank, world_size=world)
    found["made again"] = own_of_a_step()
    return found


def own_of_a_step() -> bool:
    """Whether the last sum of a step goes through a group that is none of the mesh's."""
    mesh = init_device_mesh("cpu", (2,))
    return step(optimizer_of(mesh, [Shard(0)]))[-1] is not mesh.get_group(0)


def apart() -> dict[str, list[bool]]:
    """Of the sums of a step, whether they went through the mesh's group: where torch refuses a group that some ranks
    make by themselves, in either of its ways, and where rank 0 is in one group more than rank 1."""
    mesh = init_device_mesh("cpu", (2,))
    group = mesh.get_group(0)
    found = {}
    for error in (NotImplementedError, ValueError):
        with mock.patch.object(dist, "new_group", side_effect=error):
            found[error.__name__] = [through is group for through in step(optimizer_of(mesh, [Shard(0)]))]
        communicators._made.clear()
    if dist.get_rank() == 0:
        dist.new_group([0], use_local_synchronization=True)
    found["unequal"] = [through is group for through in step(optimizer_of(mesh, [Shard(0)]))]
    return found


def unserved() -> list[str]:
    """The errors of two steps whose weights are on a device that their group does not serve, and that of saving."""
    mesh = DeviceMesh.from_group(dist.new_group(backend="cuda:gloo"), "cpu")
    weight: Any = nn.Parameter(DTensor.from_local(torch.randn(20, 30), mesh, [Shard(0)], run_check=False))
    optimizer = KINDS["set"]([{"params": [weight]}])
    weight.grad = torch.ones_like(weight)
    return [error_of(attempt) for attempt in (optimizer.step, optimizer.step, optimizer.state_dict)]


def error_of(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def outside() -> str:
    """The error of an optimizer on a rank that is not of the mesh; on those of it there is none."""
    mesh = DeviceMesh("cpu", [0, 1])
    weight: Any = nn.Parameter(distribute_tensor(torch.eye(20), mesh, [Shard(0)]))
    return error_of(lambda: KINDS["set"]([{"params": [("head.weight", weight)]}]))


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(2, lives, tmp_path_factory.mktemp("again") / "store", folder=tmp_path_factory.mktemp("lives"))


def test_a_communicator_ends_with_the_process_group_and_is_made_anew_in_the_next(lived: list[dict[str, Any]]) -> None:
    for rank in lived:
        assert rank["own"] and rank["kept"] == [] and rank["made again"]


def test_a_communicator_has_the_time_out_of_the_weights_own_group(lived: list[dict[str, Any]]) -> None:
    assert {rank["time-out"] for rank in lived} == {TIMEOUT}


def test_ranks_that_cannot_make_a_group_by_themselves_sum_through_those_of_the_mesh(tmp_path: Path) -> None:
    for found in run(2, apart, folder=tmp_path):
        assert all(through and all(through) for through in found.values())


def test_a_device_that_the_weights_group_does_not_serve_is_told(tmp_path: Path) -> None:
    for first, again, saving in run(2, unserved, folder=tmp_path):
        assert "weights on the device 'cpu' must" in first and "init_process_group('cpu:gloo,cuda:nccl')" in first
        assert (again, saving) == (first, ""), "a step that has not begun was taken for one that was cut off"


def test_a_rank_outside_of_a_mesh_is_told_which_parameter_is_not_its_own(tmp_path: Path) -> None:
    *inside, told = run(3, outside, folder=tmp_path)
    assert inside == ["", ""] and "mesh of the sharded head.weight" in told and "the rank 2" in told
