"""Initialization of weights that are cut up already, as they are where a model is too large to be made whole."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import specopt
from tests.specopt.sharding.ranks import run
from tests.specopt.sharding.twins import wholes


def model_of() -> nn.Module:
    """Parameters of one matrix and of several, along either dimension; of the rows of one a rank of three has none."""
    layers: list[nn.Module] = [
        nn.Linear(7, 11),
        nn.Linear(8, 2, bias=False),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.ConvTranspose2d(6, 4, 3, groups=2),
        nn.Bilinear(3, 4, 5),
        nn.MultiheadAttention(8, 2),
        nn.GRU(5, 6),
    ]
    return nn.Sequential(*layers)


def initialized() -> dict[str, Any]:
    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    whole = specopt.init.scaled_orthogonal_(model_of(), seed=3)
    found: dict[str, Any] = {}
    with torch.device("meta"):
        late = model_of()
    fully_shard(late, mesh=mesh)
    torch.manual_seed(0)
    late.to_empty(device="cpu")
    specopt.init.scaled_orthogonal_(late, seed=3)
    found["fully_shard"] = differing(late, whole)
    for place in (Shard(1), Replicate()):
        other = model_of()
        for name, param in list(other.named_parameters()):
            owner = other.get_submodule(name.rpartition(".")[0])
            if param.ndim > 1:
                owner._parameters[name.rpartition(".")[2]] = nn.Parameter(distribute_tensor(param, mesh, [place]))
        specopt.init.scaled_orthogonal_(other, seed=3)
        found[str(place)] = differing(other, whole)
    try:
        specopt.init.scaled_orthogonal_(late)
    except ValueError as error:
        found["refused"] = str(error)
    return found


def differing(model: nn.Module, whole: nn.Module) -> list[str]:
    """Names of the weights that are not the same bits in both."""
    names, params = zip(*((name, param) for name, param in model.named_parameters() if param.ndim > 1), strict=True)
    wanted = dict(whole.named_parameters())
    return [name for name, param in zip(names, wholes(params), strict=True) if not torch.equal(param, wanted[name])]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(3, initialized, folder=Path(tmp_path_factory.mktemp("initialized")))


@pytest.mark.parametrize("kind", ["fully_shard", "S(1)", "R"])
def test_every_rank_has_its_part_of_what_the_seed_gives_the_whole_model(found: list[dict[str, Any]], kind: str) -> None:
    assert all(rank[kind] == [] for rank in found)


def test_without_a_seed_it_is_said_what_to_do(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert "seed must be an integer for the DTensor 0.weight" in rank["refused"]
        assert "before fully_shard" in rank["refused"]
