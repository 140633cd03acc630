"""The block's own steps: an orthonormal basis of anything, Ritz triplets, and convergence of the next basis."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specopt import kernels
from specopt.kernels import BasisLayout

from .samples import DEVICE

pytestmark = pytest.mark.usefixtures("backend")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def start(rows: int, columns: int, variant: int = 0) -> Tensor:
    return kernels.start_block(rows, columns, torch.float32, DEVICE, variant)


def orthonormal(candidates: list[Tensor]) -> list[Tensor]:
    out = [torch.full_like(block, torch.nan) for block in candidates]
    kernels.orthonormalize(candidates, [start(*block.shape) for block in candidates], out)
    return out


def assert_orthonormal(basis: Tensor, tolerance: float = 2e-5) -> None:
    gram = basis.double().mT @ basis.double()
    assert torch.allclose(gram, torch.eye(len(gram), dtype=gram.dtype, device=DEVICE), atol=tolerance)


def test_start_is_the_same_everywhere_and_independent_of_torchs_random_state() -> None:
    state = torch.get_rng_state()
    block = start(5, 3)
    assert torch.equal(state, torch.get_rng_state())
    assert block[0].tolist() == [0.33352023363113403, 0.9172215461730957, 1.573005199432373]
    assert torch.equal(start(1000, 3)[:5], block)
    assert not torch.equal(start(5, 3, variant=1), block)


def test_orthonormal_basis_keeps_the_span_and_the_first_direction() -> None:
    blocks = [random(70, 28), 1e-30 * random(50, 10), 1e30 * random(33, 5), random(9, 9)]
    for block, basis in zip(blocks, orthonormal(blocks), strict=True):
        assert_orthonormal(basis)
        scaled = (block / block.abs().max()).double()
        assert (scaled - basis.double() @ (basis.double().mT @ scaled)).norm() <= 1e-5 * scaled.norm()
        first = block[:, 0] / block.abs().max()
        assert torch.allclose(basis[:, 0], first / first.norm(), atol=1e-5)


def test_zero_equal_and_dependent_columns_are_replaced(backend: str) -> None:
    column = random(60, 1)
    repeated = column.expand(-1, 8).contiguous()
    low_rank = random(60, 2, seed=1) @ random(2, 8, seed=2)
    for basis in orthonormal([repeated, low_rank, torch.zeros(60, 8, device=DEVICE)]):
        found = basis[:, basis.norm(dim=0) > 0]
        assert_orthonormal(found, 2e-5 if backend == "reference" else 2e-4)
        assert found.shape[1] >= 7  # a column of nothing but rounding may be left out


def test_columns_of_any_rank_become_orthonormal(backend: str) -> None:
    """Some dependent, some close to it: what the first pass keeps at its threshold is little but rounding errors."""
    seeds = range(60 if backend == "reference" else 4)
    for columns in (8, 12, 16, 32):
        blocks = [
            random(60, 1 + seed % 5, seed=seed) @ random(1 + seed % 5, columns, seed=seed + 100) for seed in seeds
        ]
        blocks = [
            block + 10.0 ** -(2 + seed % 4) * random(60, columns, seed=seed + 200) if seed % 3 == 0 else block
            for seed, block in zip(seeds, blocks, strict=True)
        ]
        for basis in orthonormal(blocks):
            found = basis[:, basis.norm(dim=0) > 0]
            assert_orthonormal(found, 1e-6 if backend == "reference" else 1e-3)
            assert backend != "reference" or found.shape[1] == columns


def test_nearly_parallel_columns_are_separated() -> None:
    block = random(90, 1) + 1e-2 * random(90, 6, seed=3)
    (basis,) = orthonormal([block])
    assert_orthonormal(basis)
    assert (block - basis @ (basis.mT @ block)).norm() <= 1e-4 * (block - block.mean(1, keepdim=True)).norm()


def test_block_with_a_non_finite_entry_leaves_its_output_alone() -> None:
    bad = random(40, 4)
    bad[3, 2] = torch.inf
    out = [torch.zeros(40, 4, device=DEVICE) for _ in range(2)]
    kernels.orthonormalize([bad, random(40, 4)], [start(40, 4)] * 2, out)
    assert not out[0].any()
    assert_orthonormal(out[1])


def test_ritz_triplets_satisfy_their_equation_and_are_exact_on_an_invariant_subspace() -> None:
    matrices = [random(40, 30), 1e-30 * random(20, 70, seed=1), 1e30 * random(64, 64, seed=2), random(50, 6, seed=3)]
    bases = [torch.linalg.svd(w.double())[2][:k].mT.float() for w, k in zip(matrices, (8, 16, 5, 6), strict=True)]
    mixed = [basis @ torch.linalg.qr(random(basis.shape[1], basis.shape[1], seed=9))[0] for basis in bases]
    triplets = kernels.ritz_triplets(kernels.skinny_products(matrices, mixed), mixed)
    for i, (w, left, right) in enumerate(zip(matrices, triplets.lefts, triplets.rights, strict=True)):
        values = torch.linalg.svdvals(w.double())
        assert float(triplets.sigma[i, 0] / values[0]) == pytest.approx(1, abs=2e-6)
        k = right.shape[1]
        images, scaled = w.double() @ right.double(), left.double() * triplets.sigma[i, :k].double()
        assert (images - scaled).norm() <= 1e-5 * images.norm()
        assert bool((left.norm(dim=0) - 1).abs().max() < 1e-4)


def test_zero_matrix_gives_zero_triplets_and_a_non_finite_one_shows() -> None:
    bad = random(40, 30)
    bad[0, 0] = torch.nan
    matrices = [torch.zeros(40, 30, device=DEVICE), bad]
    bases = orthonormal([random(30, 4), random(30, 4)])
    triplets = kernels.ritz_triplets(kernels.skinny_products(matrices, bases), bases)
    assert not triplets.sigma[0].any() and not triplets.lefts[0].any()
    assert not bool(triplets.sigma[1, 0].isfinite())


@pytest.mark.parametrize("correction", [-0.7, *(pytest.param(c, marks=pytest.mark.full) for c in (0.0, 0.4))])
def test_pairs_converge_to_the_singular_triplet_and_the_residual_says_so(correction: float) -> None:
    matrices = [random(60, 45), random(40, 90, seed=1)]
    layout = BasisLayout((14, 14), (2, 2), (2, 2))
    bases = orthonormal([start(w.shape[1], 14) for w in matrices])
    probes = [torch.zeros(w.shape[1], 2, device=DEVICE) for w in matrices]
    nothing = torch.zeros(2, 1, device=DEVICE)
    for i in range(14):
        triplets = kernels.ritz_triplets(kernels.skinny_products(matrices, bases), bases)
        lefts = [torch.cat([left, start(left.shape[0], 2)], 1) for left in triplets.lefts]
        returned = kernels.skinny_products([w.mT for w in matrices], lefts)
        starts = [start(*basis.shape, i) for basis in bases]
        residual = kernels.next_basis(triplets, returned, probes, starts, layout, nothing, bases)
        for basis in bases:
            assert_orthonormal(basis, 1e-4)
    for i, w in enumerate(matrices):
        u, v = triplets.lefts[i][:, 0].double(), triplets.rights[i][:, 0].double()
        true = (w.double().mT @ u - triplets.sigma[i, 0] * v).norm() / triplets.sigma[i, 0]
        assert float(residual[i]) == pytest.approx(float(true), rel=0.2, abs=2e-6)
        assert float(triplets.sigma[i, 0]) == pytest.approx(float(torch.linalg.matrix_norm(w, 2)), rel=1e-5)
    # the residual is that of the triplet, whatever is added along it
    coefficients = torch.full((2, 1), correction, device=DEVICE)
    kernels.rank_updates_(matrices, coefficients, triplets.lefts, triplets.rights)
    returned = kernels.skinny_products([w.mT for w in matrices], lefts)
    again = kernels.next_basis(triplets, returned, probes, starts, layout, coefficients[:, :1], bases)
    assert torch.allclose(again, residual, atol=5e-6)


def test_followers_lead_to_where_the_weight_has_moved() -> None:
    matrix = torch.diag(torch.linspace(1.0, 0.9, 60)).to(DEVICE)
    (basis,) = orthonormal([start(60, 14)])
    omega = start(60, 2)
    before = [matrix.mT @ omega]
    u, v = random(60, 1, seed=5), random(60, 1, seed=6)
    direction = v[:, 0] / v.norm()
    moved = matrix + 0.3 * (u / u.norm()) @ direction[None]
    triplets = kernels.ritz_triplets(kernels.skinny_products([moved], [basis]), [basis])
    returned = kernels.skinny_products([moved.mT], [torch.cat([triplets.lefts[0], omega], 1)])
    layout = BasisLayout((14,), (2,), (2,))
    kernels.next_basis(triplets, returned, before, [start(60, 14)], layout, torch.zeros(1, 1, device=DEVICE), [basis])
    assert float((basis.mT @ direction).norm()) > 0.999


def test_inactive_matrices_keep_their_basis() -> None:
    matrices = [random(40, 30), random(30, 50)]
    bases = orthonormal([start(w.shape[1], 6) for w in matrices])
    old = [basis.clone() for basis in bases]
    active = torch.tensor([True, False], device=DEVICE)
    triplets = kernels.ritz_triplets(kernels.skinny_products(matrices, bases), bases)
    returned = kernels.skinny_products([w.mT for w in matrices], triplets.lefts)
    layout = BasisLayout((6, 6), (1, 1), (0, 0))
    starts = [start(*basis.shape) for basis in bases]
    kernels.next_basis(triplets, returned, old, starts, layout, torch.zeros(2, 1, device=DEVICE), bases, active=active)
    assert not torch.equal(bases[0], old[0]) and torch.equal(bases[1], old[1])


def test_sharpened_triplets_are_singular_triplets_of_the_product() -> None:
    matrices = [random(60, 45), random(40, 90, seed=1), torch.zeros(30, 50, device=DEVICE), 1e20 * random(70, 50)]
    bases = orthonormal([start(w.shape[1], k) for w, k in zip(matrices, (20, 14, 20, 6), strict=True)])
    products = kernels.skinny_products(matrices, bases)
    triplets = kernels.ritz_triplets(products, bases)
    kernels.sharpen(triplets, 12)
    for i, (w, y) in enumerate(zip(matrices, products, strict=True)):
        r = min(12, y.shape[1])
        u, v = triplets.lefts[i][:, :r].double(), triplets.rights[i][:, :r].double()
        sigma, size = triplets.sigma[i, :r].double(), float(triplets.sigma[i, 0]) + 1e-30
        assert float((w.double() @ v - u * sigma).abs().max()) <= 2e-5 * size
        exact = torch.linalg.svdvals(y.double())
        assert bool((sigma <= exact[:r] * (1 + 1e-4)).all())
        assert float(sigma[0]) == pytest.approx(float(exact[0]), rel=1e-4)
        if float(sigma[0]) > 0:
            assert_orthonormal(u.float(), 2e-4)
            assert_orthonormal(v.float(), 2e-4)
        if r == y.shape[1]:  # nothing is left out
            assert torch.allclose(sigma, exact, rtol=2e-4)


def test_sharpening_leaves_what_is_not_finite_to_be_seen() -> None:
    bad = random(20, 15)
    bad[2, 3] = torch.nan
    bases = orthonormal([start(15, 8), start(15, 8)])
    matrices = [bad, random(20, 15, seed=2)]
    triplets = kernels.ritz_triplets(kernels.skinny_products(matrices, bases), bases)
    kernels.sharpen(triplets, 4)
    assert triplets.sigma[:, 0].isfinite().tolist() == [False, True]


@pytest.mark.parametrize("count", [1, 2, 5, 30])
def test_leading_residuals_are_the_first_and_the_largest(count: int) -> None:
    matrices = [random(60, 45), random(40, 90, seed=1)]
    bases = orthonormal([start(45, 14), start(90, 10)])
    triplets = kernels.ritz_triplets(kernels.skinny_products(matrices, bases), bases)
    returned = kernels.skinny_products([w.mT for w in matrices], triplets.lefts)
    first, largest = kernels.leading_residuals(returned, triplets, count)
    for i, z in enumerate(returned):
        v, top = triplets.rights[i].double(), float(triplets.sigma[i, 0])
        rest = (z.double() - v * (z.double() * v).sum(0)) / top
        norms = rest.norm(dim=0)[:count]
        assert float(first[i]) == pytest.approx(float(norms[0]), rel=1e-3, abs=1e-5)
        assert float(largest[i]) == pytest.approx(float(norms.max()), rel=1e-3, abs=1e-5)
