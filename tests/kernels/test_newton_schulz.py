"""Caps of all singular values, polar factors and signs, against float64 SVD."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specopt import kernels
from specopt.kernels import full_precision, newton_schulz
from specopt.kernels.newton_schulz import best_quintic, polar, quintics
from tests.kernels.samples import generator
from tests.specopt.helpers import DEVICE

SPECTRA = {
    "flat": lambda n: 1 + 0.1 * torch.linspace(-1, 1, n, dtype=torch.float64),
    "about the limit": lambda n: 1 + 1e-5 * torch.linspace(-1, 1, n, dtype=torch.float64),
    "all equal": lambda n: torch.full((n,), 1.5, dtype=torch.float64),
    "wide": lambda n: torch.logspace(-6, 0.3, n, dtype=torch.float64),
    "one far above": lambda n: torch.cat([torch.full((n - 1,), 0.5).double(), torch.tensor([300.0]).double()]),
    "all below": lambda n: torch.linspace(0.01, 0.99, n, dtype=torch.float64),
    "rank deficient": lambda n: torch.cat([torch.zeros(n // 2), torch.linspace(0.1, 3, n - n // 2)]).double(),
}
SHAPES = [(90, 60), (50, 130), (64, 64), (7, 1), (1, 9)]
OVER = {torch.float32: 1e-5, torch.float64: 1e-11, torch.bfloat16: 1e-2, torch.float16: 2e-3}
MOVED = {torch.float32: 1e-5, torch.float64: 1e-11, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def with_values(values: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
    random = torch.randn(shape, generator=generator(seed), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(random, full_matrices=False)
    return (u * values) @ vh


def cap(matrix: Tensor, limit: float, **options: object) -> Tensor:
    sums = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    return kernels.cap_([matrix], torch.tensor([limit], dtype=sums, device=DEVICE), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_no_singular_value_stays_above_the_limit_and_none_below_moves(spectrum: str, dtype: torch.dtype) -> None:
    for seed, shape in enumerate(SHAPES):
        values = SPECTRA[spectrum](min(shape))
        matrix = (0.7 * with_values(values, shape, seed)).to(DEVICE, dtype)
        u, before, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        bound = float(cap(matrix, 0.7)[0])
        after = torch.linalg.svdvals(matrix.double())
        assert float(after[0]) <= 0.7 * (1 + OVER[dtype])
        expected = (u * before.clamp(max=0.7)) @ vh
        assert float(torch.linalg.matrix_norm(matrix.double() - expected, 2)) <= 0.7 * MOVED[dtype]
        assert float(before[0]) * (1 - 1e-3) <= bound <= float(before[0]) * (min(shape) ** (1 / 16) + 1e-3) + 1e-30


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e30])
def test_scale_of_matrix_and_limit_does_not_matter(scale: float) -> None:
    matrix = (scale * with_values(SPECTRA["flat"](40), (70, 40), 3)).float().to(DEVICE)
    u, before, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    cap(matrix, scale)
    assert float(torch.linalg.svdvals(matrix.double())[0]) <= scale * (1 + 1e-5)
    expected = (u * before.clamp(max=scale)) @ vh
    assert float((matrix.double() - expected).norm()) <= 1e-5 * scale


def test_float64_reaches_the_limit_from_any_distance() -> None:
    values = torch.logspace(-3, 9, 40, dtype=torch.float64)
    matrix = with_values(values, (60, 40), 4).to(DEVICE)
    cap(matrix, 1.0)
    assert float(torch.linalg.svdvals(matrix)[0]) <= 1 + 1e-9


def test_float32_reaches_the_limit_from_far_above() -> None:
    matrix = with_values(torch.logspace(0, 8, 40, dtype=torch.float64), (60, 40), 4).float().to(DEVICE)
    cap(matrix, 1.0)
    assert float(torch.linalg.svdvals(matrix.double())[0]) <= 1 + 1e-5


def test_matrices_with_nothing_above_keep_their_bits() -> None:
    matrix = with_values(SPECTRA["all below"](30) * 0.5, (50, 30), 5).float().to(DEVICE)
    before = matrix.clone()
    cap(matrix, 1.0)
    assert torch.equal(matrix, before)


def test_zero_non_finite_and_inactive_matrices_stay_and_others_of_the_list_do_not() -> None:
    good = with_values(SPECTRA["all equal"](20), (30, 20), 6).float().to(DEVICE)
    bad, off, zero = good.clone(), good.clone(), torch.zeros_like(good)
    bad[3, 4] = torch.nan
    kept = [bad.clone(), off.clone(), zero.clone()]
    active = torch.tensor([True, True, False, True], device=DEVICE)
    limits = torch.ones(4, device=DEVICE)
    bounds = kernels.cap_([good, bad, off, zero], limits, active=active)
    assert float(torch.linalg.svdvals(good.double())[0]) <= 1 + 1e-5
    for matrix, before in zip((bad, off, zero), kept, strict=True):
        assert torch.equal(matrix.nan_to_num(7.0), before.nan_to_num(7.0))
    assert bounds.isfinite().tolist() == [True, False, True, True]


def test_list_of_many_shapes_layouts_and_limits() -> None:
    wide = with_values(SPECTRA["flat"](20), (20, 50), 7).float().to(DEVICE)
    matrices = [wide, wide.clone().mT, wide.clone().mT.contiguous(), torch.zeros(90, 100, device=DEVICE)[::3, ::2]]
    matrices[3].copy_(with_values(SPECTRA["flat"](30), (30, 50), 8))
    limits = torch.tensor([1.0, 0.5, 2.0, 0.9], device=DEVICE)
    kernels.cap_(matrices, limits)
    for matrix, limit in zip(matrices, limits.tolist(), strict=True):
        top = float(torch.linalg.svdvals(matrix.double())[0])
        assert top == pytest.approx(min(limit, 1.1), rel=1e-5)
    assert kernels.cap_([], torch.ones(0, device=DEVICE)).shape == (0,)


def test_what_a_device_does_without_looking_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newton_schulz, "_looks", lambda like: False)
    ten = torch.cat([torch.full((20,), 0.5), torch.linspace(1.2, 10.0, 20)]).double()
    for values, wild in ((SPECTRA["flat"](40), False), (ten, False), (SPECTRA["one far above"](40), True)):
        matrix = with_values(values, (60, 40), 9).float().to(DEVICE)
        u, before, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        cap(matrix, 1.0, wild=wild)
        assert float(torch.linalg.svdvals(matrix.double())[0]) <= 1 + (1e-4 if values is ten else 1e-5)
        expected = (u * before.clamp(max=1.0)) @ vh
        assert float(torch.linalg.matrix_norm(matrix.double() - expected, 2)) <= (1e-4 if values is ten else 2e-5)


def test_stochastic_rounding_makes_the_mean_right() -> None:
    start = with_values(SPECTRA["all equal"](30), (40, 30), 10).to(DEVICE).bfloat16().double()
    u, _, vh = torch.linalg.svd(start, full_matrices=False)
    total = torch.zeros_like(start)
    for seed in range(1, 65):
        matrix = start.bfloat16()
        kernels.cap_([matrix], torch.ones(1, device=DEVICE), seeds=[float(seed)])
        total += matrix.double() / 64
    by_chance = float((total - u @ vh).norm())
    nearest = start.bfloat16()
    cap(nearest, 1.0)
    assert by_chance < 0.6 * float((nearest.double() - u @ vh).norm())


def test_polar_factor_and_sign_leave_what_is_too_small_between() -> None:
    values = torch.tensor([1.0, 0.5, 1e-2, 1e-9, 0.0], dtype=torch.float64)
    random = with_values(values, (9, 5), 11).to(DEVICE)
    u, _, vh = torch.linalg.svd(random, full_matrices=False)
    found = u.mT @ polar(random[None], least=1e-3)[0] @ vh.mT
    assert torch.allclose(found.diagonal()[:3], torch.ones(3).to(found), atol=1e-12)
    assert 1e-9 <= float(found[3, 3].abs()) < 1e-3
    q = torch.linalg.qr(torch.randn(5, 5, generator=generator(0), dtype=torch.float64))[0].to(DEVICE)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64, device=DEVICE)
    symmetric = (q * (signs * torch.tensor([1.0, 0.3, 1e-2, 1e-2, 0.9], dtype=torch.float64, device=DEVICE))) @ q.mT
    assert torch.allclose(polar(symmetric[None], least=1e-3, symmetric=True)[0], (q * signs) @ q.mT, atol=1e-12)


@pytest.mark.parametrize("least", [0.9, 0.5, 1e-2, 1e-5, 1e-9])
def test_quintics_take_the_interval_to_one_and_are_the_best(least: float) -> None:
    x = torch.logspace(torch.tensor(least).log10().item(), 0, 5000, dtype=torch.float64)
    a, b, c, error = best_quintic(least, 1.0)
    first = a * x + b * x**3 + c * x**5 - 1
    assert float(first.abs().max()) == pytest.approx(error, rel=1e-3, abs=1e-9)
    if least < 0.9:  # equal extremes of changing sign: no better one of this degree exists
        turns = first[(first.abs() > 0.999 * error)].sign()
        assert len(torch.unique_consecutive(turns)) == 4
    for p, q, r in quintics(least):
        x = p * x + q * x**3 + r * x**5
    assert float((x - 1).abs().max()) <= 1e-6


def test_full_precision_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def settings() -> list[object]:
        matmul = getattr(torch.backends.mkldnn, "matmul", None)
        return [getattr(b, "fp32_precision", None) for b in (torch.backends.cuda.matmul, matmul)]

    torch.set_float32_matmul_precision("high")
    before = settings()
    assert "tf32" in before or not any(before)
    with pytest.raises(KeyError), full_precision():
        inside = settings()
        raise KeyError
    after = settings()
    torch.set_float32_matmul_precision("highest")
    assert after == before
    assert all(value in ("ieee", None) for value in inside)
