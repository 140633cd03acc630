"""Views of every kind: one step of each matrix of a parameter, against float64 SVD of matrices built by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import specopt
from specopt.views import matrices_of
from specopt.views.parts import parse, pieces
from tests.specopt.viewed import CASES, build, gradients, sigmas, steps, targets, train, weight

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")

TIGHT: dict[str, Any] = {"tolerance": 1e-6, "max_passes": 6}

SEVERAL = [view for view, (shape, build, _) in CASES.items() if len(build(torch.zeros(shape))) > 1]

STEPS = list(steps())


def changed(view: str, tensor: Tensor, change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """In float64, with ``change(u₁, σ₁, v₁)`` added to each of its matrices."""
    values = tensor.detach().cpu().double().flatten()
    for where in build(view, torch.arange(values.numel()).view(tensor.shape)):
        u, s, vh = torch.linalg.svd(values[where], full_matrices=False)
        values[where] += change(u[:, 0], s[0], vh[0])
    return values.view(tensor.shape)


def assert_close(mine: Tensor, expected: Tensor, allowed: float = 2e-5) -> None:
    assert (mine.detach().cpu().double() - expected).norm() <= allowed * expected.norm()


@pytest.mark.parametrize("view", CASES)
def test_pieces_are_the_matrices_and_share_the_parameters_memory(view: str) -> None:
    values = weight(view).detach().cpu()
    found = pieces(values, parse(view))
    assert [piece.shape[1] for piece in found] == [CASES[view][2]] * len(build(view, values))
    for piece, matrix in zip(found, build(view, values), strict=True):
        assert torch.equal(piece.reshape(len(piece), -1), matrix)
        piece.zero_()
    assert not values.any()


@pytest.mark.parametrize(("view", "block", "backend"), STEPS, indirect=["backend"])
def test_set_is_adamw_then_the_exact_correction_of_each_matrix(view: str, block: int, backend: str) -> None:
    param = weight(view)
    optimizer = specopt.NormScaleAdamW([{"params": [param], "view": view}], lr=1e-2, block=block, **TIGHT)
    for step in range(2):
        other = param.detach().clone().requires_grad_()
        plain = torch.optim.AdamW([other], lr=1e-2)
        if step:
            state = optimizer.state[param]
            plain.state[other] = {k: copy.deepcopy(v) for k, v in state.items() if not k.startswith("spectral")}
        gradients([param, other], seed=step)
        optimizer.step()
        plain.step()
        expected = changed(view, other, lambda u, s, v: (targets(view) - s) * torch.outer(u, v))
        assert_close(param, expected)


@pytest.mark.parametrize(("view", "block", "backend"), STEPS, indirect=["backend"])
def test_snr_adds_the_penalty_of_each_matrix_to_one_gradient(view: str, block: int, backend: str) -> None:
    param = weight(view)
    options: dict[str, Any] = {"lr": 0.1, "snr_lambda": 0.5, "block": block, "view": view}
    optimizer = specopt.SNRSGD([param], **options, **TIGHT)
    for step in range(2):
        gradients([param], seed=step)
        grad = param.grad
        assert grad is not None
        kept = grad.clone()
        penalty = changed(view, param, lambda u, s, v: 0.5 * s * torch.outer(u, v)) - param.detach().cpu().double()
        expected = param.detach().cpu().double() - 0.1 * (kept.cpu().double() + penalty)
        optimizer.step()
        assert param.grad is grad and torch.equal(grad, kept)
        assert_close(param, expected)


SGD: list[dict[str, Any]] = [
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.9, "dampening": 0.1, "maximize": True},
    {"foreach": True},
    {"fused": True, "maximize": True},
]

ADAMW: list[dict[str, Any]] = [
    {"amsgrad": True, "maximize": True},
    {"weight_decay": 0.3, "betas": (0.8, 0.9)},
    {"foreach": True},
    {"fused": True},
]


@pytest.mark.parametrize("base", SGD, ids=str)
@pytest.mark.parametrize("view", ["rows:3", "transposed:1", "transposed:2"])
def test_snr_under_any_option_is_sgd_on_the_penalized_gradient(view: str, base: dict[str, Any]) -> None:
    param = weight(view)
    other = param.detach().clone().requires_grad_()
    optimizer = specopt.SNRSGD([param], lr=0.1, snr_lambda=0.5, view=view, **base)
    plain = torch.optim.SGD([other], lr=0.1, **base)
    strength = -0.5 if base.get("maximize") else 0.5
    for step in range(3):
        gradients([param, other], seed=step)
        assert other.grad is not None
        penalized = changed(view, param, lambda u, s, v: strength * s * torch.outer(u, v))
        other.grad += (penalized - param.detach().cpu().double()).to(other)
        optimizer.step()
        plain.step()
        assert_close(param, other.detach().cpu().double())


@pytest.mark.parametrize("base", ADAMW, ids=str)
@pytest.mark.parametrize("view", ["rows:3", "transposed:1", "transposed:2"])
def test_set_under_any_option_is_adamw_then_the_correction(view: str, base: dict[str, Any]) -> None:
    param = weight(view)
    other = param.detach().clone().requires_grad_()
    optimizer = specopt.NormScaleAdamW([param], lr=1e-2, view=view, **base)
    plain = torch.optim.AdamW([other], lr=1e-2, **base)
    for step in range(3):
        with torch.no_grad():
            other.copy_(param)
        gradients([param, other], seed=step)
        optimizer.step()
        plain.step()
        assert_close(param, changed(view, other, lambda u, s, v: (targets(view) - s) * torch.outer(u, v)))


@pytest.mark.parametrize("view", CASES)
@pytest.mark.parametrize("options", [{"mode": "rescale"}, {"mode": "cap"}, {"norm": "frobenius"}], ids=str)
def test_other_modes_act_on_each_matrix(view: str, options: dict[str, Any]) -> None:
    param = weight(view)
    other = param.detach().clone().requires_grad_()
    gradients([param, other], seed=0)
    specopt.NormScaleAdamW([param], lr=1e-2, view=view, target=1.0, **options, **TIGHT).step()
    torch.optim.AdamW([other], lr=1e-2).step()
    for mine, plain in zip(build(view, param.detach().double()), build(view, other.detach().double()), strict=True):
        u, s, vh = torch.linalg.svd(plain, full_matrices=False)
        if "norm" in options:
            expected = plain * math.sqrt(len(s)) / s.norm()
        elif options["mode"] == "rescale":
            expected = plain / s[0]
        else:
            expected = plain - max(float(s[0]) - 1, 0) * torch.outer(u[:, 0], vh[0])
        assert (mine - expected).norm() <= 2e-5 * expected.norm()


@pytest.mark.parametrize("norm", ["spectral", "frobenius"])
@pytest.mark.parametrize("view", CASES)
def test_initial_norm_of_each_matrix_is_kept(view: str, norm: str) -> None:
    def norms() -> list[float]:
        matrices = build(view, param.detach().double())
        return [float(torch.linalg.matrix_norm(m, 2 if norm == "spectral" else "fro")) for m in matrices]

    param = weight(view)
    with torch.no_grad():
        for scale, piece in enumerate(pieces(param, parse(view)), start=1):
            piece.mul_(scale)
    before = norms()
    mode = "rescale" if norm == "spectral" else "set"
    optimizer = specopt.NormScaleAdamW([param], view=view, norm=norm, mode=mode, target="initial", block=4, **TIGHT)
    train(optimizer, [param], range(3))
    assert norms() == pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_transposed_conv_is_read_in_any_order_of_memory(memory_format: torch.memory_format) -> None:
    view = "transposed:1"
    param = weight(view).detach().contiguous(memory_format=memory_format).requires_grad_()
    (matrix,) = matrices_of(param, {"view": view, "block": 32}, {}, 32)
    assert (matrix.copy is None) == (memory_format == torch.channels_last)
    gradients([param], seed=0)
    optimizer = specopt.NormScaleAdamW([param], view=view)
    for _ in range(3):
        optimizer.step()
    assert sigmas(view, param) == pytest.approx([targets(view)], rel=1e-5)
    assert param.is_contiguous(memory_format=memory_format)


def test_gradient_in_another_order_of_memory_is_read_right() -> None:
    view, runs = "rows:2", []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        param = weight(view)
        gradients([param], seed=0)
        assert param.grad is not None
        param.grad = param.grad.contiguous(memory_format=memory_format)
        specopt.SNRSGD([param], lr=0.1, view=view, snr_lambda=0.5, block=4, **TIGHT).step()
        runs.append(param.detach())
    assert torch.allclose(runs[0], runs[1], atol=1e-6)


@pytest.mark.parametrize("view", [*SEVERAL, "transposed:1"])
def test_a_step_with_lr_0_changes_nothing(view: str, backend: str) -> None:
    param = weight(view)
    optimizer = specopt.NormScaleAdamW([param], lr=0.0, view=view)
    before = param.detach().clone()
    for step in range(2):
        gradients([param], seed=step)
        optimizer.step()
    assert torch.equal(param.detach(), before)


def test_a_zero_matrix_is_capped_and_a_non_finite_one_left_alone_beside_one_that_is_set() -> None:
    param = weight("stack")
    with torch.no_grad():
        param[0] = 0
        param[1, 0, 0] = torch.nan
    optimizer = specopt.NormScaleAdamW([param], lr=1e-3, view="stack", target=1.5)
    gradients([param], seed=0)
    optimizer.step()
    rows = specopt.spectral_report(optimizer)
    assert [row.capped for row in rows] == [True, False, False]
    assert [row.finite for row in rows] == [True, False, True]
    assert 0 < rows[0].sigma < 0.1
    assert rows[2].sigma == pytest.approx(1.5, rel=1e-5)
    assert int(param.detach().isnan().sum()) == 1


def test_report_and_warning_name_the_matrix() -> None:
    param = nn.Parameter(torch.cat([torch.eye(8), 9 * torch.eye(8)]))
    optimizer = specopt.NormScaleAdamW([("packed", param)], view="rows:2", lr=1e-4)
    assert [(row.name, row.shape) for row in specopt.spectral_report(optimizer)] == [
        ("packed[0]", (8, 8)),
        ("packed[1]", (8, 8)),
    ]
    gradients([param], seed=0)
    with pytest.warns(UserWarning, match=r"packed\[1\] \(8, 8\): 9"):
        optimizer.step()
