"""Cholesky-QR factors and rotations of k × k matrices, by what they promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specopt.kernels import eigenvectors, orthonormalizers, rotations
from specopt.kernels.small import cholesky_shift, reference
from specopt.kernels.small import device as triton_side

from .samples import generator, same, seeds, widths

SIDES = pytest.mark.parametrize("side", [reference, triton_side], ids=["reference", "triton"])
FEWER = settings(max_examples=settings.default.max_examples // 2)  # a large matrix takes the interpreter seconds


def _factor(side, x):
    """``X T`` and what was dropped, for a float64 block with entries up to 1."""
    shift = cholesky_shift(x.shape[1], torch.float32)
    factor, dropped = side.orthonormalizers((x.mT @ x).float()[None], shift, 8 * shift)
    assert factor.isfinite().all()
    return x @ factor[0].double(), factor[0], dropped[0]


def _identity_error(q):
    return (q.mT @ q - torch.eye(q.shape[1], dtype=q.dtype, device=q.device)).abs().max()


def _random(rows, columns, seed, device):
    x = torch.randn(rows, columns, generator=generator(seed), dtype=torch.float64).to(device)
    return x / x.abs().max()


def _spectrum(eigenvalues, seed, device):
    """``G = Q diag(λ) Qᵀ`` (1, K, K) in float32."""
    k = len(eigenvalues)
    q = torch.linalg.qr(torch.randn(k, k, generator=generator(seed), dtype=torch.float64))[0]
    g = (q * torch.tensor(eigenvalues, dtype=torch.float64)) @ q.mT
    return ((g + g.mT) / 2).float()[None].to(device)


@SIDES
@FEWER
@given(width=widths, seed=seeds, decades=st.sampled_from([0, 6]))
def test_the_factor_makes_columns_orthonormal_whatever_their_lengths(side, width, seed, decades, device):
    x = _random(150, width, seed, device) * torch.logspace(0, -decades, width, dtype=torch.float64, device=device)
    x = x / x.abs().max()
    q, factor, dropped = _factor(side, x)
    assert not dropped.any()
    assert torch.equal(factor, factor.triu())
    assert _identity_error(q) < 1e-4


@SIDES
@pytest.mark.parametrize("width", [5, 16, 33])
def test_dependent_and_zero_columns_are_dropped_and_the_others_stay_orthonormal(side, width, device):
    x = _random(100, width, 1, device)
    x[:, 3] = 0.5 * x[:, 1]
    x[:, width - 1] = 0
    q, factor, dropped = _factor(side, x)
    assert dropped.nonzero().flatten().tolist() == [3, width - 1]
    assert (factor[:, dropped] == 0).all()
    assert _identity_error(q[:, ~dropped]) < 1e-4


@SIDES
def test_a_dropped_column_enters_none_after_it(side, device):
    """The third column is the little that the second has beside the first, which is dropped for being so little."""
    x = _random(100, 4, 3, device)
    x[:, 1] = x[:, 0] + 1e-2 * x[:, 2]
    factor, dropped = side.orthonormalizers((x.mT @ x).float()[None], cholesky_shift(4, torch.float32), 1e-3)
    assert dropped[0].tolist() == [False, True, False, False]
    assert (factor[0, 1] == 0).all()
    kept = (x @ factor[0].double())[:, ~dropped[0]]
    assert _identity_error(kept) < 1e-5


@SIDES
def test_columns_of_rounding_errors_leave_the_others_orthonormal(side, device):
    for seed in range(8):
        x = torch.cat([_random(60, 3, seed, device)] * 3, 1).float()
        x[:, 3:] += 1e-5 * _random(60, 6, seed + 8, device).float()
        x[:, 8] = _random(60, 1, seed + 16, device)[:, 0]
        q, _, dropped = _factor(side, x.double())
        assert dropped[3:8].all() and not dropped[8]
        assert _identity_error(q[:, ~dropped]) < 1e-5


@SIDES
def test_a_column_of_zeros_alone_is_dropped(side, device):
    _, factor, dropped = _factor(side, torch.zeros(4, 1, dtype=torch.float64, device=device))
    assert dropped.all() and (factor == 0).all()


@SIDES
def test_a_larger_threshold_drops_columns_that_lie_close(side, device):
    x = _random(100, 4, 2, device)
    x[:, 2] = x[:, 0] + 0.1 * x[:, 2]
    gram = (x.mT @ x).float()[None]
    shift = cholesky_shift(4, torch.float32)
    assert side.orthonormalizers(gram, shift, 8 * shift)[1].sum() == 0
    assert side.orthonormalizers(gram, shift, 0.05)[1][0].nonzero().flatten().tolist() == [2]


@SIDES
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("width", [2, 16, 20, 64])
def test_the_first_direction_is_the_top_eigenvector(side, width, scale, device):
    eigenvalues = [4.0, *torch.linspace(3.8, 0.1, width - 1).tolist()]
    gram = _spectrum(eigenvalues, width, device) * scale
    q, weight = side.rotations(gram)
    values, vectors = torch.linalg.eigh(gram[0].double())
    assert (q[0, :, 0].double() @ vectors[:, -1]).abs() > 1 - 1e-5
    torch.testing.assert_close(weight[0, 0].double(), values[-1], rtol=1e-5, atol=0.0)


@SIDES
@FEWER
@given(width=st.integers(1, 40), seed=seeds)
def test_rotations_are_orthonormal_and_weights_are_their_rayleigh_quotients(side, width, seed, device):
    gram = _spectrum((1 / torch.arange(1, width + 1, dtype=torch.float64)).tolist(), seed, device)
    q, weight = side.rotations(gram)
    q, g = q[0].double(), gram[0].double()
    assert _identity_error(q) < 1e-4
    torch.testing.assert_close(weight[0].double(), (q * (g @ q)).sum(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weight.sum().double(), g.trace(), rtol=1e-4, atol=0.0)


@SIDES
def test_a_diagonal_matrix_gets_its_entries_by_size(side, device):
    entries = torch.tensor([0.1, 5.0, 1.0, 3.0, 0.0, 2.0], device=device)
    q, weight = side.rotations(torch.diag(entries)[None])
    torch.testing.assert_close(weight[0], entries.sort(descending=True).values, rtol=1e-5, atol=1e-6)
    assert q[0].abs().argmax(0)[:5].tolist() == [1, 3, 5, 2, 0]


@SIDES
@pytest.mark.parametrize("equal", [2, 6])
def test_among_equal_eigenvalues_the_first_direction_is_one_of_them(side, equal, device):
    gram = _spectrum([2.0] * equal + [1.0] * (6 - equal), 3, device)
    q, weight = side.rotations(gram)
    torch.testing.assert_close(weight[0, 0].item(), 2.0, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(gram[0] @ q[0, :, 0], 2 * q[0, :, 0], rtol=1e-4, atol=1e-4)
    assert _identity_error(q[0].double()) < 1e-4


@SIDES
def test_a_zero_matrix_has_no_directions(side, device):
    q, weight = side.rotations(torch.zeros(2, 5, 5, device=device))
    assert (q == 0).all() and (weight == 0).all()


@SIDES
def test_rank_one_leaves_one_direction_with_weight(side, device):
    v = torch.tensor([3.0, 0.0, 4.0, 0.0], device=device)
    q, weight = side.rotations(torch.outer(v, v)[None])
    torch.testing.assert_close(q[0, :, 0].abs(), v / 5)
    torch.testing.assert_close(weight[0, 0].item(), 25.0)
    assert (weight[0, 1:] < 1e-4).all() and q.isfinite().all()


@SIDES
def test_matrices_do_not_touch_each_other(side, device):
    good = _spectrum([3.0, 2.0, 1.0], 4, device)
    bad = torch.full_like(good, torch.nan)
    q, weight = side.rotations(torch.cat([bad, good, bad]))
    alone_q, alone_weight = side.rotations(good)
    torch.testing.assert_close(q[1], alone_q[0])
    torch.testing.assert_close(weight[1], alone_weight[0])
    assert not weight[0].isfinite().any() and not weight[2].isfinite().any()


def test_two_runs_give_the_same_bits(device):
    gram = _spectrum([3.0, 2.5, 2.0, 1.0, 0.5], 5, device)
    assert same(triton_side.rotations(gram), triton_side.rotations(gram))
    shift = cholesky_shift(5, torch.float32)
    assert same(*(triton_side.orthonormalizers(gram, shift, 8 * shift) for _ in range(2)))


def test_transposed_gram_tensors_are_read_by_their_strides(backend, device):
    gram = _spectrum([3.0, 2.0, 1.0], 6, device).expand(4, 3, 3)
    assert same(rotations(gram), rotations(gram.contiguous()))
    assert same(orthonormalizers(gram.mT), orthonormalizers(gram.mT.contiguous()))


def test_float64_stays_with_the_reference(device, monkeypatch):
    monkeypatch.setenv("SPECOPT_BACKEND", "triton")
    gram = _spectrum([2.0, 1.0], 7, device).double()
    assert rotations(gram)[0].dtype == orthonormalizers(gram)[0].dtype == torch.float64


SYMMETRIC = {
    "random": lambda k: torch.randn(k, generator=generator(1), dtype=torch.float64).tolist(),
    "falling": lambda k: torch.logspace(0, -6, k, dtype=torch.float64).tolist(),
    "all equal": lambda k: [1.0] * k,
    "a cluster": lambda k: [1.0 + 1e-6 * i for i in range(k // 2)] + [0.1] * (k - k // 2),
    "zero": lambda k: [0.0] * k,
}


@pytest.mark.parametrize("width", [1, 3, 16, pytest.param(21, marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", SYMMETRIC)
def test_eigenvectors_are_orthonormal_and_make_the_matrix_diagonal(kind, width, backend, device):
    g = _spectrum(SYMMETRIC[kind](width), width, device)
    before = g.clone()
    r = eigenvectors(g)[0].double()
    assert torch.equal(g, before)
    assert _identity_error(r) < 2e-4
    turned = r.mT @ g[0].double() @ r
    size = float(g.abs().max()) + 1e-30
    assert float((turned - torch.diag(turned.diagonal())).abs().max()) <= 3e-5 * size
    exact = torch.linalg.eigvalsh(g[0].double()).flip(0)
    assert torch.allclose(turned.diagonal(), exact, rtol=0, atol=3e-4 * size)


@pytest.mark.parametrize("width", [32, 33, 50, 64])
@pytest.mark.parametrize("kind", SYMMETRIC)
def test_eigenvectors_of_wide_matrices(kind, width, device):
    g = _spectrum(SYMMETRIC[kind](width), 0, device)
    r = eigenvectors(g)[0].double()
    assert _identity_error(r) < 2e-4
    turned = r.mT @ g[0].double() @ r
    exact = torch.linalg.eigvalsh(g[0].double()).flip(0)
    largest = float(exact.abs().max()) + 1e-30
    assert float((turned - torch.diag(turned.diagonal())).abs().max()) <= 3e-5 * largest
    assert torch.allclose(turned.diagonal(), exact, rtol=0, atol=1e-4 * largest)


def test_eigenvectors_of_more_than_they_are_made_for_are_refused(device):
    with pytest.raises(ValueError, match="at most 64 columns, got 65"):
        eigenvectors(torch.zeros(1, 65, 65, device=device))
