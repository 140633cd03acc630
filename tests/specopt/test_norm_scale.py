"""NormScaleAdamW against AdamW followed by the exact correction from SVD."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import specopt
from tests.specopt.helpers import DEVICE, clones, exact, gap_of, parameters, set_gradients

TIGHT: dict[str, Any] = {"tolerance": 1e-6, "max_passes": 150}
pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")


def sigma_star(weight: Tensor) -> float:
    return math.sqrt(weight.shape[0] / weight.shape[1])


def one_step(
    params: list[Tensor], options: dict[str, Any], base: dict[str, Any], steps: int = 3
) -> list[list[tuple[Tensor, Tensor]]]:
    """Pairs (ours, plain AdamW from the same state) after each of a few steps."""
    others = clones(params)
    ours = specopt.NormScaleAdamW(params, lr=1e-2, **options, **base)
    theirs = torch.optim.AdamW(others, lr=1e-2, **base)
    seen = []
    for step in range(steps):
        with torch.no_grad():
            for param, other in zip(params, others, strict=True):
                other.copy_(param)
        set_gradients(params, others, seed=step)
        ours.step()
        theirs.step()
        seen.append([(p.detach().clone(), o.detach().clone()) for p, o in zip(params, others, strict=True)])
    return seen


@pytest.mark.parametrize("base", [{}, {"amsgrad": True}, {"maximize": True, "weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_set_equals_adamw_then_exact_correction(dtype: torch.dtype, base: dict[str, Any]) -> None:
    for pairs in one_step(parameters(dtype), TIGHT, base):
        for mine, plain in pairs:
            if mine.ndim == 1:
                assert torch.equal(mine, plain)
                continue
            u, s, vh = exact(plain)
            correction = (sigma_star(mine) - s[0]) * torch.outer(u[:, 0], vh[0])
            expected = plain.double().flatten(1) + correction
            if gap_of(s) >= 0.01:
                rounding = 2.0**-23 * plain.norm() if dtype == torch.float32 else 0.0
                assert (mine.double().flatten(1) - expected).norm() <= 1e-4 * correction.norm() + rounding
            else:
                assert_spectrum_is_set(mine, s)


def assert_spectrum_is_set(mine: Tensor, before: Tensor) -> None:
    """sigma* is a singular value, the others are as before."""
    after = exact(mine)[1]
    expected = torch.cat([before[1:], torch.tensor([sigma_star(mine)], dtype=torch.float64)]).sort(descending=True)[0]
    assert torch.allclose(after, expected, rtol=0, atol=1e-5 * float(before[0]))


def test_set_in_a_flat_spectrum_moves_one_singular_value_to_the_target() -> None:
    for pairs in one_step(parameters(torch.float32, gap=1e-4), TIGHT, {}):
        for mine, plain in pairs:
            if mine.ndim > 1:
                assert_spectrum_is_set(mine, exact(plain)[1])


@pytest.mark.parametrize("mode", ["set", "cap"])
def test_frobenius_equals_adamw_then_scaling(mode: str) -> None:
    for pairs in one_step(parameters(torch.float32), {"norm": "frobenius", "mode": mode}, {}):
        for mine, plain in pairs:
            if mine.ndim > 1:
                matrix = plain.double().flatten(1)
                target = math.sqrt(min(matrix.shape)) * sigma_star(mine)
                factor = target / matrix.norm()
                factor = factor.clamp_max(1) if mode == "cap" else factor
                assert torch.allclose(mine.double().flatten(1), factor * matrix, rtol=1e-6, atol=1e-7 * float(factor))


def test_cap_lowers_what_is_above_and_leaves_the_rest_alone() -> None:
    for pairs in one_step(parameters(torch.float32), {"mode": "cap", **TIGHT}, {}):
        for mine, plain in pairs:
            if mine.ndim > 1 and exact(plain)[1][0] <= sigma_star(mine):
                assert torch.allclose(mine, plain, rtol=1e-6, atol=1e-7)  # the base update, to rounding
            elif mine.ndim > 1:
                assert_spectrum_is_set(mine, exact(plain)[1])


def test_rescale_makes_the_spectral_norm_the_target() -> None:
    for pairs in one_step(parameters(torch.float32), {"mode": "rescale", **TIGHT}, {}):
        for mine, plain in pairs:
            if mine.ndim > 1:
                factor = sigma_star(mine) / exact(plain)[1][0]
                assert torch.allclose(mine.double(), factor * plain.double(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("target", "expected"), [("fan", None), (1.7, 1.7), ("initial", 2.0)])
def test_targets(target: Any, expected: float | None) -> None:
    for pairs in one_step(parameters(torch.float32), {"target": target, "mode": "rescale", **TIGHT}, {}):
        for mine, _ in pairs:
            if mine.ndim > 1:
                wanted = expected or math.sqrt(mine.shape[0] / math.prod(mine.shape[1:]))
                assert float(exact(mine)[1][0]) == pytest.approx(wanted, rel=2e-4)


def test_initial_frobenius_norm_is_kept() -> None:
    params = parameters(torch.float32)
    norms = [param.detach().norm() for param in params]
    one_step(params, {"norm": "frobenius", "target": "initial"}, {})
    for param, norm in zip(params, norms, strict=True):
        if param.ndim > 1:
            assert float(param.detach().norm()) == pytest.approx(float(norm), rel=1e-5)


ZERO_START: list[dict[str, Any]] = [
    {"mode": "set"},
    {"mode": "set", "rank": 4},
    {"mode": "set", "raise_small": True},
    {"mode": "rescale"},
    {"mode": "cap"},
    {"mode": "cap", "rank": "full"},
    {"norm": "frobenius"},
    {"norm": "frobenius", "mode": "cap"},
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("options", "backend"),
    [(options, "reference") for options in ZERO_START] + [(ZERO_START[i], "triton") for i in (0, 2, 3)],
    ids=str,
)
@pytest.mark.parametrize("shape", [(40, 64), (8, 64)], ids=str)
def test_a_weight_that_starts_at_zero_has_no_initial_norm_and_trains_as_under_adamw(
    options: dict[str, Any], shape: tuple[int, int], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECOPT_BACKEND", backend)
    device = DEVICE if backend == "triton" else torch.device("cpu")
    zero, other = torch.zeros(shape, device=device).requires_grad_(), torch.eye(*shape, device=device).requires_grad_()
    few = {} if options.get("rank") == "full" or "norm" in options else {"max_passes": 1, "block": 8}
    optimizer = specopt.NormScaleAdamW([zero, other], lr=1e-2, target="initial", **options, **few)
    plain = clones([zero])
    adamw = torch.optim.AdamW(plain, lr=1e-2)
    for step in range(3):
        other.grad = torch.ones_like(other)
        set_gradients([zero], plain, seed=step)
        optimizer.step()
        adamw.step()
    assert torch.allclose(zero, plain[0], rtol=1e-5, atol=1e-7)
    assert float(zero.detach().norm()) > 0
    row = next(iter(specopt.spectral_report(optimizer)))
    assert row.target is None and row.finite


def test_groups_override_every_option() -> None:
    params = parameters(torch.float32)[:4]
    groups = [
        {"params": [params[0]], "norm": "frobenius"},
        {"params": [params[1]], "mode": "rescale", "target": 3.0},
        {"params": [params[2]], "spectral": False},
        {"params": [params[3]], "mode": "cap", "block": 8},
    ]
    optimizer = specopt.NormScaleAdamW(groups, lr=1e-2, target=1.0, **TIGHT)
    others = clones(params)
    plain = torch.optim.AdamW(others, lr=1e-2)
    set_gradients(params, others, seed=0)
    optimizer.step()
    plain.step()
    assert float(params[0].detach().norm()) == pytest.approx(math.sqrt(70), rel=1e-5)
    assert float(exact(params[1])[1][0]) == pytest.approx(3.0, rel=1e-5)
    assert torch.equal(params[2], others[2])
    assert float(exact(params[3])[1][0]) <= max(1.0, float(exact(others[3])[1][1])) * (1 + 1e-5)


def test_a_large_first_correction_is_warned_of_once() -> None:
    params = parameters(torch.float32)
    optimizer = specopt.NormScaleAdamW(params, lr=1e-2, target=50.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            set_gradients(params, clones(params), seed=step)
            optimizer.step()
    told = [str(w.message) for w in caught if "the first step moves" in str(w.message)]
    assert len(told) == 1
    assert "scaled_orthogonal_" in told[0]
    assert "moves 10 weight(s)" in told[0]


def test_scaled_orthogonal_init_is_not_warned_of() -> None:
    model = specopt.init.scaled_orthogonal_(torch.nn.Linear(30, 20))
    optimizer = specopt.NormScaleAdamW(model.parameters(), lr=1e-3)
    model(torch.randn(4, 30)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


@pytest.mark.parametrize("shape", [(80, 80), (20, 24)])
def test_initial_norms_of_both_kinds_are_kept_apart_when_the_norm_changes(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(shape, generator=generator).requires_grad_()
    optimizer = specopt.NormScaleAdamW([param], lr=1e-3, target="initial", mode="set")
    for norm in ("spectral", "frobenius", "spectral"):
        before = float(param.detach().norm()), float(exact(param)[1][0])
        optimizer.param_groups[0]["norm"] = norm
        param.grad = torch.randn(shape, generator=generator)
        optimizer.step()
        after = float(param.detach().norm()), float(exact(param)[1][0])
        assert after == pytest.approx(before, rel=2e-2)


def test_target_set_to_initial_during_training_is_the_norm_of_that_moment() -> None:
    param = torch.randn(80, 80, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = specopt.NormScaleAdamW([param], lr=1e-3, mode="rescale")
    for target in ("channels", "initial", "initial"):
        before = float(exact(param)[1][0])
        optimizer.param_groups[0]["target"] = target
        param.grad = torch.ones_like(param)
        optimizer.step()
        expected = 1.0 if target == "channels" else before
        assert float(exact(param)[1][0]) == pytest.approx(expected, rel=1e-3)


def test_restart_by_another_block_remembers_that_the_matrix_started_at_zero() -> None:
    param = torch.zeros(80, 80, requires_grad=True)
    optimizer = specopt.NormScaleAdamW([param], lr=1e-4)
    for block in (32, 32, 16, 8):
        optimizer.param_groups[0]["block"] = block
        param.grad = torch.randn(80, 80, generator=torch.Generator().manual_seed(block))
        optimizer.step()
    assert 0 < float(exact(param)[1][0]) < 0.05


def test_a_matrix_that_is_zero_when_another_rule_takes_over_is_not_raised() -> None:
    param = torch.zeros(80, 80, requires_grad=True)
    before = specopt.wrap(torch.optim.SGD([param], lr=1e-3), specopt.SpectralPenalty(0.1))
    param.grad = torch.zeros_like(param)
    before.step()
    optimizer = specopt.wrap(torch.optim.SGD([param], lr=1e-3), specopt.NormScale())
    optimizer.load_state_dict(before.state_dict())
    param.grad = torch.randn(80, 80, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert 0 < float(exact(param)[1][0]) < 0.05


@pytest.mark.parametrize("off", [{"spectral": False}, {"norm": "frobenius"}], ids=str)
def test_control_that_was_off_for_a_while_starts_cold(off: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(80, 80, generator=generator).requires_grad_()
    optimizer = specopt.NormScaleAdamW([param], lr=1e-2, mode="rescale", target=1.3)
    group = optimizer.param_groups[0]
    on = {"spectral": True, "norm": "spectral"}
    for step in range(60):
        group.update({**on, "mode": "rescale"} if step < 25 or step == 59 else {**off, "mode": "set"})
        param.grad = torch.randn(80, 80, generator=generator)
        optimizer.step()
    assert float(exact(param)[1][0]) == pytest.approx(1.3, rel=2e-3)


def test_warm_up_from_zero_is_warned_of() -> None:
    param = torch.randn(64, 64).requires_grad_()
    optimizer = specopt.NormScaleAdamW([param], lr=0.0)
    param.grad = torch.ones_like(param)
    with pytest.warns(UserWarning, match="not within"):
        optimizer.step()


def test_cap_is_not_warned_of() -> None:
    param = (10 * torch.randn(64, 64)).requires_grad_()
    optimizer = specopt.NormScaleAdamW([param], mode="cap")
    param.grad = torch.ones_like(param)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
