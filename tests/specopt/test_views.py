"""Views of every kind: one step of each matrix of a parameter, against float64 SVD of matrices built by hand."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import specopt
from specopt.tracker.common import BLOCK, COLD_STEPS, LEFT, PROBE, RIGHT, STATS, STEP, Stat
from specopt.views import matrices_of
from specopt.views.parts import parse, pieces

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TIGHT: dict[str, Any] = {"tolerance": 1e-6, "max_passes": 6}

# view: shape of the parameter, its matrices by hand, and how many input channels one has
CASES: dict[str, tuple[tuple[int, ...], Callable[[Tensor], list[Tensor]], int]] = {
    "flatten": ((20, 6, 5), lambda w: [w.reshape(20, 30)], 6),
    "rows:3": ((60, 24), lambda w: [w[:20], w[20:40], w[40:]], 24),
    "rows:2": ((40, 6, 2, 2), lambda w: [w[:20].reshape(20, 24), w[20:].reshape(20, 24)], 6),
    "rows:6": ((6, 1, 3, 3), lambda w: [w[i].reshape(1, 9) for i in range(6)], 1),
    "transposed": ((22, 25), lambda w: [w.T], 22),
    "transposed:1": ((8, 21, 2, 2), lambda w: [torch.stack([w[:, o].reshape(-1) for o in range(21)])], 8),
    "transposed:2": (
        (16, 20, 3),
        lambda w: [torch.stack([half[:, o].reshape(-1) for o in range(20)]) for half in (w[:8], w[8:])],
        8,
    ),
    "columns:3": ((24, 60), lambda w: [w[:, :20].T, w[:, 20:40].T, w[:, 40:].T], 24),
    "stack": ((3, 20, 25), lambda w: [w[0], w[1], w[2]], 25),
    "stack-transposed": ((2, 25, 20), lambda w: [w[0].T, w[1].T], 25),
    "bilinear": ((20, 5, 6), lambda w: [w.reshape(20, 30)], 30),
}
SEVERAL = [view for view, (shape, build, _) in CASES.items() if len(build(torch.zeros(shape))) > 1]


def steps() -> Iterator[Any]:
    for view in CASES:
        for block, kind in ((4, "tracked"), (32, "exact")):
            for backend in ("reference", "triton"):
                long = backend == "triton" and block == 4  # tracked in Triton's interpreter
                marks = [pytest.mark.full] if long else []
                yield pytest.param(view, block, backend, id=f"{view}-{kind}-{backend}", marks=marks)


STEPS = list(steps())


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SPECOPT_BACKEND", request.param)
    return str(request.param)


def build(view: str, tensor: Tensor) -> list[Tensor]:
    return CASES[view][1](tensor)


def weight(view: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A parameter whose matrices have singular values well apart: few pairs of products find them."""
    shape = CASES[view][0]
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64).flatten()
    for where in build(view, torch.arange(values.numel()).view(shape)):
        u, s, vh = torch.linalg.svd(values[where], full_matrices=False)
        values[where] = (u * 2 * 0.6 ** torch.arange(len(s), dtype=torch.float64)) @ vh
    return values.view(shape).to(DEVICE, dtype).requires_grad_()


def gradients(params: list[Tensor], seed: int) -> None:
    for param in params:
        generator = torch.Generator().manual_seed(seed)
        param.grad = (0.02 * torch.randn(param.shape, generator=generator)).to(param)


def changed(view: str, tensor: Tensor, change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """In float64, with ``change(u₁, σ₁, v₁)`` added to each of its matrices."""
    values = tensor.detach().cpu().double().flatten()
    for where in build(view, torch.arange(values.numel()).view(tensor.shape)):
        u, s, vh = torch.linalg.svd(values[where], full_matrices=False)
        values[where] += change(u[:, 0], s[0], vh[0])
    return values.view(tensor.shape)


def sigmas(view: str, tensor: Tensor) -> list[float]:
    return [float(torch.linalg.matrix_norm(m, 2)) for m in build(view, tensor.detach().cpu().double())]


def targets(view: str) -> float:
    return math.sqrt(len(build(view, torch.zeros(CASES[view][0]))[0]) / CASES[view][2])


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


# --- state ---------------------------------------------------------------------------------------------------------


def optimizer_of(kind: str, params: list[Tensor], views: list[str], **options: Any) -> Any:
    groups = [{"params": [param], "view": view} for param, view in zip(params, views, strict=True)]
    if kind == "snr":
        return specopt.SNRSGD(groups, lr=0.1, momentum=0.9, snr_lambda=0.3, block=8, **options)
    return specopt.NormScaleAdamW(groups, lr=1e-2, block=8, norm=kind, **options)


def train(optimizer: Any, params: list[Tensor], steps: range) -> None:
    for step in steps:
        gradients(params, seed=step)
        optimizer.step()


KINDS = ["snr", "spectral", "frobenius"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_resume_is_bit_exact_and_state_keeps_its_precision(kind: str, dtype: torch.dtype) -> None:
    params = [weight(view, dtype=dtype) for view in CASES]
    optimizer = optimizer_of(kind, params, list(CASES))
    train(optimizer, params, range(4))
    file = io.BytesIO()
    torch.save({"weights": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
    train(optimizer, params, range(4, 8))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others = [value.requires_grad_() for value in saved["weights"]]
    resumed = optimizer_of(kind, others, list(CASES))
    resumed.load_state_dict(saved["optimizer"])
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {resumed.state[param][STATS].dtype for param in others} == {wanted}
    train(resumed, others, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_go_on_bit_for_bit(kind: str, copied: Callable[[Any], Any]) -> None:
    params = [weight(view) for view in CASES]
    optimizer = optimizer_of(kind, params, list(CASES))
    train(optimizer, params, range(2))
    twin = copied(optimizer)
    others = [param for group in twin.param_groups for param in group["params"]]
    train(optimizer, params, range(2, 4))
    train(twin, others, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("kind", KINDS)
def test_distributed_checkpoint_carries_the_state_of_parts(kind: str, flat: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([nn.Parameter(weight(view).detach()) for view in CASES])

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    models = [Model(), Model()]
    lists = [list(model.weights) for model in models]
    first, second = (optimizer_of(kind, params, list(CASES)) for params in lists)
    train(first, lists[0], range(3))
    models[1].load_state_dict(models[0].state_dict())
    before = [param.detach().clone() for param in lists[1]]
    saved = copy.deepcopy(get_optimizer_state_dict(models[0], first, options=options))
    set_optimizer_state_dict(models[1], second, saved, options=options)
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, lists[1], strict=True))
    for optimizer, params in ((first, lists[0]), (second, lists[1])):
        train(optimizer, params, range(3, 5))
    assert all(torch.equal(a, b) for a, b in zip(*lists, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_state_of_parts_is_stacked_under_the_keys_of_one(kind: str) -> None:
    param = weight("rows:3")
    optimizer = optimizer_of(kind, [param], ["rows:3"])
    train(optimizer, [param], range(2))
    state = optimizer.state[param]
    keys = {"snr": {LEFT, RIGHT}, "spectral": {BLOCK, PROBE}, "frobenius": set()}[kind]
    assert {key for key in state if key.startswith("spectral")} == {STATS, STEP, *keys}
    assert state[STEP] == 2
    assert all(len(state[key]) == 3 for key in {STATS, *keys})
    assert state[STATS][:, Stat.COUNT].tolist() == [2.0] * 3


def test_another_view_starts_control_anew() -> None:
    param = weight("rows:3")
    optimizer = optimizer_of("spectral", [param], ["rows:3"])
    train(optimizer, [param], range(3))
    optimizer.param_groups[0]["view"] = "flatten"
    train(optimizer, [param], range(3, 5))
    assert optimizer.state[param][STEP] == 2 and optimizer.state[param][STATS].ndim == 1
    optimizer.param_groups[0]["view"] = "rows:3"
    train(optimizer, [param], range(5, 6))
    assert optimizer.state[param][STEP] == 1 and optimizer.state[param][STATS].shape[0] == 3
    assert sigmas("rows:3", param) == pytest.approx([targets("rows:3")] * 3, rel=0.05)


def test_control_switched_off_leaves_no_stale_state() -> None:
    param = weight("rows:3")
    optimizer = optimizer_of("snr", [param], ["rows:3"])
    train(optimizer, [param], range(2))
    optimizer.param_groups[0]["spectral"] = False
    train(optimizer, [param], range(2, 3))
    assert {key for key in optimizer.state[param] if key.startswith("spectral")} == {STEP}


def test_parts_go_on_after_the_cold_phase(backend: str) -> None:
    param = weight("rows:2")
    optimizer = specopt.NormScaleAdamW([param], lr=1e-4, view="rows:2", block=8, max_passes=2)
    train(optimizer, [param], range(1))
    optimizer.state[param][STEP] = COLD_STEPS
    optimizer.state[param][STATS][:, Stat.COUNT] = COLD_STEPS
    train(optimizer, [param], range(1, 3))
    assert optimizer.state[param][STEP] == COLD_STEPS + 2
    assert optimizer.state[param][STATS][:, Stat.COUNT].tolist() == [COLD_STEPS + 2.0] * 2
    assert sigmas("rows:2", param) == pytest.approx([targets("rows:2")] * 2, rel=1e-3)


def test_state_of_another_number_of_matrices_starts_control_anew() -> None:
    params = [weight("rows:3"), weight("stack")]
    optimizer = optimizer_of("spectral", params, ["rows:3", "stack"])
    train(optimizer, params, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0][STATS] = torch.zeros(2, 7)
    optimizer.load_state_dict(saved)
    train(optimizer, params, range(2, 3))
    assert [optimizer.state[param][STEP] for param in params] == [1, 3]
    assert [optimizer.state[param][STATS].shape[0] for param in params] == [3, 3]


def test_state_of_matrices_of_another_shape_is_refused_by_the_name_of_the_matrix() -> None:
    params = [weight("rows:3"), weight("stack")]
    optimizer = optimizer_of("spectral", params, ["rows:3", "stack"])
    train(optimizer, params, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1][BLOCK] = torch.zeros(3, 5, 5)
    with pytest.raises(ValueError, match=r"spectral_block of parameter 1\.0\[0\]"):
        optimizer.load_state_dict(saved)


# --- scalers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_scaler_that_found_inf_changes_nothing(kind: str, fused: bool) -> None:
    params = [weight(view) for view in CASES]
    optimizer = optimizer_of(kind, params, list(CASES), fused=fused)
    train(optimizer, params, range(2))
    weights, state = [param.detach().clone() for param in params], copy.deepcopy(optimizer.state_dict()["state"])
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=4.0)
    scaler.scale(torch.ones((), device=DEVICE))  # a scaler is set up by its first loss
    gradients(params, seed=2)
    assert params[0].grad is not None
    params[0].grad[0, 0] = torch.inf
    scaler.step(optimizer)
    assert all(torch.equal(a, b.detach()) for a, b in zip(weights, params, strict=True))
    after = optimizer.state_dict()["state"]
    for index, kept in state.items():
        for key, value in kept.items():
            now = torch.as_tensor(after[index][key])
            assert torch.allclose(torch.as_tensor(value), now, rtol=0, atol=0, equal_nan=True), key


@pytest.mark.parametrize("kind", ["snr", "spectral"])
def test_fused_step_under_a_scaler_equals_the_unscaled_step(kind: str) -> None:
    runs = []
    for scale in (None, 64.0):
        params = [weight(view) for view in CASES]
        optimizer = optimizer_of(kind, params, list(CASES), fused=True)
        gradients(params, seed=0)
        if scale is None:
            optimizer.step()
        else:
            scaler = torch.amp.GradScaler(DEVICE.type, init_scale=scale)
            scaler.scale(torch.ones((), device=DEVICE))
            for param in params:
                assert param.grad is not None
                param.grad.mul_(scale)
            scaler.step(optimizer)
        runs.append([param.detach() for param in params])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*runs, strict=True))


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["rows", "rows:0", "rows:-1", "rows:x", "flat", "flatten:2", "", 3, None, "rows:²"])
def test_what_is_no_view_is_refused_naming_those_there_are(view: Any) -> None:
    with pytest.raises(ValueError, match=r"'rows:G'.*got "):
        specopt.SNRSGD([nn.Parameter(torch.zeros(4, 4))], view=view)


@pytest.mark.parametrize(
    ("view", "shape"),
    [("rows:3", (8, 4)), ("columns:3", (3, 4)), ("transposed:5", (8, 4, 3)), ("stack", (8, 4)), ("bilinear", (8, 4))],
)
def test_a_view_that_does_not_fit_is_refused_in_the_constructor(view: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"view='{view}'.*{shape[0]}, {shape[1]}"):
        specopt.NormScaleAdamW([nn.Parameter(torch.zeros(shape))], view=view)


def test_a_view_that_no_longer_fits_is_refused_before_anything_changes(backend: str) -> None:
    params = [weight("flatten"), weight("rows:3")]
    optimizer = optimizer_of("spectral", params, ["flatten", "rows:3"])
    before = [param.detach().clone() for param in params]
    gradients(params, seed=0)
    optimizer.param_groups[1]["view"] = "rows:7"
    with pytest.raises(ValueError, match="view='rows:7'"):
        optimizer.step()
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, params, strict=True))
    assert all(not optimizer.state[param] for param in params)


def test_vectors_in_a_group_with_a_view_are_left_alone() -> None:
    params = [nn.Parameter(torch.ones(9, 4)), nn.Parameter(torch.ones(7))]
    optimizer = specopt.NormScaleAdamW(params, view="rows:3")
    assert [row.name for row in specopt.spectral_report(optimizer)] == ["0.0[0]", "0.0[1]", "0.0[2]"]


def test_bilinear_weight_with_gaps_in_memory_is_refused() -> None:
    gapped = torch.zeros(4, 6, 6)[:, ::2, :4].requires_grad_()
    with pytest.raises(ValueError, match=r"bilinear.*contiguous"):
        specopt.SNRSGD([gapped], view="bilinear")


@pytest.mark.parametrize("norm", ["spectral", "frobenius"])
@pytest.mark.parametrize(("first", "second"), [("rows:2", "flatten"), ("flatten", "rows:2"), ("rows:2", "transposed")])
def test_initial_norms_are_noted_anew_after_another_view(first: str, second: str, norm: str) -> None:
    param = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = specopt.NormScaleAdamW([{"params": [param], "view": first}], target="initial", norm=norm, lr=1e-2)
    train(optimizer, [param], range(2))
    optimizer.param_groups[0]["view"] = second
    norms = [row.sigma if norm == "spectral" else row.frobenius for row in fresh_report(param, second)]
    train(optimizer, [param], range(2, 4))
    after = [row.sigma if norm == "spectral" else row.frobenius for row in fresh_report(param, second)]
    assert after == pytest.approx(norms, rel=5e-2)


def fresh_report(param: Tensor, view: str) -> list[specopt.SpectralRow]:
    return specopt.spectral_report(specopt.NormScaleAdamW([{"params": [param], "view": view}]))


def test_a_matrix_that_was_zero_stays_capped_after_another_view() -> None:
    param = torch.zeros(6, 10, requires_grad=True)
    optimizer = specopt.NormScaleAdamW([{"params": [param], "view": "rows:2"}], lr=1e-3)
    train(optimizer, [param], range(2))
    optimizer.param_groups[0]["view"] = "flatten"
    train(optimizer, [param], range(2, 4))
    assert float(torch.linalg.matrix_norm(param.detach(), 2)) < 0.1
