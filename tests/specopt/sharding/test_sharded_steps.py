"""A step of weights that are cut up along one dimension is that of whole ones, whatever part a rank holds."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from specopt.sharding import pairs
from specopt.tracker.common import STATS, Stat
from tests.specopt.sharding.cases import KINDS, judged, twin_steps
from tests.specopt.sharding.ranks import run
from tests.specopt.sharding.twins import wholes

REPEATED = ("snr", "set", "frobenius")


def on_a_line(steps: int) -> dict[Any, Any]:
    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found: dict[Any, Any] = {}
    for kind in KINDS:
        for dtype, dimension in ((torch.float32, 0), (torch.float64, 1)):
            found[kind, dimension] = judged(twin_steps(kind, mesh, [Shard(dimension)], steps, dtype), kind=kind)
    found["replicas"] = {kind: judged(twin_steps(kind, mesh, [Replicate()], 3, torch.float32)) for kind in REPEATED}
    return found


@pytest.fixture(
    scope="module",
    params=[(3, 3), *(pytest.param((world, 40), marks=pytest.mark.full) for world in (2, 3, 4))],
    ids=lambda param: f"{param[0]} ranks, {param[1]} steps",
)
def line(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    world, steps = request.param
    return run(world, on_a_line, steps, folder=tmp_path_factory.mktemp("line"))


@pytest.mark.parametrize("dimension", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_step_is_that_of_the_whole_weight(line: list[dict[Any, Any]], kind: str, dimension: int) -> None:
    for rank in line:
        assert rank[kind, dimension] == {}


@pytest.mark.parametrize("kind", REPEATED)
def test_a_dtensor_of_replicas_is_stepped_as_a_whole_weight(line: list[dict[Any, Any]], kind: str) -> None:
    for rank in line:
        assert rank["replicas"][kind] == {}


# --- norms ------------------------------------------------------------------------------------------------------------


class Widened(TorchDispatchMode):
    """The most entries that one operation makes of float64."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float64:
            self.most = max(self.most, made.numel())
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(40, 30), (3, 400), (0, 30), (30, 0)])
def test_a_squared_norm_is_that_in_float64_though_few_entries_are_at_a_time(
    shape: tuple[int, int], turned: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "AT_ONCE", 100)
    weight = 1e3 + torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    before, exact = weight.clone(), weight.double().square().sum().item()
    matrix: Any = SimpleNamespace(weight=weight.mT if turned else weight)
    with Widened() as widened:
        (found,) = pairs.squared_norms([matrix])
    assert torch.equal(weight, before) and found.item() == pytest.approx(exact, rel=1e-15)
    if dtype == torch.float32:
        assert widened.most <= max(100, matrix.weight.shape[1])


# --- a number that is none -------------------------------------------------------------------------------------------


def with_a_nan() -> dict[tuple[str, int], tuple[list[int], list[float]]]:
    """Of two weights, one with a nan among the rows of rank 0: their nans after two steps, and whether they were
    valid."""
    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {}
    for kind in ("snr", "set", "frobenius"):
        for dimension in (0, 1):
            starts = [torch.eye(40, 30) + 0.1, torch.eye(40, 30) + 0.1]
            starts[0][0, 0] = torch.nan
            params: list[Any] = [torch.nn.Parameter(distribute_tensor(x, mesh, [Shard(dimension)])) for x in starts]
            optimizer = KINDS[kind]([{"params": params}])
            for _ in range(2):
                for param in params:
                    param.grad = torch.full_like(param, 0.1)
                optimizer.step()
            optimizer.state_dict()
            nans = [int(weight.isnan().sum()) for weight in wholes(params)]
            found[kind, dimension] = nans, [float(optimizer.state[param][STATS][Stat.VALID]) for param in params]
    return found


def test_a_nan_on_one_rank_is_not_spread_and_is_seen_on_all(tmp_path: Path) -> None:
    for rank in run(2, with_a_nan, folder=tmp_path):
        assert set(map(str, rank.values())) == {str(([1, 0], [0.0, 1.0]))}
