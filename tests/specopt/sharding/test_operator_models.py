"""Models under ``fully_shard`` whose convolutions are controlled as operators: steps, and checkpoints."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import specopt
from specopt.rules.operator import OPERATOR
from specopt.tracker.common import STATS, STEP, Stat
from tests.specopt.sharding.ranks import run
from tests.specopt.sharding.saved import load_from, save_to
from tests.specopt.sharding.test_fully_shard import POLICIES, assert_close
from tests.specopt.sharding.twins import Gap, Twins, wholes

FEW: dict[str, Any] = {"block": 8, "max_passes": 2}
KINDS: dict[str, Callable[[Any], Any]] = {
    "snr": lambda groups: specopt.SNRSGD(groups, lr=0.05, momentum=0.9, snr_lambda=0.1, **FEW),
    "cap": lambda groups: specopt.NormScaleAdamW(groups, lr=2e-3, mode="cap", target=0.8, **FEW),
}
BEFORE, AFTER = 2, 2
"""Steps up to the checkpoint, and beyond it."""


class Net(nn.Module):
    """Of so few channels that some of four ranks have nothing of a kernel, and a head that is a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"), nn.GroupNorm(1, 5)
        self.down, self.up = nn.Conv2d(5, 2, 3, stride=2), nn.ConvTranspose2d(2, 5, 3, stride=2)
        self.head = nn.Linear(5, 20)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(images)))
        out: Tensor = self.head((x + self.up(torch.tanh(self.down(x)))).mean((2, 3)))
        return out

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(4, 3, 7, 7, generator=generator)
        return nn.functional.cross_entropy(self(images), torch.randint(20, (4,), generator=generator))


def groups_of(model: Net, shapes: Any) -> Any:
    return specopt.param_groups(model, conv="operator", shapes=shapes)


def shapes_of(model: Net) -> Any:
    return specopt.record_shapes(model, torch.zeros(1, 3, 7, 7))


def kernels_of(model: Net) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, param) for name, param in model.named_parameters() if param.ndim == 4)


# --- steps ----------------------------------------------------------------------------------------------------------


def training(kind: str, mesh: Any, steps: int, **policy: Any) -> list[list[Gap]]:
    """By step and parameter how the step of the sharded model differs from that of the whole one."""
    torch.manual_seed(0)
    model = Net()
    whole, shapes = copy.deepcopy(model), shapes_of(model)
    fully_shard(model.stem, mesh=mesh, **policy)
    fully_shard(model, mesh=mesh, **policy)
    optimizers = [KINDS[kind](groups_of(one, shapes)) for one in (model, whole)]
    sharded, plain = ([p for group in one.param_groups for p in group["params"]] for one in optimizers)
    assert all(isinstance(param, DTensor) for param in sharded)
    twins = Twins(*optimizers, sharded, plain)
    found = []
    for step in range(steps):  # the same data on every rank: gradients are those of one
        optimizers[0].zero_grad()
        model.loss(step).backward()
        found.append(twins.step())
    followed = [optimizers[0].state[param].get(OPERATOR) is not None for param in sharded]
    assert sum(followed) == 3
    return found


def trainings(steps: int) -> dict[Any, list[list[Gap]]]:
    warnings.simplefilter("ignore")
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    found = {(kind, "shards"): training(kind, mesh, steps) for kind in KINDS}
    if world == 4:
        plane = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
        found |= {(kind, "replicas of shards"): training(kind, plane, steps) for kind in KINDS}
    for name, policy in POLICIES.items():
        found |= {(kind, name): training(kind, mesh, 2, **policy) for kind in KINDS}
    return found


@pytest.mark.parametrize(
    ("world", "steps"), [(2, 4), *(pytest.param(count, 20, marks=pytest.mark.full) for count in (2, 3, 4))]
)
def test_each_step_of_a_fully_sharded_model_is_that_of_the_whole_one(world: int, steps: int, tmp_path: Path) -> None:
    for rank in run(world, trainings, steps, folder=tmp_path):
        for (_, name), gaps in rank.items():
            assert_close(gaps, 2 if name in POLICIES else steps)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def made(kind: str, seed: int) -> tuple[Net, Any]:
    """A model, sharded where there are ranks to share it, and its optimizer."""
    torch.manual_seed(seed)
    model = Net()
    shapes = shapes_of(model)
    if dist.get_world_size() > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, KINDS[kind](groups_of(model, shapes))


def train(model: Net, optimizer: Any, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model.loss(step).backward()
        optimizer.step()


def weights(model: Net) -> list[Tensor]:
    return [weight.clone() for weight in wholes(list(model.parameters()))]


def blocks(model: Net, optimizer: Any) -> dict[str, Tensor]:
    return {name: optimizer.state[param][OPERATOR].clone() for name, param in kernels_of(model)}


def save(folder: Path) -> dict[str, Any]:
    """Trains, saves half-way, and goes on: weights and blocks at the checkpoint, and weights at the end."""
    warnings.simplefilter("ignore")
    found = {}
    for kind in KINDS:
        model, optimizer = made(kind, seed=0)
        train(model, optimizer, range(BEFORE))
        half = weights(model), blocks(model, optimizer)
        save_to(folder / kind, model, optimizer)
        train(model, optimizer, range(BEFORE, BEFORE + AFTER))
        found[kind] = *half, weights(model)
    return found


def load(folder: Path) -> dict[str, Any]:
    """Loads that and goes on from there, another model of this many ranks."""
    warnings.simplefilter("ignore")
    found = {}
    for kind in KINDS:
        model, optimizer = made(kind, seed=1)
        load_from(folder / kind, model, optimizer)
        half = weights(model), blocks(model, optimizer)
        counts = [
            (optimizer.state[p][STEP], float(optimizer.state[p][STATS][Stat.COUNT])) for _, p in kernels_of(model)
        ]
        train(model, optimizer, range(BEFORE, BEFORE + AFTER))
        found[kind] = *half, weights(model), counts
    return found


@pytest.mark.parametrize(("saving", "loading"), [(4, 2), (2, 1), (1, 2), pytest.param(1, 4, marks=pytest.mark.full)])
def test_a_checkpoint_goes_on_where_it_was_on_other_ranks(saving: int, loading: int, tmp_path: Path) -> None:
    for name in ("saving", "loading"):
        (tmp_path / name).mkdir()
    saved: dict[str, Any] = run(saving, save, tmp_path, folder=tmp_path / "saving")[0]
    for rank in run(loading, load, tmp_path, folder=tmp_path / "loading"):
        for kind in KINDS:
            (half, followed, end, counts), (old, before, after) = rank[kind], saved[kind]
            assert counts == [(BEFORE, BEFORE)] * 3
            assert all(map(torch.equal, half, old)), "loading has changed a weight"
            assert all(torch.equal(followed[name], before[name]) for name in before)
            for mine, theirs in zip(end, after, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
