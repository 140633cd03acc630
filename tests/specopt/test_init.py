"""scaled_orthogonal_: every matrix of every view starts at its target."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import specopt
from specopt import MatrixInfo
from specopt.views.parts import parse, pieces


class Net(nn.Module):
    """A layer of each kind of view, and what is to be left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(5, 6)
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4, padding=1)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12)
        self.pointwise = nn.Conv2d(12, 10, 1)
        self.up = nn.ConvTranspose2d(10, 6, 2, stride=2)
        self.up_grouped = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.qkv = nn.Linear(4, 12)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.lstm = nn.LSTM(4, 5, batch_first=True)
        self.bilinear = nn.Bilinear(5, 5, 7)
        self.column, self.row, self.single = nn.Linear(1, 9), nn.Linear(9, 1), nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pointwise(self.depthwise(self.grouped(self.norm(self.conv(x)))))
        x = self.up_grouped(self.up(x)).flatten(2).mT
        x = self.qkv(x)[..., :4]
        x = self.lstm(self.attention(x, x, x)[0])[0]
        return self.single(self.row(self.column(self.bilinear(x, x)[..., :1])))  # type: ignore[no-any-return]


IMAGES = torch.zeros(1, 3, 16, 16)
QKV: dict[Any, dict[str, Any]] = {"qkv.weight": {"view": "rows:3"}}


def of_shape(matrix: MatrixInfo) -> float:
    return 0.1 + matrix.shape[0] + (matrix.part or 0)


def sigmas(groups: Any) -> dict[str, list[tuple[float, float]]]:
    """(largest, smallest) singular value of every controlled matrix, in float64, by parameter."""
    found: dict[str, list[tuple[float, float]]] = {}
    for group in groups:
        for name, param in group["params"]:
            if group.get("spectral", True):
                parts = pieces(param.detach().double(), parse(group["view"]))
                values = [torch.linalg.svdvals(part.flatten(1)) for part in parts]
                found[name] = [(float(s[0]), float(s[-1])) for s in values]
    return found


def wanted(groups: Any) -> dict[str, list[float]]:
    targets = {}
    for decision in groups.decisions:
        if decision.matrices is not None:
            several = isinstance(decision.target, tuple)
            targets[decision.name] = list(decision.target) if several else [decision.target] * decision.matrices[0]
    return targets


TARGETS: dict[str, dict[str, Any]] = {
    "channels": {},
    "fan": {"target": "fan"},
    "size": {"target": "size", "inputs": IMAGES},
    "a number": {"target": 0.37},
    "a callable": {"target": of_shape},
    "a list": {"overrides": {**QKV, nn.LSTM: {"target": [0.5, 1.0, 2.0, 4.0]}}},
    "turned off": {"overrides": {**QKV, nn.LSTM: {"spectral": False}}},
}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("gain", [1.0, 0.3])
def test_all_singular_values_are_the_target_to_1e_5(kind: str, gain: float) -> None:
    options = {"overrides": QKV, **TARGETS[kind]}
    model = Net()
    groups = specopt.param_groups(model, **options)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    assert specopt.init.scaled_orthogonal_(model, gain, **options) is model
    targets, found = wanted(groups), sigmas(groups)
    assert found.keys() == targets.keys() >= {"conv.weight", "up_grouped.weight", "attention.in_proj_weight"}
    for name, values in found.items():
        for (largest, smallest), target in zip(values, targets[name], strict=True):
            assert largest == pytest.approx(gain * target, rel=1e-5), name
            assert smallest == pytest.approx(gain * target, rel=1e-5), name
    for name, param in model.named_parameters():
        assert torch.equal(param.detach(), before[name]) == (name not in found), name


def test_optimizer_on_the_same_targets_finds_every_norm_at_its_target() -> None:
    model = specopt.init.scaled_orthogonal_(Net(), seed=1, target="size", overrides=QKV, inputs=IMAGES)
    groups = specopt.param_groups(model, target="size", overrides=QKV, inputs=IMAGES)
    rows = specopt.spectral_report(specopt.NormScaleAdamW(groups))
    assert len(rows) > 20 and all(row.sigma == pytest.approx(row.target, rel=1e-5) for row in rows)


@pytest.mark.parametrize("shape", [(2000, 2000), (2000, 1), (1, 2000), (1, 1), (1500, 300), (300, 1500)], ids=str)
def test_large_and_thin_matrices_are_at_their_target_to_1e_5(shape: tuple[int, int]) -> None:
    layer = nn.Linear(shape[1], shape[0], bias=False)
    specopt.init.scaled_orthogonal_(layer, seed=0)
    weight = layer.weight.detach().double()
    values = torch.linalg.eigvalsh(weight @ weight.mT if shape[0] < shape[1] else weight.mT @ weight).sqrt()
    assert float((values / math.sqrt(shape[0] / shape[1]) - 1).abs().max()) <= 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_other_dtypes_are_as_close_as_one_rounding_of_the_entries(dtype: torch.dtype, bound: float) -> None:
    model = specopt.init.scaled_orthogonal_(nn.Linear(200, 300).to(dtype), seed=0)
    values = torch.linalg.svdvals(model.weight.detach().double())  # type: ignore[operator]
    assert float((values / math.sqrt(1.5) - 1).abs().max()) <= bound


@pytest.mark.parametrize("gain", [1e-30, 1e30])
def test_gains_of_any_size_are_met(gain: float) -> None:
    layer = nn.Linear(30, 20)
    specopt.init.scaled_orthogonal_(layer, gain, seed=0)
    values = torch.linalg.svdvals(layer.weight.detach().double())
    assert torch.allclose(values / gain, torch.full_like(values, (20 / 30) ** 0.5), rtol=1e-5)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters() if param.ndim > 1}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a.keys() & b.keys())


SEEDS: dict[str, Callable[[nn.Module, int], Any]] = {
    "generator": lambda model, seed: specopt.init.scaled_orthogonal_(model, 1.0, torch.Generator().manual_seed(seed)),
    "seed": lambda model, seed: specopt.init.scaled_orthogonal_(model, seed=seed),
    "global": lambda model, seed: (torch.manual_seed(seed), specopt.init.scaled_orthogonal_(model)),
}


@pytest.mark.parametrize("how", SEEDS)
def test_the_same_seed_gives_the_same_bits_again_and_another_seed_others(how: str) -> None:
    model = Net()
    found = []
    for seed in (3, 3, 4):
        SEEDS[how](model, seed)
        found.append(weights(model))
    assert equal(found[0], found[1])
    assert all(
        torch.equal(found[0][name], found[2][name]) == (name == "tokens.weight") or found[0][name].numel() <= 9
        for name in found[0]
    )


@pytest.mark.parametrize("how", ["generator", "seed"])
def test_torchs_random_state_is_left_alone_where_another_source_is_given(how: str) -> None:
    model = Net()
    before = torch.random.get_rng_state()
    SEEDS[how](model, 3)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_seed_gives_a_layer_the_same_bits_whatever_other_layers_there_are() -> None:
    layers = {name: nn.Linear(4, 4) for name in "abc"}
    whole = weights(specopt.init.scaled_orthogonal_(nn.ModuleDict(layers), seed=5))
    turned = weights(specopt.init.scaled_orthogonal_(nn.ModuleDict({"c": layers["c"], "a": layers["a"]}), seed=5))
    assert turned.keys() == {"a.weight", "c.weight"} and equal(whole, turned)
    assert not torch.equal(whole["a.weight"], whole["b.weight"])


def test_gates_of_one_parameter_differ() -> None:
    lstm = nn.LSTM(5, 5)
    specopt.init.scaled_orthogonal_(lstm, seed=0)
    gates = weights(lstm)["weight_hh_l0"].chunk(4)
    assert not any(torch.equal(gates[0], other) for other in gates[1:])


def test_tied_weight_is_made_once_and_stays_tied() -> None:
    first, second, alone = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    specopt.init.scaled_orthogonal_(nn.Sequential(first, second), seed=0)
    assert second.weight is first.weight
    specopt.init.scaled_orthogonal_(nn.Sequential(alone), seed=0)
    assert torch.equal(first.weight, alone.weight)


def test_frozen_weights_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10)).requires_grad_(False)
    model[1].requires_grad_(True)
    before = [layer.weight.clone() for layer in model]
    specopt.init.scaled_orthogonal_(model)
    assert torch.equal(model[0].weight, before[0]) and not torch.equal(model[1].weight, before[1])


def test_strided_weights_are_filled_in_place() -> None:
    conv = nn.Conv2d(4, 6, 3)
    conv.weight = nn.Parameter(conv.weight.detach().to(memory_format=torch.channels_last))
    place, strides = conv.weight.data_ptr(), conv.weight.stride()
    specopt.init.scaled_orthogonal_(conv, seed=0)
    assert (conv.weight.data_ptr(), conv.weight.stride()) == (place, strides)
    values = torch.linalg.svdvals(conv.weight.detach().double().flatten(1))
    assert torch.allclose(values, torch.full_like(values, 1.5**0.5), rtol=1e-5)


def test_what_makes_no_sense_is_refused_and_nothing_has_changed() -> None:
    model = Net()
    before = weights(model)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"gain": 0.0}, "gain must be .* got 0.0"),
        ({"gain": math.nan}, "gain must be .* got nan"),
        ({"gain": "large"}, "gain must be .* got 'large'"),
        ({"seed": 1.5}, r"seed must be an integer, got 1\.5"),
        ({"target": "initial"}, r"target of conv\.weight .* 'initial'"),
        ({"target": "chanels"}, "target must be one of .* 'chanels'"),
        ({"target": "size"}, r'target="size" of conv\.weight needs .* inputs='),
        ({"target": -1.0}, "target must be .* -1.0"),
        ({"target": [1.0]}, "target must be one for all groups"),
        ({"target": lambda matrix: math.nan}, r"target of conv\.weight must be .* nan"),
        ({"seed": 1, "generator": torch.Generator()}, "seed must not be given beside a generator, got 1"),
        ({"overrides": {"tokens": {"target": 2.0}}}, r"overrides\['tokens'\].*tokens\.weight"),
    ]
    for options, match in wrong:
        with pytest.raises(ValueError, match=match):
            specopt.init.scaled_orthogonal_(model, **options)
    assert equal(before, weights(model))


def test_weights_without_memory_are_passed_over() -> None:
    without: list[dict[str, Any]] = [{}, {"seed": 0}]
    for options in without:
        specopt.init.scaled_orthogonal_(nn.Linear(3, 2, device="meta"), **options)


def test_parametrized_weight_is_refused_by_name_unless_it_is_turned_off() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    before = weights(model)
    with pytest.raises(ValueError, match=r"1\.parametrizations\.weight\.original0: parametrized by WeightNorm"):
        specopt.init.scaled_orthogonal_(model)
    assert equal(before, weights(model))
    specopt.init.scaled_orthogonal_(model, overrides={"1": {"spectral": False}})
    assert equal({name: value for name, value in before.items() if name[0] == "1"}, weights(model))
