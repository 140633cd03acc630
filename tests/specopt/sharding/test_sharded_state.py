"""The state of sharded weights: saved by some ranks, it is loaded by others."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import specopt
from specopt.tracker.common import BLOCK, LEFT, PROBE, RIGHT, STATS, STEP, Stat
from tests.specopt.sharding.ranks import run
from tests.specopt.sharding.saved import load_from, save_to
from tests.specopt.sharding.twins import wholes

FEW: dict[str, Any] = {"block": 8, "max_passes": 4}
KINDS: dict[str, Callable[[Any], Any]] = {
    "snr": lambda groups: specopt.SNRSGD(groups, lr=0.05, momentum=0.9, snr_lambda=0.05, **FEW),
    "set": lambda groups: specopt.NormScaleAdamW(groups, lr=2e-3, **FEW),
}
BLOCKS = (BLOCK, PROBE, LEFT, RIGHT)
BEFORE, AFTER = 3, 3
"""Steps up to the checkpoint, and beyond it."""


def model_of(kind: str, *, seed: int = 0) -> tuple[nn.Module, Any]:
    """A model, sharded where there are ranks to share it, and its optimizer."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(30, 37), nn.Tanh(), nn.Linear(37, 22), nn.Tanh(), nn.Linear(22, 3))
    if dist.get_world_size() > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, KINDS[kind](specopt.param_groups(model))


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        inputs, labels = torch.randn(8, 30, generator=generator), torch.randint(3, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [weight.clone() for weight in wholes(list(model.parameters()))]


def save(folder: Path) -> dict[str, Any]:
    """Trains, saves half-way, and goes on: the weights at the checkpoint and at the end."""
    warnings.simplefilter("ignore")
    found = {}
    for kind in KINDS:
        model, optimizer = model_of(kind)
        train(model, optimizer, range(BEFORE))
        half = weights(model)
        save_to(folder / kind, model, optimizer)
        assert all(map(torch.equal, weights(model), half)), "saving has moved a weight"
        train(model, optimizer, range(BEFORE, BEFORE + AFTER))
        found[kind] = half, weights(model)
    return found


def load(folder: Path) -> dict[str, Any]:
    """Loads that and goes on from there, another model of this many ranks."""
    warnings.simplefilter("ignore")
    found = {}
    for kind in KINDS:
        model, optimizer = model_of(kind, seed=1)
        load_from(folder / kind, model, optimizer)
        half = weights(model)
        param = next(iter(model.parameters()))
        counts = optimizer.state[param][STEP], float(optimizer.state[param][STATS][Stat.COUNT])
        train(model, optimizer, range(BEFORE, BEFORE + AFTER))
        found[kind] = half, weights(model), counts
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("saved")
    found: dict[str, Any] = run(4, save, folder, folder=tmp_path_factory.mktemp("ranks"))[0]
    return folder, found


@pytest.mark.parametrize("world", [1, 2])
def test_a_checkpoint_of_four_ranks_goes_on_where_it_was_on_fewer(
    saved: tuple[Path, dict[str, Any]], world: int, tmp_path: Path
) -> None:
    folder, found = saved
    for rank in run(world, load, folder, folder=tmp_path):
        for kind in KINDS:
            half, end, counts = rank[kind]
            assert counts == (BEFORE, BEFORE)
            for mine, theirs in zip(half, found[kind][0], strict=True):
                assert torch.equal(mine, theirs), "loading has changed a weight"
            for mine, theirs in zip(end, found[kind][1], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def square_goes_on_whole() -> list[float]:
    """Errors of sigma_1 in the first steps of a whole weight that goes on from the state of one cut by columns."""
    warnings.simplefilter("ignore")
    mesh, generator = init_device_mesh("cpu", (2,)), torch.Generator().manual_seed(0)
    start = torch.randn(96, 96, generator=generator)
    start /= torch.linalg.matrix_norm(start, 2)
    part = nn.Parameter(distribute_tensor(start, mesh, [Shard(1)]))
    sharded = specopt.NormScaleAdamW([part], lr=1e-3, target=1.0)
    for _ in range(40):
        part.grad = distribute_tensor(0.1 * torch.randn(96, 96, generator=generator), mesh, [Shard(1)])
        sharded.step()
    whole = nn.Parameter(wholes([part])[0].clone())
    optimizer = specopt.NormScaleAdamW([whole], lr=1e-3, target=1.0)
    state = sharded.state_dict()
    entries = {
        key: wholes([value])[0] if isinstance(value, torch.Tensor) else value
        for key, value in state["state"][0].items()
    }
    optimizer.load_state_dict({**state, "state": {0: entries}})
    errors = []
    for _ in range(4):
        whole.grad = 0.1 * torch.randn(96, 96, generator=generator)
        optimizer.step()
        found = torch.linalg.svdvals(whole.detach().double())[0]
        errors.append(float(found) - 1)
    return errors


def test_a_square_weight_that_was_cut_by_columns_goes_on_whole(tmp_path: Path) -> None:
    for errors in run(2, square_goes_on_whole, folder=tmp_path):
        assert max(errors) < 4e-3


ELSEWHERE: dict[str, Callable[[Any], Any]] = {
    "cut by columns": lambda groups: specopt.NormScaleAdamW(groups, lr=1e-3, target="initial", **FEW),
    "a penalty's triplet": lambda groups: specopt.wrap(
        torch.optim.AdamW(groups, lr=1e-3),
        specopt.Compose(specopt.SpectralPenalty(0.1, **FEW), specopt.NormScale(mode="cap", target=0.5, **FEW)),
    ),
}
"""Whose blocks are laid out otherwise where the weight is whole."""


def leaves_blocks_out(folder: Path) -> dict[str, tuple[bool, bool, bool]]:
    """Of a checkpoint of shards: whether a whole weight is refused all of it, and, without the blocks, whether it has
    the shards' weight and other state, and whether it trains on."""
    warnings.simplefilter("ignore")
    found = {}
    for name, make in ELSEWHERE.items():
        models = nn.Linear(30, 40, bias=False), nn.Linear(30, 40, bias=False)
        place = Shard(1 if name == "cut by columns" else 0)
        fully_shard(models[0], mesh=init_device_mesh("cpu", (2,)), shard_placement_fn=lambda param, place=place: place)
        optimizers = [make(model.parameters()) for model in models]
        for model, optimizer in zip(models, optimizers, strict=True):
            model(torch.ones(4, 30)).square().mean().backward()
            optimizer.step()
        save_to(folder / name, models[0], optimizers[0])
        try:
            load_from(folder / name, models[1], optimizers[1])
            refused = False
        except checkpoint.CheckpointException as error:  # no Exception
            refused = "Size mismatch" in str(error) or "Missing key" in str(error)
        load_from(folder / name, models[1], optimizers[1], without=BLOCKS)
        (saved,), (loaded,) = (list(optimizer.state.values()) for optimizer in optimizers)
        kept = [key for key, value in saved.items() if key not in BLOCKS and isinstance(value, torch.Tensor)]
        same = all(torch.equal(wholes([saved[key]])[0], loaded[key]) for key in kept)
        same &= torch.equal(weights(models[0])[0], models[1].weight)
        optimizers[1].step()
        goes_on = float(loaded["step"]) == 2 and bool(models[1].weight.isfinite().all())
        found[name] = refused, same, goes_on
    return found


def test_a_checkpoint_of_another_layout_loads_without_the_blocks_as_the_documents_say(tmp_path: Path) -> None:
    for found in run(2, leaves_blocks_out, tmp_path / "saved", folder=tmp_path):
        assert found == dict.fromkeys(ELSEWHERE, (True, True, True))
