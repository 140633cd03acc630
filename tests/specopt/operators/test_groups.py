"""Groups of ``conv="operator"``: how they are made, and what is refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import specopt
from specopt import LayerShapes
from specopt.operators import parse
from tests.specopt.operators.networks import SHAPES, groups_of, model


def test_param_groups_writes_the_geometries_beside_the_params() -> None:
    found = {}
    for group in groups_of(model()):
        for (name, _), text in zip(
            group["params"], group.get("geometry") or [None] * len(group["params"]), strict=True
        ):
            found[name] = text
    assert found["0.weight"] == "conv2d(7x7, padding=1x1, mode=circular)"
    assert found["2.weight"] == "conv2d(7x7, stride=2x2, groups=2)"
    assert found["4.weight"] is None
    assert parse(found["2.weight"]).groups == 2


def test_weights_of_three_dimensions_that_are_no_convolution_stay_matrices() -> None:
    network = nn.ModuleDict({"conv": nn.Conv2d(2, 4, 3), "mix": nn.Bilinear(5, 6, 7)})
    shapes = {"conv.weight": SHAPES["0.weight"]}
    optimizer = specopt.SNRSGD(specopt.param_groups(network, conv="operator", shapes=shapes))
    rows = {row.name: row for row in specopt.spectral_report(optimizer)}
    exact_norm = torch.linalg.matrix_norm(network["mix"].weight.detach().flatten(1), ord=2)
    assert rows["mix.weight"].sigma == pytest.approx(float(exact_norm), rel=1e-3)
    assert rows["conv.weight"].stable_rank != rows["conv.weight"].stable_rank


def test_a_convolution_of_unknown_size_is_named() -> None:
    with pytest.raises(ValueError, match=r"2\.weight is a convolution.*size of its input"):
        specopt.param_groups(model(), conv="operator", shapes={"0.weight": SHAPES["0.weight"]})
    with pytest.raises(ValueError, match=r"0\.weight is a convolution"):
        specopt.param_groups(model(), conv="operator")
    with pytest.raises(ValueError, match=r"0\.weight: size"):
        shapes = {**SHAPES, "0.weight": LayerShapes((2, 7), (0,))}
        specopt.param_groups(model(), conv="operator", shapes=shapes)


class Tied(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1, **options)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.other(self.one(x))
        return result


def test_a_kernel_of_different_convolutions_is_named() -> None:
    inputs = torch.randn(1, 3, 12, 12)
    with pytest.raises(ValueError, match=r"one\.weight is the kernel of different convolutions, .*stride=3x3"):
        specopt.param_groups(Tied(stride=3), conv="operator", inputs=inputs)
    (group, *_) = specopt.param_groups(Tied(), conv="operator", inputs=inputs)
    assert group["geometry"] == ["conv2d(12x12, padding=1x1)"]


def test_another_kind_of_control_is_refused() -> None:
    with pytest.raises(ValueError, match="conv must be one of 'matrix', 'operator', got 'op'"):
        specopt.param_groups(model(), conv="op")


def test_operator_without_a_geometry_is_refused_by_the_optimizer_too() -> None:
    conv = nn.Conv2d(2, 4, 3)
    group = {"params": [("body.weight", conv.weight)], "conv": "operator"}
    with pytest.raises(ValueError, match=r"body\.weight of shape .* needs a geometry"):
        specopt.SNRSGD([group])
    with pytest.raises(ValueError, match="needs a geometry"):
        specopt.wrap(torch.optim.SGD([group], lr=0.1), specopt.SpectralPenalty(0.1))


@pytest.mark.parametrize(("geometry", "named"), [(None, "needs a geometry"), ([], "entry for each of 2 params")])
def test_what_no_operator_can_be_made_of_is_refused_where_it_was_set_in_a_group(geometry: Any, named: str) -> None:
    conv = nn.Conv2d(2, 4, 3)
    optimizer = specopt.NormScaleAdamW(conv.parameters(), lr=1e-3, mode="cap")
    conv(torch.ones(1, 2, 5, 5)).sum().backward()
    saved = optimizer.state_dict()
    for groups in (optimizer.param_groups, saved["param_groups"]):
        groups[0].update(conv="operator", geometry=geometry)
    before = conv.weight.detach().clone()
    with pytest.raises(ValueError, match=named):
        optimizer.step()
    with pytest.raises(ValueError, match=named):
        specopt.NormScaleAdamW(conv.parameters(), lr=1e-3, mode="cap").load_state_dict(saved)
    assert torch.equal(conv.weight, before)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"conv": "fourier"}, "conv must be one of 'matrix', 'operator'"),
        ({"geometry": "conv2d(7x7)"}, "geometry must be a list"),
        ({"geometry": ["conv2d"]}, "geometry must be text like"),
        ({"geometry": ["conv2d(7x7)", None]}, "geometry must have an entry for each of 1 params"),
        ({"geometry": ["conv1d(7)"]}, "w: geometry"),
        ({"geometry": ["conv2d(2x2)"]}, "w: size"),
        ({"mode": "set"}, "mode must be 'rescale' or 'cap' with conv='operator', got 'set'"),
        ({"norm": "frobenius", "mode": "cap"}, "norm must be 'spectral' with conv='operator'"),
    ],
)
def test_options_that_make_no_operator_are_refused(options: dict[str, Any], named: str) -> None:
    weight = torch.zeros(4, 2, 3, 3, requires_grad=True)
    good = {"conv": "operator", "geometry": ["conv2d(7x7)"], "mode": "cap"}
    specopt.NormScaleAdamW([{"params": [("w", weight)], **good}])
    with pytest.raises(ValueError) as error:
        specopt.NormScaleAdamW([{"params": [("w", weight)], **good, **options}])
    assert named in str(error.value)


def test_a_kernel_whose_shape_alone_tells_nothing_is_controlled_without_a_warning() -> None:
    depthwise = nn.Conv2d(4, 4, 3, groups=4, bias=False)
    group = {"params": [depthwise.weight], "conv": "operator", "geometry": ["conv2d(7x7, groups=4)"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = specopt.SNRSGD([group])
    assert [row.shape for row in specopt.spectral_report(optimizer)] == [(4, 1, 3, 3)]
    for _ in range(3):
        depthwise.weight.grad = torch.ones_like(depthwise.weight)
        optimizer.step()
    assert optimizer.state[depthwise.weight]["spectral_step"] == 3


def test_complex_kernels_are_refused() -> None:
    weight = torch.zeros(4, 2, 3, 3, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"0\.0 must be a dense real kernel"):
        specopt.SNRSGD([{"params": [weight], "conv": "operator", "geometry": ["conv2d(7x7)"]}])
