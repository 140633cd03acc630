"""Targets of every kind: what they are, and where they are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import specopt
from specopt import LayerShapes, MatrixInfo
from specopt.rules.steering import shape_target
from tests.specopt.target_net import Net, entries, norms, of_shape, step

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")

IMAGES = torch.randn(2, 3, 16, 20, generator=torch.Generator().manual_seed(0))


def size(*shape: int) -> int:
    return math.prod(shape)


SIZES = {
    "conv.weight": (1, math.sqrt(size(8, 8, 10) / size(3, 16, 20))),
    "grouped.weight": (4, math.sqrt(size(12, 6, 8) / size(8, 8, 10))),
    "up.weight": (1, math.sqrt(size(4, 12, 16) / size(12, 6, 8))),
    "lstm.weight_ih_l0": (4, math.sqrt(5 / 4)),
    "lstm.weight_hh_l0": (4, 1.0),
    "head.weight": (1, math.sqrt(2 / 5)),
}


@pytest.mark.parametrize("given", ["inputs", "arguments", "keywords", "shapes"])
def test_size_is_the_root_of_the_layers_output_size_over_its_input_size(given: str) -> None:
    model = Net()
    options: dict[str, dict[str, Any]] = {
        "inputs": {"inputs": IMAGES},
        "arguments": {"inputs": (IMAGES,)},
        "keywords": {"inputs": {"x": IMAGES}},
        "shapes": {"shapes": specopt.record_shapes(model, IMAGES)},
    }
    groups = specopt.param_groups(model, target="size", **options[given])
    found: dict[str, Any] = {one.name: (one.matrices[0], one.target) for one in groups.decisions if one.matrices}
    assert found == {name: (count, pytest.approx(sigma)) for name, (count, sigma) in SIZES.items()}
    assert f"{SIZES['conv.weight'][1]:.4g}" in str(groups)
    optimizer = specopt.NormScaleAdamW(groups, mode="rescale")
    step(optimizer, 0)
    for name, sigma in norms(optimizer).items():
        assert sigma == pytest.approx(SIZES[name.split("[")[0]][1], rel=1e-4), name


def test_groups_are_not_split_by_target_and_hold_numbers_beside_their_params() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(140, 2))
    (matrices, biases) = specopt.param_groups(model, target="size", inputs=IMAGES)
    assert [name for name, _ in matrices["params"]] == ["0.weight", "1.weight", "3.weight"]
    assert matrices["target"] == pytest.approx([math.sqrt(4 * 63 / 960), math.sqrt(35 / 63), math.sqrt(2 / 140)])
    assert "target" not in biases and len(biases["params"]) == 3


def test_size_under_the_frobenius_norm_is_the_norm_of_a_flat_spectrum_there() -> None:
    optimizer = specopt.NormScaleAdamW(specopt.param_groups(Net(), target="size", inputs=IMAGES), norm="frobenius")
    step(optimizer, 0)
    for row in specopt.spectral_report(optimizer):
        smaller = min(row.shape[0], math.prod(row.shape[1:]))
        expected = math.sqrt(smaller) * SIZES[row.name.split("[")[0]][1]
        assert row.target == pytest.approx(expected) and row.frobenius == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bare", [False, True])
def test_size_without_sizes_says_how_to_give_them(bare: bool) -> None:
    model = Net()
    params: Any = list(model.head.parameters()) if bare else model
    with pytest.raises(ValueError, match=r'specopt\.param_groups\(model, target="size", inputs=\.\.\.\)'):
        specopt.NormScaleAdamW(params, target="size")
    with pytest.raises(ValueError, match=r'target="size" of .*weight'):
        specopt.param_groups(model, target="size")
    with pytest.raises(ValueError, match=r"inputs=\.\.\."):
        specopt.wrap(torch.optim.SGD(model.parameters(), lr=0.1), specopt.NormScale(target="size"))


def test_size_of_a_convolution_that_is_not_called_is_refused_by_name_and_an_override_helps() -> None:
    class Unused(Net):
        def __init__(self) -> None:
            super().__init__()
            self.other, self.plain = nn.Conv2d(3, 4, 3), nn.Linear(3, 12)

    with pytest.raises(ValueError, match=r"other\.weight .* overrides"):
        specopt.param_groups(Unused(), target="size", inputs=IMAGES)
    groups = specopt.param_groups(Unused(), target="size", inputs=IMAGES, overrides={"other": {"target": "fan"}})
    targets = {one.name: one.target for one in groups.decisions}
    assert targets["other.weight"] == pytest.approx(math.sqrt(4 / 27)) and targets["plain.weight"] == 2.0


def test_size_in_an_override_alone() -> None:
    groups = specopt.param_groups(Net(), inputs=IMAGES, overrides={nn.Conv2d: {"target": "size"}})
    targets = {one.name: one.target for one in groups.decisions}
    assert targets["conv.weight"] == pytest.approx(SIZES["conv.weight"][1])
    assert targets["up.weight"] == pytest.approx(math.sqrt(4 / 12))


def test_inputs_beside_shapes_and_shapes_of_another_kind_are_refused() -> None:
    shapes = {"head.weight": LayerShapes((5,), (2,))}
    with pytest.raises(ValueError, match="inputs must not be given beside shapes"):
        specopt.param_groups(Net(), target="size", inputs=IMAGES, shapes=shapes)
    with pytest.raises(TypeError, match=r"shapes must be what .*record_shapes"):
        specopt.param_groups(Net(), target="size", shapes={"head.weight": (5, 2)})  # type: ignore[dict-item]


def test_callable_is_told_name_shape_part_and_the_shape_of_the_parameter() -> None:
    seen: list[MatrixInfo] = []

    def note(matrix: MatrixInfo) -> float:
        seen.append(matrix)
        return 1.0

    specopt.param_groups(Net(), target=note)
    expected = [
        MatrixInfo("conv.weight", (8, 3, 3, 3), None, (8, 3, 3, 3)),
        *(MatrixInfo("grouped.weight", (3, 2, 3, 3), part, (12, 2, 3, 3)) for part in range(4)),
        MatrixInfo("up.weight", (4, 12, 2, 2), None, (12, 4, 2, 2)),
        *(MatrixInfo("lstm.weight_ih_l0", (5, 4), part, (20, 4)) for part in range(4)),
        *(MatrixInfo("lstm.weight_hh_l0", (5, 5), part, (20, 5)) for part in range(4)),
        MatrixInfo("head.weight", (2, 5), None, (2, 5)),
    ]
    assert seen == expected


def with_constructor(model: nn.Module) -> Any:
    return specopt.NormScaleAdamW(model, target=of_shape)


def with_param_groups(model: nn.Module) -> Any:
    return specopt.NormScaleAdamW(specopt.param_groups(model, target=of_shape))


def with_override(model: nn.Module) -> Any:
    return specopt.NormScaleAdamW(specopt.param_groups(model, overrides={"*.weight*": {"target": of_shape}}))


def with_group(model: nn.Module) -> Any:
    return specopt.NormScaleAdamW([{"params": model, "target": of_shape}])


def with_add_param_group(model: nn.Module) -> Any:
    optimizer = specopt.NormScaleAdamW([("first", nn.Parameter(torch.ones(2, 2)))])
    optimizer.add_param_group({"params": model, "target": of_shape})
    return optimizer


def with_wrap(model: nn.Module) -> Any:
    base = torch.optim.RMSprop(specopt.param_groups(model), lr=1e-2)
    return specopt.wrap(base, specopt.NormScale(target=of_shape))


WAYS = [with_constructor, with_param_groups, with_override, with_group, with_add_param_group, with_wrap]


@pytest.mark.parametrize("way", WAYS)
def test_callable_is_settled_to_numbers_when_a_group_is_added(way: Callable[[nn.Module], Any]) -> None:
    optimizer = way(Net())
    found = entries(optimizer)
    assert found["conv.weight"] == 1.5 and found["head.weight"] == 0.75
    assert found["grouped.weight"] == [0.875, 0.9375, 1.0, 1.0625]
    assert found["lstm.weight_hh_l0"] == [1.125, 1.1875, 1.25, 1.3125]
    assert not any(callable(group["target"]) for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        group["mode"] = "rescale"
    step(optimizer, 0)
    found = norms(optimizer)
    assert found["grouped.weight[2]"] == pytest.approx(1.0, rel=1e-4)
    assert found["up.weight"] == pytest.approx(1.0, rel=1e-4)
    assert found["lstm.weight_ih_l0[3]"] == pytest.approx(1.3125, rel=1e-4)


def test_bare_parameters_have_their_place_for_a_name_and_what_is_off_is_not_asked_for() -> None:
    seen = []

    def note(matrix: MatrixInfo) -> float:
        seen.append(matrix.name)
        return 2.0

    params = [nn.Parameter(torch.ones(shape)) for shape in ((3, 4), (3,), (2, 2))]
    optimizer = specopt.NormScaleAdamW(params, target=note)
    assert seen == ["0.0", "0.2"] and optimizer.param_groups[0]["target"] == [2.0, None, 2.0]
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], "spectral": False})
    assert seen[2:] == ["1.0"] and [group["target"] for group in optimizer.param_groups[1:]] == [[2.0], [None]]


def fails(matrix: MatrixInfo) -> float:
    return {"other": 1.0}[matrix.name]


NONSENSE: list[tuple[Any, str]] = [
    (lambda matrix: math.nan, "must be a positive finite number, got nan"),
    (lambda matrix: math.inf, "got inf"),
    (lambda matrix: 0, "got 0"),
    (lambda matrix: -1.5, r"got -1\.5"),
    (lambda matrix: "fan", "got 'fan'"),
    (lambda matrix: None, "got None"),
    (lambda matrix: True, "got True"),
    (lambda matrix: torch.ones(2), r"got tensor\(\[1\., 1\.\]\)"),
    (lambda matrix: torch.tensor(math.nan), r"got tensor\(nan\)"),
    (lambda matrix: torch.tensor(True), r"got tensor\(True\)"),
    (fails, r"fails for .* of shape \(2, 5\).*KeyError"),
]


@pytest.mark.parametrize(("target", "match"), NONSENSE)
def test_callable_that_returns_nonsense_is_refused_by_name_and_no_group_is_added(target: Any, match: str) -> None:
    head = nn.Linear(5, 2)
    with pytest.raises(ValueError, match=f"head.weight.*{match}|{match}"):
        specopt.param_groups(nn.ModuleDict({"head": head}), target=target)
    with pytest.raises(ValueError, match=match) as error:
        specopt.NormScaleAdamW([("head.weight", head.weight)], target=target)
    assert "head.weight" in str(error.value)
    optimizer = specopt.NormScaleAdamW([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(ValueError, match=rf"1\.0.*{match}|{match}"):
        optimizer.add_param_group({"params": [head.weight], "target": target})
    assert len(optimizer.param_groups) == 1
    base = torch.optim.SGD([head.weight], lr=0.1)
    with pytest.raises(ValueError, match=match):
        specopt.wrap(base, specopt.NormScale(target=target))
    assert type(base) is torch.optim.SGD and "target" not in base.param_groups[0]


def constant(value: Any, _: MatrixInfo) -> Any:
    return value


def test_callable_may_return_any_number() -> None:
    for value in (2, 2.0, torch.tensor(2.0), torch.tensor([2.0], dtype=torch.float64), torch.tensor(2)):
        optimizer = specopt.NormScaleAdamW(nn.Linear(3, 3), target=partial(constant, value))
        (entry,) = optimizer.param_groups[0]["target"]
        assert type(entry) is float and entry == 2.0


def test_callable_is_read_again_by_hand_where_it_is_set_during_training() -> None:
    optimizer = specopt.NormScaleAdamW(nn.Linear(3, 3, bias=False), mode="rescale")
    step(optimizer, 0)
    optimizer.param_groups[0]["target"] = lambda matrix: 3.0
    step(optimizer, 1)
    assert optimizer.param_groups[0]["target"] == [3.0]
    assert norms(optimizer)["weight"] == pytest.approx(3.0, rel=1e-4)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of four ranks, the others of which there are not."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield init_device_mesh("cpu", (4,))
    dist.destroy_process_group()


def sharded(shape: tuple[int, ...], mesh: DeviceMesh) -> nn.Parameter:
    """A quarter of the rows of a weight, as the first of four ranks has them."""
    whole = torch.randn(shape)
    local = whole[: shape[0] // 4].clone()
    return nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], shape=whole.shape, stride=whole.stride()))


def test_targets_of_a_sharded_weight_are_those_of_the_whole(mesh: DeviceMesh) -> None:
    class Sharded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.lstm, self.head = nn.Conv2d(8, 16, 3), nn.LSTM(4, 8), nn.Linear(4, 32)
            self.conv.weight = sharded((16, 8, 3, 3), mesh)
            self.head.weight = sharded((32, 4), mesh)
            self.lstm.weight_ih_l0 = sharded((32, 4), mesh)

    model = Sharded()
    assert isinstance(model.head.weight, DTensor) and model.head.weight.to_local().shape == (8, 4)
    seen: list[MatrixInfo] = []

    def note(matrix: MatrixInfo) -> float:
        seen.append(matrix)
        return 1.0

    specopt.param_groups(model, target=note)
    shapes = {(info.name, info.part): info.shape for info in seen}
    assert shapes["conv.weight", None] == (16, 8, 3, 3) and shapes["head.weight", None] == (32, 4)
    assert shapes["lstm.weight_ih_l0", 3] == (8, 4)
    recorded = {"conv.weight": LayerShapes((8, 16, 16), (16, 8, 8))}
    for target, conv in (("channels", 2**0.5), ("fan", (16 / 72) ** 0.5), ("size", 0.5**0.5)):
        groups = specopt.param_groups(model, target=target, shapes=recorded)
        found = {one.name: one.target for one in groups.decisions}
        assert found["conv.weight"] == pytest.approx(conv) and found["head.weight"] == pytest.approx(8**0.5)
    optimizer = specopt.NormScaleAdamW([model.head.weight, sharded((4, 36), mesh)])
    assert [shape_target(matrix) for matrix in optimizer.matrices(with_grad=False)] == pytest.approx([8**0.5, 1 / 3])
