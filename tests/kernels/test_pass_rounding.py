"""Rounding in passes: to nearest and at random, the same bits as torch's version."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl

from specopt.kernels import records as r
from specopt.kernels.passes import arithmetic, rounding
from specopt.kernels.passes import device as passes

from .pass_bucket import (
    LEFT,
    SGD,
    PassBucket,
    matrices,
    set_sgd,
)


def test_rounding_to_bfloat16_keeps_every_nan_and_infinity():
    bits = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, -0x7FFFFF, 0x7F800000, -0x800000], dtype=torch.int32)
    special = bits.view(torch.float32)
    out = torch.empty(2, 8, dtype=torch.bfloat16)
    _round_kernel[(1,)](special, out, N=6, DTYPE=tl.bfloat16)
    assert torch.equal(out[:, :6].isnan(), special.isnan().expand(2, 6))
    assert torch.equal(out[:, 4:6].float(), special[4:].expand(2, 2))


@triton.jit
def _round_kernel(values, out, N: tl.constexpr, DTYPE: tl.constexpr):
    at = tl.arange(0, 8)
    x = tl.load(values + at, at < N, 0.0)
    tl.store(out + at, arithmetic.nearest(x, DTYPE))
    tl.store(out + 8 + at, arithmetic.stochastic(x, tl.full((8,), 0xFFFFFFFF, tl.uint32), DTYPE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["rows", "columns", "stepped"])
def test_stochastic_rounding_has_the_bits_of_torchs_version(dtype, layout):
    for scale in (1.0, 1e-6):
        weights, gradient = matrices(dtype, layout, scale, count=2)
        bucket = PassBucket(weights, gradient, exact=[1])
        set_sgd(bucket, lr=2.0**-9)
        expected = []
        for b, (w, g) in enumerate(zip(weights, gradient, strict=True)):
            bucket.numbers[b, r.SEED.value] = 10.5 + b
            random = rounding.random_bits(
                torch.tensor(10.5 + b), SGD, torch.arange(w.numel(), device=w.device).view(w.shape)
            )
            expected.append(rounding.stochastic(w.float() - 2.0**-9 * g.float(), random, dtype))
        assert not torch.equal(expected[-1], (weights[-1].float() - 2.0**-9 * gradient[-1].float()).to(dtype))
        passes.launch(bucket, SGD, LEFT, stochastic=True)
        assert all(torch.equal(w, e) for w, e in zip(weights, expected, strict=True))
        bucket.assert_product(4, LEFT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_unbiased_and_goes_to_a_neighbour(dtype):
    count = 1 << 17
    least = torch.finfo(dtype).smallest_normal
    for value in (1.001, -1.001, 3.3, 1e-3, -0.37 * least, 1.7 * least, 65000.0, 1e-9):
        values = torch.full((count,), value)
        random = rounding.random_bits(torch.tensor(3.0), 1, torch.arange(count))
        result = rounding.stochastic(values, random, dtype).double()
        exact = values[0].double()
        near = exact.abs().to(dtype)
        spacing = torch.nextafter(near, torch.ones_like(near) * torch.inf).double() - near.double()
        assert ((result - exact).abs() < spacing).all()
        assert (result.mean() - exact).abs() <= 5 * spacing / count**0.5, value
        assert len(result.unique()) <= 2


def test_stochastic_rounding_keeps_the_finite_finite():
    for dtype in (torch.bfloat16, torch.float16):
        large = torch.finfo(dtype).max
        values = torch.tensor([large, -large, large * 1.001, torch.finfo(torch.float32).max, torch.inf, torch.nan, 0.0])
        result = rounding.stochastic(values, torch.full((7,), 0xFFFFFFFF), dtype)
        assert result[:4].tolist() == [large, -large, large, large]
        assert result[4].isinf()
        assert result[5].isnan()
        assert result[6] == 0


def test_random_bits_are_even_and_differ_by_seed_salt_and_index():
    index = torch.arange(1 << 16)
    streams = [rounding.random_bits(torch.tensor(s), salt, index + far) for s in (1.0, 2.0) for salt in (1, 3)
               for far in (0, 1 << 40)]  # fmt: skip
    for a, b in itertools.combinations(streams, 2):
        assert ((a ^ b) >> 16 == 0).sum() < 10
    for stream in streams:
        ones = torch.stack([(stream >> bit & 1).double().mean() for bit in range(32)])
        assert ((ones - 0.5).abs() < 5 * 0.5 / 256).all()


def test_the_same_seed_gives_the_same_bits_and_another_another():
    results = []
    for seed in (1.0, 1.0, 2.0):
        weights, gradient = matrices(torch.bfloat16, "rows", count=2)
        bucket = PassBucket(weights, gradient)
        set_sgd(bucket, lr=0.01)
        bucket.set(SEED=seed)
        passes.launch(bucket, SGD, LEFT, stochastic=True)
        results.append(weights)
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert not torch.equal(results[0][-1], results[2][-1])
