"""Rank-r updates, scalings and Frobenius norms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specopt.kernels import frobenius_norms, rank_updates_, scale_
from specopt.kernels.updates import device as triton_side
from specopt.kernels.updates import reference

from .samples import SCALES, assert_as_exact, block, case_lists, copy, generator, matrix, same, seeds, widths

DTYPES = pytest.mark.parametrize("dtype", list(SCALES))
ranks = st.one_of(st.just(1), widths)


def _update(cases, rank, seed, device):
    random = generator(seed)
    matrices = [matrix(case, random, device) for case in cases]
    lefts = [block(w.shape[0], rank + i, random, device) for i, w in enumerate(matrices)]
    rights = [block(w.shape[1], rank + 2 * i, random, device) for i, w in enumerate(matrices)]
    sizes = torch.tensor([[SCALES[case[2]][case[4]]] for case in cases])
    coefficients = (torch.randn(len(cases), rank, generator=random) * sizes * 0.1).to(device)
    return matrices, coefficients, lefts, rights


@given(cases=case_lists, rank=ranks, seed=seeds)
def test_updates_are_as_exact_as_torch(cases, rank, seed, device):
    matrices, coefficients, lefts, rights = _update(cases, rank, seed, device)
    results, expected = [copy(w) for w in matrices], [copy(w) for w in matrices]
    triton_side.rank_updates_(results, coefficients, lefts, rights)
    reference.rank_updates_(expected, coefficients, lefts, rights)
    for w, c, u, v, result, other in zip(matrices, coefficients, lefts, rights, results, expected, strict=True):
        truth = w.double() + (u[:, :rank].double() * c.double()) @ v[:, :rank].double().mT
        assert_as_exact(result, other, truth)


@settings(max_examples=settings.default.max_examples // 2)
@given(cases=case_lists, rank=ranks, seed=seeds)
def test_two_runs_give_the_same_bits(cases, rank, seed, device):
    matrices, coefficients, lefts, rights = _update(cases, rank, seed, device)
    runs = [[copy(w) for w in matrices] for _ in range(2)]
    for run in runs:
        triton_side.rank_updates_(run, coefficients, lefts, rights)
    assert same(*runs)
    assert same([triton_side.frobenius_norms(matrices)], [triton_side.frobenius_norms(matrices)])


@DTYPES
def test_nothing_beside_a_view_is_written(backend, dtype, device):
    whole = torch.ones(50, 40, dtype=dtype, device=device)
    view = whole[3:-5:2, 1:-1:3]
    rank_updates_(
        [view],
        torch.ones(1, 1, device=device),
        [torch.ones(view.shape[0], 1, device=device)],
        [torch.ones(view.shape[1], 1, device=device)],
    )
    scale_([view], torch.full((1,), 2.0, device=device))
    assert (view == 4).all() and whole.sum() == whole.numel() + 3 * view.numel()


@DTYPES
def test_zero_coefficients_touch_nothing(backend, dtype, device):
    weights = [torch.full((5, 6), torch.nan, dtype=dtype, device=device), torch.ones(5, 6, dtype=dtype, device=device)]
    bad = [torch.full((n, 2), torch.nan, device=device) for n in (5, 6)]
    rank_updates_(weights, torch.zeros(2, 2, device=device), [bad[0]] * 2, [bad[1]] * 2)
    assert weights[0].isnan().all() and (weights[1] == 1).all()


@DTYPES
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_non_finite_value_is_never_written_over_a_finite_one(backend, dtype, rank, bad, device):
    random = generator(1)
    w, u, v = (torch.randn(shape, generator=random).to(device) for shape in [(40, 70), (40, rank), (70, rank)])
    w, ones = w.to(dtype), torch.ones(1, rank, device=device)
    expected = copy(w)
    u[7, 0] = bad
    result = copy(w)
    rank_updates_([result], ones, [u], [v])
    assert torch.equal(result[7], w[7])
    reference.rank_updates_([expected], ones, [u.nan_to_num(0, 0, 0)], [v])
    keep = torch.arange(40, device=device) != 7
    torch.testing.assert_close(result[keep], expected[keep])
    result = copy(w)
    rank_updates_([result], ones * bad, [u], [v])
    assert torch.equal(result, w)
    scale_([result], torch.full((1,), bad, device=device))
    assert torch.equal(result[w != 0], w[w != 0])


@DTYPES
def test_an_entry_that_would_overflow_its_dtype_keeps_its_value(backend, dtype, device):
    large = 0.75 * torch.finfo(dtype).max
    w = torch.tensor([[large, 1.0]], dtype=dtype, device=device)
    one = torch.ones(1, 1, device=device)
    result = copy(w)
    rank_updates_(
        [result], torch.full((1, 1), large, device=device), [one], [torch.tensor([[1.0], [0.0]], device=device)]
    )
    assert torch.equal(result, w)
    scale_([result], torch.full((1,), 2.0, device=device))
    assert result[0, 0] == w[0, 0] and result[0, 1] == 2


@given(cases=case_lists, factor=st.floats(0.125, 2.0, width=32), seed=seeds)
def test_scalings_are_rounded_once(cases, factor, seed, device):
    random = generator(seed)
    matrices = [matrix(case, random, device) for case in cases]
    results = [copy(w) for w in matrices]
    triton_side.scale_(results, torch.full((len(cases),), factor, device=device))
    for w, result in zip(matrices, results, strict=True):
        assert torch.equal(result, (w.float() * factor).to(w.dtype))


def test_a_factor_of_one_touches_nothing(backend, device):
    weights = [torch.randn(9, 5, generator=generator(2)).to(device) for _ in range(2)]
    before = [copy(w) for w in weights]
    scale_(weights, torch.tensor([1.0, 0.5], device=device))
    assert torch.equal(weights[0], before[0]) and torch.equal(weights[1], before[1] / 2)


@given(cases=case_lists, seed=seeds)
def test_frobenius_norms_are_as_exact_as_torch_at_any_scale(cases, seed, device):
    random = generator(seed)
    matrices = [matrix(case, random, device) for case in cases]
    results, expected = triton_side.frobenius_norms(matrices), reference.frobenius_norms(matrices)
    for w, result, other in zip(matrices, results, expected, strict=True):
        assert_as_exact(result, other, torch.linalg.vector_norm(w.double()))


def test_norms_of_many_strips_are_as_exact(device):
    w = torch.randn(1500, 2100, generator=generator(3)).to(device) * torch.logspace(-20, 0, 2100, device=device)
    assert_as_exact(
        triton_side.frobenius_norms([w]), reference.frobenius_norms([w]), torch.linalg.vector_norm(w.double())[None]
    )


@DTYPES
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_norms_are_non_finite_where_an_entry_is_and_zero_for_zeros(backend, dtype, bad, device):
    weights = [torch.ones(40, 130, dtype=dtype, device=device) for _ in range(3)]
    weights[0][39, 100] = bad
    weights[1].zero_()
    norms = frobenius_norms([*weights, torch.full((1, 1), bad, dtype=dtype, device=device)])
    assert norms.isfinite().tolist() == [False, True, True, False] and norms[1] == 0


def test_matrices_without_entries_may_stand_in_the_list(backend, device):
    weights = [torch.ones(shape, device=device) for shape in [(0, 3), (3, 0), (2, 2)]]
    sides = [[torch.ones(w.shape[i], 1, device=device) for w in weights] for i in range(2)]
    rank_updates_(weights, torch.ones(3, 1, device=device), *sides)
    scale_(weights, torch.full((3,), 0.5, device=device))
    assert (weights[2] == 1).all() and frobenius_norms(weights).tolist() == [0, 0, 2]


def test_a_write_moves_the_version_counter_of_the_base(backend, device):
    base = torch.ones(4, 3, 2, 2, device=device)
    view = base.flatten(1)
    for write in (
        lambda: scale_([view], torch.full((1,), 2.0, device=device)),
        lambda: rank_updates_(
            [view], torch.ones(1, 1, device=device), [base[:, :1, 0, 0]], [torch.ones(12, 1, device=device)]
        ),
    ):
        before = base._version
        write()
        assert base._version > before


def test_float64_stays_with_the_reference(device, monkeypatch):
    monkeypatch.setenv("SPECOPT_BACKEND", "triton")
    assert frobenius_norms([torch.ones(2, 2, dtype=torch.float64, device=device)]).dtype == torch.float64


@pytest.mark.parametrize("rank", [0, 65])
def test_ranks_out_of_range_raise(rank, device):
    blocks = [torch.ones(3, 65, device=device)]
    with pytest.raises(ValueError):
        rank_updates_([torch.ones(3, 3, device=device)], torch.ones(1, rank, device=device), blocks, blocks)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-9, 1.0, 1e17, 1e30])
@pytest.mark.parametrize("transposed", [False, True])
def test_norms_of_long_float32_matrices_are_exact_at_any_scale(scale: float, transposed: bool) -> None:
    matrix = scale * torch.randn(3000, 700, generator=torch.Generator().manual_seed(0))
    matrix[1] *= 1e-7
    matrix = matrix.mT if transposed else matrix
    (norm,) = reference.frobenius_norms([matrix])
    assert float(norm) == pytest.approx(float(torch.linalg.matrix_norm(matrix.double())), rel=2e-7)
