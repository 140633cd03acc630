"""Weights that are several matrices: checkpoints, scalers, another view, and what is refused."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
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
from tests.specopt.helpers import DEVICE
from tests.specopt.viewed import CASES, gradients, sigmas, targets, train, weight

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")


def optimizer_of(kind: str, params: list[Tensor], views: list[str], **options: Any) -> Any:
    groups = [{"params": [param], "view": view} for param, view in zip(params, views, strict=True)]
    if kind == "snr":
        return specopt.SNRSGD(groups, lr=0.1, momentum=0.9, snr_lambda=0.3, block=8, **options)
    return specopt.NormScaleAdamW(groups, lr=1e-2, block=8, norm=kind, **options)


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
