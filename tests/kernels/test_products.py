"""Skinny products: exact for every shape, dtype and stride, the same bits each time, nothing written that is masked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from specopt.kernels import skinny_products
from specopt.kernels.products import device as triton_side
from specopt.kernels.products import reference

from .samples import assert_as_exact, block, case_lists, generator, matrix, same, seeds, widths


@given(cases=case_lists, width=widths, seed=seeds)
def test_products_are_as_exact_as_torch(cases, width, seed, device):
    random = generator(seed)
    matrices = [matrix(case, random, device) for case in cases]
    blocks = [block(w.shape[1], 1 + (width + i) % 64, random, device) for i, w in enumerate(matrices)]
    results, expected = (
        [w.new_empty(w.shape[0], b.shape[1], dtype=b.dtype) for w, b in zip(matrices, blocks, strict=True)]
        for _ in range(2)
    )
    triton_side.skinny_products(matrices, blocks, results, None)
    reference.skinny_products(matrices, blocks, expected, None)
    for w, b, result, other in zip(matrices, blocks, results, expected, strict=True):
        assert_as_exact(result, other, w.double() @ b.double())


@pytest.mark.parametrize("shape", [(5, 4500), (70, 2049), (4500, 5)])
@pytest.mark.parametrize("transposed", [False, True])
def test_long_matrices_are_summed_in_chunks_as_exactly(shape, transposed, device):
    random = generator(1)
    w = torch.randn(shape[::-1] if transposed else shape, generator=random).to(device)
    w = w.mT if transposed else w
    b = block(shape[1], 10, random, device)
    assert_as_exact(*_both(w, b), w.double() @ b.double())


def _both(w, b):
    results = [torch.empty(w.shape[0], b.shape[1], device=w.device) for _ in range(2)]
    for side, result in zip((triton_side, reference), results, strict=True):
        side.skinny_products([w], [b], [result], None)
    return results


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("width", [1, 16, 28, 32])
def test_onednn_gets_blocks_without_gaps(width, transposed, monkeypatch):
    seen = []
    product = reference._onednn(torch.empty(reference.LARGE))
    if product is None:
        pytest.skip("torch without oneDNN")

    def linear(x, weight, *more):
        seen.extend((x, weight))
        return product(x, weight, *more)

    monkeypatch.setattr(reference, "_onednn", lambda matrix: linear)
    w = torch.randn(300, 300, generator=generator(6))
    reference.skinny_products(
        [w.mT if transposed else w], [torch.randn(300, 36)[:, :width]], [torch.empty(300, width)], None
    )
    assert len(seen) == (0 if transposed and width == 1 else 2)
    assert all(t.is_contiguous() or t.mT.is_contiguous() for t in seen)


@pytest.mark.parametrize("shape", [(300, 280), (70, 1024), (2100, 40)])
@pytest.mark.parametrize("width", [1, 5, 28, 32])
@pytest.mark.parametrize("layout", ["rows", "columns", "gaps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_large_matrices_of_the_cpu_are_multiplied_as_exactly(shape, width, layout, dtype, monkeypatch):
    monkeypatch.setattr(reference, "SLICE", 9000)
    random = generator(3)
    m, n = shape[::-1] if layout == "columns" else shape
    w = torch.randn(m, n + 3 * (layout == "gaps"), generator=random).to(dtype)[:, :n]
    w = w.mT if layout == "columns" else w
    b = torch.randn(shape[1], width + 2, generator=random).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    b = b[:, :width]
    out = b.new_full((shape[0], width + 1), torch.nan)
    reference.skinny_products([w], [b], [out[:, :width]], None)
    with torch.backends.mkldnn.flags(enabled=False):
        other = skinny_products([w], [b])[0] if dtype == torch.float64 else torch.empty(shape[0], width)
        reference.skinny_products([w], [b], [other], None)
    exact = w.double() @ b.double()
    for result in (out[:, :width], other):
        assert (result.double() - exact).norm() <= (1e-14 if dtype == torch.float64 else 1e-6) * exact.norm()
    assert out[:, width].isnan().all()


@given(cases=case_lists, width=widths, seed=seeds)
def test_two_runs_give_the_same_bits(cases, width, seed, device):
    random = generator(seed)
    matrices = [matrix(case, random, device) for case in cases]
    blocks = [block(w.shape[1], width, random, device) for w in matrices]
    runs = [[torch.empty(w.shape[0], width, device=device) for w in matrices] for _ in range(2)]
    for out in runs:
        triton_side.skinny_products(matrices, blocks, out, None)
    assert same(*runs)


def test_inactive_matrices_leave_out_untouched(backend, device):
    random = generator(2)
    matrices = [torch.randn(shape, generator=random).to(device) for shape in [(9, 20), (70, 5000), (30, 5000), (4, 4)]]
    blocks = [block(w.shape[1], 7, random, device) for w in matrices]
    out = [torch.full((w.shape[0], 7), torch.nan, device=device) for w in matrices]
    active = torch.tensor([True, False, True, False], device=device)
    skinny_products(matrices, blocks, out=out, active=active)
    assert [bool(o.isfinite().all()) for o in out] == active.tolist()
    assert [bool(o.isnan().all()) for o in out] == (~active).tolist()


def test_a_slice_of_columns_is_written_and_nothing_beside_it(backend, device):
    random = generator(3)
    w, b = torch.randn(33, 21, generator=random).to(device), block(21, 5, random, device)
    wide = torch.full((33, 9), 7.0, device=device)
    skinny_products([w], [b], out=[wide[:, 2:7]])
    torch.testing.assert_close(wide[:, 2:7], w @ b)
    assert (wide[:, [0, 1, 7, 8]] == 7).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_non_finite_entry_shows_in_its_row_and_only_there(backend, bad, device):
    random = generator(4)
    w, b = torch.randn(40, 30, generator=random).to(device), block(30, 4, random, device)
    w[17, 5] = bad
    (y,) = skinny_products([w], [b])
    assert (~y.isfinite()).any(1).nonzero().flatten().tolist() == [17]
    b[3, 2] = bad
    (y,) = skinny_products([w.nan_to_num(0, 0, 0)], [b])
    assert (~y.isfinite()).any(0).nonzero().flatten().tolist() == [2]


def test_zero_matrices_give_zero(backend, device):
    (y,) = skinny_products([torch.zeros(20, 30, device=device)], [block(30, 4, generator(5), device)])
    assert (y == 0).all()


def test_matrices_without_rows_or_columns_may_stand_in_the_list(backend, device):
    random = generator(6)
    matrices = [torch.randn(shape, generator=random).to(device) for shape in [(0, 5), (5, 0), (6, 5)]]
    blocks = [block(w.shape[1], 3, random, device) for w in matrices]
    empty, zero, real = skinny_products(matrices, blocks)
    assert empty.shape == (0, 3) and (zero == 0).all() and zero.shape == (5, 3)
    torch.testing.assert_close(real, matrices[2] @ blocks[2])
    assert skinny_products(matrices[:1], blocks[:1])[0].shape == (0, 3)


def test_float64_stays_with_the_reference(device, monkeypatch):
    monkeypatch.setenv("SPECOPT_BACKEND", "triton")
    w, b = (
        torch.randn(20, 30, dtype=torch.float64, device=device),
        torch.randn(30, 4, dtype=torch.float64, device=device),
    )
    (y,) = skinny_products([w], [b])
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, w @ b)


@pytest.mark.parametrize("shapes", [((3, 4), (5, 2)), ((3, 4), (4, 65)), ((3, 4), (4, 0)), ((4,), (4, 2))])
def test_shapes_that_do_not_fit_raise(shapes):
    with pytest.raises(ValueError):
        skinny_products([torch.zeros(shapes[0])], [torch.zeros(shapes[1])])
