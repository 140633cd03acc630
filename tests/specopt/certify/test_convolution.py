"""Convolutions as operators: every bound is at least the largest singular value of the dense operator."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from specopt.certify import convolution
from specopt.certify.axes import Axis
from specopt.certify.layers import Norms, Sizes, axes_of
from specopt.certify.modules import spatial

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
SVD_ERROR = 1e-12


def seeded(module: _ConvNd, seed: int = 0) -> _ConvNd:
    module = module.double()
    with torch.no_grad():
        module.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return module


def dense(module: _ConvNd, size: tuple[int, ...]) -> tuple[Tensor, Sizes]:
    """The operator as a matrix: the module without its bias on every unit input."""
    shape = (module.in_channels, *size)
    count = math.prod(shape)
    bias, module.bias = module.bias, None
    with torch.no_grad():
        images = module(torch.eye(count, dtype=torch.float64).reshape(count, *shape))
    module.bias = bias
    return images.flatten(1).mT, (size, spatial(images, module))


def bounds(module: _ConvNd, sizes: Sizes) -> dict[str, float]:
    """Of each kind, also where another is the least."""
    found = {}
    weight = module.weight.detach()
    kernel = weight.reshape(module.groups, -1, *weight.shape[1:])
    for name, given_sizes in (("known", sizes), ("any", None)):
        axes = axes_of(module, given_sizes)
        folded = convolution.fold(kernel, axes)
        for rows in (frozenset[int](), frozenset(range(len(axes))), frozenset([0])):
            found[f"flattened {set(rows)}, {name}"] = convolution._flattened(folded, axes, rows, 1e-3).value
        for tolerance in (1e-3, 0.25):
            grids = [convolution._grid(axis, tolerance) for axis in axes]
            found[f"symbol {tolerance}, {name}"] = convolution._symbol(folded, axes, grids, 1e-3).value
        found[f"least, {name}"] = Norms(1e-3).of(module, given_sizes).value
    return found


def check(module: _ConvNd, size: tuple[int, ...]) -> None:
    matrix, sizes = dense(module, size)
    exact = float(torch.linalg.matrix_norm(matrix, 2))
    for name, bound in bounds(module, sizes).items():
        assert bound >= exact * (1 - SVD_ERROR), (name, bound, exact, module, size)
    weight = module.weight.detach()
    kernel = weight.reshape(module.groups, -1, *weight.shape[1:])
    unrolled = convolution._unrolled(kernel, axes_of(module, sizes), 1e-3).value
    assert exact * (1 - SVD_ERROR) <= unrolled <= exact * 1.001


SETTINGS: list[tuple[int, dict[str, Any], tuple[int, ...]]] = [
    (2, {"kernel_size": 3}, (6, 7)),
    (2, {"kernel_size": 3, "padding": 1}, (6, 7)),
    (2, {"kernel_size": (3, 2), "padding": (2, 1), "stride": (2, 3)}, (7, 6)),
    (2, {"kernel_size": 1, "stride": 2}, (6, 5)),
    (2, {"kernel_size": 3, "dilation": 2, "padding": 2}, (6, 7)),
    (2, {"kernel_size": 3, "dilation": 2, "stride": 2, "padding": 2}, (7, 7)),
    (2, {"kernel_size": 4, "dilation": 3, "stride": 2, "padding": 4}, (8, 7)),
    (2, {"kernel_size": 3, "padding": "same", "dilation": (1, 2)}, (5, 6)),
    (2, {"kernel_size": (2, 4), "padding": "same"}, (5, 6)),
    (2, {"kernel_size": 5, "padding": 4}, (3, 2)),
    (1, {"kernel_size": 5, "stride": 3, "padding": 2}, (16,)),
    (1, {"kernel_size": 7, "stride": 4, "dilation": 6, "padding": 9}, (31,)),
    (3, {"kernel_size": 2, "stride": (1, 2, 1), "padding": 1}, (3, 4, 3)),
]


@pytest.mark.parametrize(("dims", "options", "size"), SETTINGS)
@pytest.mark.parametrize("groups", [1, 2])
def test_zero_padding_bounds_hold(dims: int, options: dict[str, Any], size: tuple[int, ...], groups: int) -> None:
    check(seeded(CONVS[dims](4, 6, groups=groups, **options)), size)


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(
    ("kernel", "padding", "size"), [(3, 1, (6, 5)), (3, 2, (4, 6)), (2, 3, (4, 5)), (3, 1, (2, 2))]
)
def test_other_padding_bounds_hold(mode: str, stride: int, kernel: int, padding: int, size: tuple[int, ...]) -> None:
    module = nn.Conv2d(2, 3, kernel, stride=stride, padding=padding, padding_mode=mode)
    check(seeded(module), size)


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_bounds_hold_where_all_taps_agree_and_padding_repeats_an_entry(mode: str) -> None:
    module = seeded(nn.Conv1d(1, 1, 3, padding=2, padding_mode=mode))
    nn.init.ones_(module.weight)
    for size in range(3, 8):
        check(module, (size,))


@pytest.mark.parametrize(
    ("dims", "options", "size"),
    [
        (1, {"kernel_size": 4, "stride": 2, "padding": 1}, (7,)),
        (2, {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1}, (4, 5)),
        (2, {"kernel_size": 3, "stride": 3, "dilation": 2, "output_padding": 2}, (3, 3)),
        (2, {"kernel_size": (2, 3), "padding": (0, 2)}, (4, 4)),
        (3, {"kernel_size": 2, "stride": 2}, (2, 2, 3)),
    ],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_have_the_norm_of_their_adjoint(
    dims: int, options: dict[str, Any], size: tuple[int, ...], groups: int
) -> None:
    check(seeded(TRANSPOSED[dims](4, 6, groups=groups, **options)), size)


@settings(max_examples=60)
@given(st.data())
def test_bounds_hold_in_one_dimension_for_any_geometry(data: st.DataObject) -> None:
    kernel, stride, dilation = (data.draw(st.integers(1, most)) for most in (6, 5, 5))
    mode = data.draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
    size, padding = data.draw(st.integers(1, 20)), data.draw(st.integers(0, 8))
    if mode == "circular":
        padding = min(padding, size)
    if mode == "reflect":
        padding = min(padding, size - 1)
    if size + 2 * padding < dilation * (kernel - 1) + 1:
        return
    module = nn.Conv1d(1, 1, kernel, stride, padding, dilation, padding_mode=mode)
    check(seeded(module, seed=data.draw(st.integers(0, 99))), (size,))


@pytest.mark.parametrize(("stride", "slack"), [(1, 0.03), (2, 0.03)])
def test_the_symbol_is_tight_on_a_large_input(stride: int, slack: float) -> None:
    module = seeded(nn.Conv2d(1, 2, 3, stride=stride, padding=1))
    matrix, _ = dense(module, (28, 28))
    exact = float(torch.linalg.matrix_norm(matrix, 2))
    bound = Norms(1e-3).of(module)
    assert "symbol" in bound.how
    assert exact <= bound.value <= exact * (1 + slack)


def test_a_circular_convolution_is_as_large_as_its_symbol_says() -> None:
    module = seeded(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"))
    matrix, sizes = dense(module, (8, 6))
    exact = float(torch.linalg.matrix_norm(matrix, 2))
    axes = axes_of(module, sizes)
    folded = convolution.fold(module.weight.detach()[None], axes)
    grids = [convolution._grid(axis, 1e-3) for axis in axes]
    assert [grid.points for grid in grids] == [8, 6]
    assert exact <= convolution._symbol(folded, axes, grids, 1e-3).value <= exact * 1.001


def test_windows_that_do_not_overlap_have_the_norm_of_their_matrix() -> None:
    module = seeded(nn.Conv2d(3, 8, 4, stride=4))
    exact = float(torch.linalg.matrix_norm(module.weight.detach().flatten(1), 2))
    assert Norms(1e-3).of(module).value == pytest.approx(exact, rel=1e-3)


def test_over_budget_the_flattened_bounds_are_taken_and_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    module = seeded(nn.Conv2d(3, 8, 3, padding=1))
    exact = float(torch.linalg.matrix_norm(dense(module, (9, 9))[0], 2))
    monkeypatch.setattr(convolution, "BUDGET", 0)
    monkeypatch.setattr(convolution, "_cost", lambda rows, columns: 0)
    bound = Norms(1e-3).of(module)
    assert "flattened" in bound.how and "sqrt(9)" in bound.how
    assert exact <= bound.value <= 3 * exact


@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e-160, 1e160])
def test_bounds_scale_with_the_kernel(scale: float) -> None:
    module = seeded(nn.Conv2d(3, 4, 3, padding=1, groups=1))
    choices: list[Sizes | None] = [None, ((5, 5), (5, 5))]
    reference = [Norms(1e-3).of(module, sizes).value for sizes in choices]
    with torch.no_grad():
        module.weight.mul_(scale)
    scaled = [Norms(1e-3).of(module, sizes).value / scale for sizes in choices]
    assert scaled == pytest.approx(reference, rel=1e-9)


@pytest.mark.parametrize("chunk", [1, 1000])
def test_chunks_of_frequencies_give_the_same_bound(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = seeded(nn.Conv2d(3, 4, 3, padding=1))
    whole = Norms(1e-3).of(module).value
    monkeypatch.setattr(convolution, "CHUNK", chunk)
    assert Norms(1e-3).of(module).value == pytest.approx(whole, rel=2e-3)


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_reads_are_what_torch_pads(mode: str) -> None:
    axis = Axis(kernel=3, stride=2, dilation=2, before=3, after=3, mode=mode, size=5, outputs=4)
    positions = torch.arange(1.0, 6.0)[None, None]
    torch_mode = "constant" if mode == "zeros" else mode
    padded = torch.nn.functional.pad(positions, (3, 3), mode=torch_mode)[0, 0]
    expected = torch.stack([padded[2 * t : 2 * t + 5 : 2] for t in range(4)])
    assert torch.equal(axis.reads + 1, expected.long())
