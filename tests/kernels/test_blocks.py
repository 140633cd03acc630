"""Gram matrices, mixes and residuals of skinny blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specopt.kernels import column_dots, first_column_residuals, grams, mixes
from specopt.kernels.blocks import device as triton_side
from specopt.kernels.blocks import reference

from .samples import assert_as_exact, block, generator, same, seeds, widths

heights = st.lists(st.integers(1, 150), min_size=1, max_size=4)
scales = st.sampled_from([1e-30, 1.0, 1e30])


@given(heights=heights, width=widths, extra=st.integers(0, 5), scale=scales, seed=seeds)
def test_grams_are_as_exact_as_torch_at_any_scale(heights, width, extra, scale, seed, device):
    random = generator(seed)
    blocks = [block(n, 1 + (width + i) % 64, random, device, scale) for i, n in enumerate(heights)]
    size = min(64, max(b.shape[1] for b in blocks) + extra)
    gram, peak = triton_side.grams(blocks, size)
    other, other_peak = reference.grams(blocks, size)
    assert torch.equal(peak, other_peak) and gram.shape == (len(blocks), size, size)
    for b, g, o, s in zip(blocks, gram, other, peak, strict=True):
        truth = torch.zeros(size, size, dtype=torch.float64, device=device)
        k = b.shape[1]
        truth[:k, :k] = (b.double() / s).mT @ (b.double() / s)
        assert_as_exact(g, o, truth)
        assert (g[k:] == 0).all() and (g[:, k:] == 0).all()


def test_tall_blocks_are_summed_in_strips_as_exactly(device):
    blocks = [
        block(n, 16, generator(n), device) * torch.logspace(-20, 20, n, device=device)[:, None] for n in (300, 20000)
    ]
    gram, peak = triton_side.grams(blocks, 16)
    other, _ = reference.grams(blocks, 16)
    for b, g, o, s in zip(blocks, gram, other, peak, strict=True):
        assert_as_exact(g, o, (b.double() / s).mT @ (b.double() / s))
    assert same((gram, peak), triton_side.grams(blocks, 16))


@pytest.mark.parametrize("value", [0.0, 1e-41])
def test_zero_subnormal_and_empty_blocks_have_a_zero_gram_and_scale_one(backend, value, device):
    gram, scale = grams([torch.full((n, 3), value, device=device) for n in (10, 1, 0)])
    assert (gram == 0).all() and (scale == 1).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rows", [1, 40, 700])
def test_a_non_finite_entry_shows_in_the_gram_of_its_block_alone(backend, bad, rows, device):
    blocks = [block(rows, 5, generator(i), device) for i in range(3)]
    blocks[1][rows // 2, 3] = bad
    gram, scale = grams(blocks)
    finite = gram.isfinite().all(2).all(1) & scale.isfinite()
    assert finite.tolist() == [True, False, True]
    blocks[1][:] = bad
    gram, scale = grams(blocks)
    assert (gram.isfinite().all(2).all(1) & scale.isfinite()).tolist() == [True, False, True]


@given(heights=heights, width=widths, sources=st.lists(widths, min_size=1, max_size=3), scale=scales, seed=seeds)
def test_mixes_are_as_exact_as_torch(heights, width, sources, scale, seed, device):
    random = generator(seed)
    terms = []
    for t, wide in enumerate(sources):
        blocks = [block(n, max(1, wide - i), random, device, scale if t == 0 else 1.0) for i, n in enumerate(heights)]
        small = torch.randn(len(heights), wide + 2, width + 1, generator=random).to(device)
        small[:, wide:], small[:, :, width:] = torch.nan, torch.nan  # beyond what is used
        terms.append((blocks, small))
    results, expected = (
        [torch.full((n, max(1, width - i)), torch.nan, device=device) for i, n in enumerate(heights)] for _ in range(2)
    )
    triton_side.mixes(terms, results, None)
    reference.mixes(terms, expected, None)
    for i, (result, other) in enumerate(zip(results, expected, strict=True)):
        products = [
            blocks[i].double() @ small[i, : blocks[i].shape[1], : result.shape[1]].double() for blocks, small in terms
        ]
        assert_as_exact(result, other, sum(products), sum(torch.linalg.vector_norm(p) for p in products))


def test_inactive_blocks_are_not_written(backend, device):
    blocks = [block(n, 4, generator(n), device) for n in (70, 9, 300)]
    out = [torch.full_like(b, torch.nan) for b in blocks]
    active = torch.tensor([False, True, False], device=device)
    mixes([(blocks, torch.eye(4, device=device).expand(3, 4, 4))], out, active=active)
    assert torch.equal(out[1], blocks[1])
    assert out[0].isnan().all() and out[2].isnan().all()


def test_more_than_three_terms_raise(device):
    blocks = [block(5, 2, generator(0), device)]
    term = (blocks, torch.eye(2, device=device)[None])
    for terms in ([], [term] * 4):
        with pytest.raises(ValueError):
            mixes(terms, [torch.empty_like(blocks[0])])


@given(heights=heights, scale=scales, tilt=st.sampled_from([0.0, 1e-4, 1.0]), seed=seeds)
def test_residuals_are_as_exact_as_torch(heights, scale, tilt, seed, device):
    random = generator(seed)
    units = [torch.nn.functional.normalize(block(n, 3, random, device), dim=0) for n in heights]
    blocks = [(2 * y + tilt * block(n, 3, random, device)) * scale for y, n in zip(units, heights, strict=True)]
    sizes = torch.full((len(heights),), 2 * scale, device=device)
    results = triton_side.first_column_residuals(blocks, units, sizes)
    expected = reference.first_column_residuals(blocks, units, sizes)
    for b, y, s, result, other in zip(blocks, units, sizes, results, expected, strict=True):
        x, v = b[:, 0].double() / s.double(), y[:, 0].double()
        assert_as_exact(result, other, torch.linalg.vector_norm(x - (x @ v) * v), 1.0)


@given(heights=heights, width=widths, scale=scales, seed=seeds)
def test_column_dots_are_as_exact_as_torch(heights, width, scale, seed, device):
    random = generator(seed)
    blocks = [block(n, max(1, width - i), random, device, scale) for i, n in enumerate(heights)]
    others = [block(n, max(1, width - i), random, device) for i, n in enumerate(heights)]
    sizes = torch.full((len(heights),), scale, device=device)
    results, expected = triton_side.column_dots(blocks, others, sizes), reference.column_dots(blocks, others, sizes)
    assert same([results], [triton_side.column_dots(blocks, others, sizes)])
    for x, y, s, result, other in zip(blocks, others, sizes, results, expected, strict=True):
        terms, k = x.double() / s.double() * y.double(), x.shape[1]
        assert_as_exact(result[:k], other[:k], terms.sum(0), torch.linalg.vector_norm(terms))
        assert (result[k:] == 0).all()


def test_a_non_finite_entry_shows_in_the_dot_of_its_column_alone(backend, device):
    blocks = [block(300, 3, generator(i), device) for i in range(2)]
    blocks[0][299, 1] = torch.nan
    dots = column_dots(blocks, blocks, torch.ones(2, device=device))
    assert dots.isfinite().tolist() == [[True, False, True], [True, True, True]]


def test_a_non_finite_column_has_a_non_finite_residual(backend, device):
    blocks = [block(2000, 2, generator(i), device) for i in range(2)]
    blocks[0][1999, 0] = torch.nan
    residuals = first_column_residuals(blocks, [b / 50 for b in blocks], torch.ones(2, device=device))
    assert residuals.isfinite().tolist() == [False, True]


def test_float64_stays_with_the_reference(device, monkeypatch):
    monkeypatch.setenv("SPECOPT_BACKEND", "triton")
    gram, scale = grams([torch.randn(8, 3, dtype=torch.float64, device=device)])
    assert gram.dtype == scale.dtype == torch.float64
