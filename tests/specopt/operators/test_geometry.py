"""Geometries: read from modules, written as text and read back, refused where they make no sense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import specopt
from specopt.operators import Geometry, parse
from tests.specopt.operators.cases import every

PLAIN = {"size": (8, 8), "stride": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1)}


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_text_gives_the_geometry_back(dimensions: int) -> None:
    cases = every(dimensions)
    assert len(cases) > 100
    for module, size in cases:
        geometry = Geometry.of(module, size)
        assert parse(str(geometry)) == geometry


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_output_size_is_that_of_the_module(dimensions: int) -> None:
    for module, size in every(dimensions):
        out = module(torch.zeros(1, module.in_channels, *size))
        geometry = Geometry.of(module, size)
        assert geometry.output_size(module.weight.shape) == out.shape[2:]
        assert geometry.channels(module.weight.shape) == (module.out_channels, module.in_channels)


def test_text_is_as_the_documentation_has_it() -> None:
    module = nn.Conv2d(4, 8, 3, stride=2, padding=(1, 0), dilation=(2, 1), groups=4, padding_mode="reflect")
    text = "conv2d(32x32, stride=2x2, padding=1x0, dilation=2x1, groups=4, mode=reflect)"
    assert str(Geometry.of(module, (32, 32))) == text
    assert str(Geometry.of(nn.Conv2d(1, 1, 2, padding="same"), (5, 5))) == "conv2d(5x5, padding=0:1x0:1)"
    upwards = nn.ConvTranspose2d(1, 1, 3, stride=2, padding=1, output_padding=1)
    assert str(Geometry.of(upwards, (8, 8))) == "transposed2d(8x8, stride=2x2, padding=1x1, output_padding=1x1)"
    assert str(Geometry.of(nn.Conv1d(1, 1, 1, padding="valid"), (7,))) == "conv1d(7)"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "conv2d",
        "conv2d(8)",
        "conv4d(8x8x8x8)",
        "conv2d(8x8, stride=2)",
        "conv2d(8x8, stride=0x1)",
        "conv2d(8x8, stride=2x2, stride=2x2)",
        "conv2d(8x8, colour=2x2)",
        "conv2d(8x8, padding=1:2:3x1)",
        "conv2d(8x8, padding=ax1)",
        "conv2d(8x8, groups=0)",
        "conv2d(8x8, groups=a)",
        "conv2d(8x8, mode=mirror)",
        "conv2d(0x8)",
        "conv2d(8x8, output_padding=1x1)",
        "conv2d(4x4, padding=4x4, mode=reflect)",
        "conv2d(4x4, padding=5x5, mode=circular)",
        "transposed2d(8x8, mode=circular)",
        "transposed2d(8x8, padding=0:1x0)",
        "transposed2d(8x8, output_padding=1x1)",
        "conv2d(8x8) ",
        "conv2d(٨x٨)",
        None,
        3,
        ["conv2d(8x8)"],
    ],
)
def test_what_is_no_geometry_is_refused_with_its_text(text: Any) -> None:
    with pytest.raises(ValueError) as error:
        parse(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"size": ()}, "size"),
        ({"size": (8, -1)}, "size"),
        ({"size": [8, 8]}, "size"),
        ({"size": 8}, "size"),
        ({"padding": 1}, "padding"),
        ({"padding": (1, 1)}, "padding"),
        ({"output_padding": (1, 0)}, "output_padding"),
        ({"stride": (1,)}, "stride"),
        ({"stride": (True, 1)}, "stride"),
        ({"dilation": (1, 1.5)}, "dilation"),
        ({"padding": ((1, 1),)}, "padding"),
        ({"padding": ((1, 1), (-1, 1))}, "padding"),
        ({"groups": 0}, "groups"),
        ({"mode": "mirror"}, "mode"),
        ({"transposed": 1}, "transposed"),
    ],
)
def test_numbers_that_make_no_convolution_are_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Geometry(**{**PLAIN, **change})


def test_sizes_that_do_not_fit_the_module_are_refused() -> None:
    with pytest.raises(ValueError, match=r"size must be 2 lengths for a Conv2d, got \(8,\)"):
        Geometry.of(nn.Conv2d(1, 1, 3), (8,))
    with pytest.raises(ValueError, match="size must be 1 lengths"):
        Geometry.of(nn.Conv1d(1, 1, 3), 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="output"):
        Geometry.of(nn.Conv2d(1, 1, 9), (8, 8))
    with pytest.raises(TypeError, match="Linear"):
        Geometry.of(nn.Linear(3, 3), (8,))


def test_settings_that_were_changed_to_a_number_are_of_every_dimension() -> None:
    expected = Geometry.of(nn.Conv2d(2, 3, 3, stride=2, padding=1, dilation=2), (9, 8))
    module: Any = nn.Conv2d(2, 3, 3)
    module.stride, module.padding, module.dilation = 2, 1, 2
    assert Geometry.of(module, (9, 8)) == expected
    same = nn.Conv2d(2, 3, 3, stride=2, padding=1, dilation=2)
    same.load_state_dict(module.state_dict())
    assert specopt.certify(module).rows[0].bound == specopt.certify(same).rows[0].bound


def test_kernels_that_do_not_fit_the_geometry_are_refused() -> None:
    geometry = parse("conv2d(8x8, groups=2)")
    geometry.check_kernel((4, 3, 3, 3))
    for shape in ((4, 3, 3), (3, 3, 3, 3), (4, 3, 9, 9), (4, 0, 3, 3)):
        with pytest.raises(ValueError):
            geometry.check_kernel(shape)
