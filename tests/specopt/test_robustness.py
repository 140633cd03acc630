"""What must not break: non-finite numbers, zero matrices, missing gradients, odd shapes, extreme scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import specopt
from specopt.tracker.common import STATS, Stat
from tests.specopt.helpers import clones, exact, parameters, set_gradients

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")
Make = Callable[[list[Tensor]], Optimizer]

OURS: dict[str, Make] = {
    "snr": lambda params: specopt.SNRSGD(params, lr=0.1, momentum=0.9),
    "set": lambda params: specopt.NormScaleAdamW(params, lr=1e-2),
    "rescale": lambda params: specopt.NormScaleAdamW(params, lr=1e-2, mode="rescale"),
    "frobenius": lambda params: specopt.NormScaleAdamW(params, lr=1e-2, norm="frobenius"),
}
PLAIN: dict[str, Make] = {
    "snr": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    **dict.fromkeys(("set", "rescale", "frobenius"), lambda params: torch.optim.AdamW(params, lr=1e-2)),
}


@pytest.fixture(params=OURS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("when", [0, 2])
def test_non_finite_gradient_spreads_no_further_than_under_the_base(kind: str, bad: float, when: int) -> None:
    params = parameters(torch.float32)
    others = clones(params)
    ours, theirs = OURS[kind](params), PLAIN[kind](others)
    for step in range(5):
        set_gradients(params, others, seed=step)
        if step == when:
            for param, other in zip(params, others, strict=True):
                assert param.grad is not None and other.grad is not None
                param.grad.view(-1)[0] = other.grad.view(-1)[0] = bad
        ours.step()
        theirs.step()
    for param, other in zip(params, others, strict=True):
        assert torch.equal(param.isfinite(), other.isfinite())
        if kind != "snr" and not bool(other.isfinite().all()) and when == 0:
            # left as the base left it, to rounding
            assert torch.allclose(param.nan_to_num(7.0), other.nan_to_num(7.0), rtol=1e-6, atol=1e-6)
        for name, value in ours.state[param].items():
            if name in ("spectral_block", "spectral_left", "spectral_right", "spectral_probe"):
                assert bool(value.isfinite().all()), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weight_is_left_as_the_base_leaves_it_and_heals(kind: str, bad: float) -> None:
    params = parameters(torch.float32)
    sound = [param.detach().clone() for param in params]
    ours = OURS[kind](params)
    for step in range(6):
        set_gradients(params, clones(params), seed=step)
        if step == 1:
            for param in params:
                param.data.view(-1)[-1] = bad
        others = clones(params)
        if step == 2:
            assert all(int((~param.isfinite()).sum()) == 1 for param in params)
            with torch.no_grad():
                for param, value in zip(params, sound, strict=True):
                    param.copy_(value)
        ours.step()
        if step == 1:
            assert all(torch.equal(p.isfinite(), o.isfinite()) for p, o in zip(params, others, strict=True))
            valid = [float(ours.state[p][STATS][Stat.VALID]) for p in params if p.ndim > 1]
            assert valid == [0.0] * len(valid)
    valid = [float(ours.state[p][STATS][Stat.VALID]) for p in params if p.ndim > 1]
    assert valid == [1.0] * len(valid)
    assert all(bool(param.isfinite().all()) for param in params)


def test_zero_matrix_without_gradient_stays_zero(kind: str) -> None:
    params = [torch.zeros(70, 80, requires_grad=True), torch.zeros(3, 4, requires_grad=True)]
    optimizer = OURS[kind](params)
    for _ in range(3):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert all(float(param.detach().abs().sum()) == 0 for param in params)


@pytest.mark.parametrize("shape", [(70, 80), (8, 20)])
@pytest.mark.parametrize("norm", ["spectral", "frobenius"])
def test_matrix_that_starts_at_zero_is_capped_not_raised_until_it_reaches_the_target(
    norm: str, shape: tuple[int, int]
) -> None:
    results = {}
    for raise_small in (False, True):
        param = torch.zeros(shape, requires_grad=True)
        optimizer = specopt.NormScaleAdamW([param], lr=1e-3, norm=norm, raise_small=raise_small)
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(shape, generator=generator)
        norms = []
        for _ in range(3):
            param.grad = direction.clone()
            optimizer.step()
            norms.append(float(exact(param)[1][0]) if norm == "spectral" else float(param.detach().norm()))
        report = specopt.spectral_report(optimizer)[0]
        assert report.capped is not raise_small
        results[raise_small] = norms
        assert report.target is not None
        if raise_small:
            assert norms[0] == pytest.approx(report.target, rel=1e-4)
        else:
            assert 0 < norms[0] < 0.2 * report.target
            optimizer.param_groups[0]["lr"] = 1.0
            param.grad = direction.clone()
            optimizer.step()
            optimizer.param_groups[0]["lr"] = 0.5
            param.grad = -direction
            optimizer.step()
            assert not specopt.spectral_report(optimizer)[0].capped  # it has been there: from now on it is set


def test_gradient_of_zeros_at_the_first_step(kind: str) -> None:
    params = parameters(torch.float32)
    others = clones(params)
    optimizer = OURS[kind](params)
    for step in range(3):
        set_gradients(params, others, seed=step)
        if step == 0:
            for param in params:
                param.grad = torch.zeros_like(param)
        optimizer.step()
    assert all(bool(param.isfinite().all()) for param in params)
    if kind == "set":
        for param in params:
            if param.ndim > 1:
                target = (param.shape[0] / param.shape[1]) ** 0.5
                closest = (exact(param)[1] - target).abs().min()
                assert float(closest) < 1e-3 * target


def test_frozen_parameters_and_parameters_without_gradient_are_untouched(kind: str) -> None:
    params = parameters(torch.float32)
    frozen, idle = params[0].requires_grad_(False), params[1]
    before = [frozen.clone(), idle.detach().clone()]
    optimizer = OURS[kind](params)
    for step in range(2):
        set_gradients(params, clones(params), seed=step)
        frozen.grad = idle.grad = None
        optimizer.step()
    assert torch.equal(frozen, before[0]) and torch.equal(idle.detach(), before[1])
    assert not optimizer.state.get(frozen) and not optimizer.state.get(idle)


def test_gradients_that_come_and_go(kind: str) -> None:
    params = parameters(torch.float32)
    optimizer = OURS[kind](params)
    for step in range(6):
        set_gradients(params, clones(params), seed=step)
        for i, param in enumerate(params):
            if (i + step) % 3 == 0:
                param.grad = None
        optimizer.step()
    assert all(bool(param.isfinite().all()) for param in params)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_scales_are_set_to_the_target(scale: float, dtype: torch.dtype) -> None:
    params = [(scale * param.detach().double()).to(dtype).requires_grad_() for param in parameters(torch.float64)]
    lr = 1e-9 if scale > 1 else 1e-33
    optimizer = specopt.NormScaleAdamW(params, lr=lr, mode="rescale", weight_decay=0.0)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    for param in params:
        if param.ndim > 1:
            target = (param.shape[0] / param.shape[1]) ** 0.5
            assert float(exact(param)[1][0]) == pytest.approx(target, rel=2e-3 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("block", [1, 4, 32])
def test_a_weight_is_raised_by_any_factor(block: int) -> None:
    param = torch.zeros(100, 80).requires_grad_()
    optimizer = specopt.NormScaleAdamW([param], lr=1e-33, weight_decay=0, target=5.0, raise_small=True, block=block)
    for step in range(3):
        param.grad = torch.randn(100, 80, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        assert float(exact(param)[1][0]) == pytest.approx(5.0, rel=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_penalty_of_extreme_scales(scale: float) -> None:
    params = [(scale * param.detach()).requires_grad_() for param in parameters(torch.float32)]
    before = [param.detach().clone() for param in params]
    optimizer = specopt.SNRSGD(params, lr=1.0, snr_lambda=0.5, tolerance=1e-6, max_passes=150)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for param, old in zip(params, before, strict=True):
        if param.ndim > 1:
            u, s, vh = exact(old)
            expected = old.double().flatten(1) - 0.5 * s[0] * torch.outer(u[:, 0], vh[0])
            assert torch.allclose(param.double().flatten(1) / scale, expected / scale, atol=1e-4)


TINY_RULES: list[tuple[type, dict[str, Any]]] = [
    (specopt.SNRSGD, {"momentum": 0.0, "snr_lambda": 0.5}),
    *[(specopt.NormScaleAdamW, {"mode": mode, "target": 100.0}) for mode in ("set", "cap", "rescale")],
    *[(specopt.NormScaleAdamW, {"norm": "frobenius", "mode": mode}) for mode in ("set", "cap")],
    (specopt.NormScaleAdamW, {"mode": "cap", "rank": "full"}),
]


@pytest.mark.parametrize("scale", [1e-37, 3e-39, 1e-41])
@pytest.mark.parametrize(("cls", "options"), TINY_RULES, ids=str)
def test_weights_around_the_smallest_normal_number_stay_finite(cls: Any, options: dict[str, Any], scale: float) -> None:
    params = [(scale * param.detach()).requires_grad_() for param in parameters(torch.float32)]
    groups: Any = [params]
    if options.get("mode") != "set" and not options.keys() & {"rank", "norm"}:  # what operators can be under
        model = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        model.weight.data.mul_(scale)
        groups.append(specopt.param_groups(model, conv="operator", inputs=torch.randn(1, 4, 8, 8)))
        params.append(model.weight)
    if cls is specopt.NormScaleAdamW:
        options = {"weight_decay": 0.0, **options}
    for optimizer in [cls(group, lr=0.1, **options) for group in groups]:
        for _ in range(4):
            for param in params:
                param.grad = torch.zeros_like(param)
            optimizer.step()
        for state in optimizer.state.values():
            blocks = [value for value in state.values() if isinstance(value, Tensor) and value.ndim > 1]
            assert all(bool(block.isfinite().all()) for block in blocks)
    assert all(bool(param.isfinite().all()) for param in params)


STILL: list[tuple[type, dict[str, Any]]] = [
    (specopt.SNRSGD, {"momentum": 0.9, "snr_lambda": 0.5, "weight_decay": 0.1}),
    *[(specopt.NormScaleAdamW, {"mode": mode, "target": 5.0}) for mode in ("set", "cap", "rescale")],
    *[(specopt.NormScaleAdamW, {"norm": "frobenius", "mode": mode}) for mode in ("set", "cap")],
]


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0), torch.tensor([0.0])], ids=["float", "tensor", "one entry"])
@pytest.mark.parametrize(("cls", "options"), STILL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_learning_rate_zero_changes_no_weight(cls: Any, options: dict[str, Any], lr: Any, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    before = [param.detach().clone() for param in params]
    optimizer = cls(params, lr=lr, foreach=False, **options)
    for step in range(3):
        set_gradients(params, clones(params), seed=step)
        optimizer.step()
    assert all(torch.equal(param.detach(), old) for param, old in zip(params, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_keep_a_float32_block(kind: str, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = OURS[kind](params)
    if "eps" in optimizer.defaults:
        optimizer.param_groups[0]["eps"] = 1e-4  # AdamW's default underflows in float16
    for step in range(4):
        set_gradients(params, clones(params), seed=step)
        optimizer.step()
    assert all(bool(param.isfinite().all()) for param in params)
    own = [v for p in params for n, v in optimizer.state[p].items() if n.startswith("spectral") and torch.is_tensor(v)]
    assert own and all(value.dtype == torch.float32 for value in own)


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 40), (40, 1), (2, 300), (33, 33), (64, 65), (65, 64), (65, 66), (64, 3, 1, 1)]
)
def test_small_and_narrow_shapes(kind: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(shape, generator=generator).requires_grad_()
    optimizer = OURS[kind]([param])
    for _ in range(3):
        param.grad = torch.randn(shape, generator=generator)
        optimizer.step()
    assert bool(param.isfinite().all())
    if kind == "rescale":
        assert float(exact(param)[1][0]) == pytest.approx((shape[0] / shape[1]) ** 0.5, rel=1e-3)


def test_rank_one_and_identity_weights(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    outer = torch.outer(torch.randn(80, generator=generator), torch.randn(90, generator=generator))
    params = [outer.requires_grad_(), torch.eye(90).requires_grad_(), torch.eye(70, 110).requires_grad_()]
    optimizer = OURS[kind](params)
    for _ in range(3):
        for param in params:
            param.grad = 1e-3 * torch.randn(param.shape, generator=generator)
        optimizer.step()
    assert all(bool(param.isfinite().all()) for param in params)
    if kind == "rescale":
        for param in params:
            target = (param.shape[0] / param.shape[1]) ** 0.5
            assert float(exact(param)[1][0]) == pytest.approx(target, rel=5e-3)


@pytest.mark.parametrize("wide", [64, 128])
def test_weights_of_rank_one_that_are_graded_beyond_all_rounding(kind: str, wide: int) -> None:
    """MKL's eigh of float32 does not converge on the Gram matrices of about half of them."""
    rows = wide - 16
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        rest = 1e-12 * torch.randn(rows - 1, generator=generator).sign()
        weight = torch.outer(torch.cat([torch.ones(1), rest]), torch.randn(wide, generator=generator))
        param = (weight if kind == "snr" else weight / weight.norm()).requires_grad_()
        optimizer = OURS[kind]([param])
        param.grad = torch.zeros_like(param)
        for _ in range(2):
            optimizer.step()
        (row,) = specopt.spectral_report(optimizer)
        assert row.sigma == pytest.approx(float(exact(param)[1][0]), rel=1e-4)


def test_transposed_and_sliced_weights_are_controlled_in_place(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    storage = torch.randn(90, 180, generator=generator)
    views = [storage.t()[3:78, 5:75], storage[:, 90:170]]
    others = [view.clone() for view in views]
    results = []
    for weights in (views, others):
        params = [weight.detach().requires_grad_() for weight in weights]
        optimizer = OURS[kind](params)
        for step in range(2):
            for param in params:
                param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        results.append([param.detach().clone() for param in params])
    for mine, plain in zip(*results, strict=True):
        assert torch.allclose(mine, plain, rtol=1e-4, atol=1e-5)
