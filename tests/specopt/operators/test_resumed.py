"""What a checkpoint keeps of operators, on inputs of the same size and of another."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

import specopt
from specopt import LayerShapes
from tests.specopt.operators.networks import OTHERS, SIZE, exact, groups_of, model, step


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_saved_state_goes_on_to_the_same_bits(name: str, dtype: torch.dtype) -> None:
    network = model(dtype)
    optimizer = OTHERS[name](groups_of(network))
    for number in range(3):
        step(network, optimizer, number)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(network)
    loaded = OTHERS[name](groups_of(other))
    loaded.load_state_dict(torch.load(file, weights_only=True))
    copied = copy.deepcopy((network, optimizer))
    for pair in ((network, optimizer), (other, loaded), copied):
        step(*pair, 3)
    for third in (other, copied[0]):
        assert all(torch.equal(a, b) for a, b in zip(network.parameters(), third.parameters(), strict=True))
    block = loaded.state[other[0].weight]["spectral_operator"]
    assert block.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_a_distributed_checkpoint_brings_geometries_and_blocks(flat: bool) -> None:
    network = model()
    optimizer = OTHERS["cap"](groups_of(network))
    for number in range(3):
        step(network, optimizer, number)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    saved = copy.deepcopy(get_optimizer_state_dict(network, optimizer, options=options))
    other = copy.deepcopy(network)
    loaded = OTHERS["cap"](groups_of(other))
    set_optimizer_state_dict(other, loaded, saved, options=options)
    for pair in ((network, optimizer), (other, loaded)):
        step(*pair, 3)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))


def test_state_of_another_kernel_is_refused() -> None:
    network = model()
    optimizer = OTHERS["cap"](groups_of(network))
    step(network, optimizer)
    saved = optimizer.state_dict()
    saved["state"] = copy.deepcopy(saved["state"])
    for state in saved["state"].values():
        if "spectral_operator" in state:
            state["spectral_operator"] = state["spectral_operator"][:-1]
    with pytest.raises(ValueError, match="spectral_operator of parameter"):
        optimizer.load_state_dict(saved)


def resized(size: int, network: nn.Module, name: str, **options: Any) -> Any:
    shapes = {layer: LayerShapes((c, size, size), (0,)) for layer, c in (("0.weight", 2), ("2.weight", 4))}
    return OTHERS[name](specopt.param_groups(network, conv="operator", shapes=shapes, **options))


def nudge(network: nn.Module, optimizer: Optimizer, seed: int) -> None:
    """A step on random gradients, for networks that take inputs of any size."""
    generator = torch.Generator().manual_seed(seed)
    for param in network.parameters():
        param.grad = torch.randn(param.shape, generator=generator).to(param)
    optimizer.step()


@pytest.mark.parametrize("size", [5, 9])
@pytest.mark.parametrize("name", OTHERS)
def test_after_training_on_inputs_of_another_size_the_groups_own_geometry_counts(name: str, size: int) -> None:
    network = model()
    first = resized(size, network, name)
    nudge(network, first, 0)
    second = resized(SIZE[0], network, name)
    geometries = [group["geometry"] for group in second.param_groups]
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert [group["geometry"] for group in second.param_groups] == geometries
    nudge(network, second, 1)
    assert [second.state[network[i].weight]["spectral_step"] for i in (0, 2)] == [1, 1]  # cold
    rows = {row.name: row.sigma for row in specopt.spectral_report(second)}
    assert [rows[f"{i}.weight"] for i in (0, 2)] == pytest.approx(exact(network), rel=1e-3)
    if name == "cap":
        assert max(exact(network)) <= 1 + 1e-3


def test_an_initial_norm_of_inputs_of_another_size_is_noted_anew() -> None:
    network = model()
    first = resized(3, network, "rescale", target="initial")
    nudge(network, first, 0)
    second = resized(SIZE[0], network, "rescale", target="initial")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    before = exact(network)
    nudge(network, second, 1)
    noted = [float(second.state[network[i].weight]["spectral_initial_operator"]) for i in (0, 2)]
    assert noted == pytest.approx(before, rel=2e-3)
    assert exact(network) == pytest.approx(before, rel=2e-3)


def test_a_group_without_a_geometry_takes_the_checkpoint_s() -> None:
    network = model()
    first = OTHERS["cap"](groups_of(network))
    step(network, first)
    saved = copy.deepcopy(first.state_dict())
    second = OTHERS["cap"](groups_of(network))
    for group in second.param_groups:
        group.update(conv="matrix", geometry=None)
    second.load_state_dict(saved)
    assert [group["geometry"] for group in second.param_groups] == [g["geometry"] for g in saved["param_groups"]]
    step(network, second, 1)
    assert second.state[network[0].weight]["spectral_step"] == 2


def test_a_state_of_the_same_size_of_input_goes_on() -> None:
    network = model()
    first = resized(SIZE[0], network, "cap")
    nudge(network, first, 0)
    second = resized(SIZE[0], network, "cap")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    nudge(network, second, 1)
    assert second.state[network[0].weight]["spectral_step"] == 2
