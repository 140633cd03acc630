"""What a pass does to one number, in Triton: the base updates, and rounding."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import records as r
from ..tiles import rounded


@triton.jit
def mixed(x):
    """A bijective hash of uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_bits(seed, SALT: tl.constexpr, index):
    """32 random bits of each int64 ``index``; in torch: ``rounding.random_bits``."""
    word = seed.to(tl.uint32, bitcast=True)
    key = mixed((word.to(tl.int64) + SALT * 0x9E3779B9).to(tl.uint32))
    return mixed(mixed((index >> 32).to(tl.uint32) ^ key) ^ index.to(tl.uint32))


@triton.jit
def stochastic(values, random, DTYPE: tl.constexpr):
    """Float32 rounded up or down at random with the mean kept, finite staying finite; in torch: ``rounding``."""
    bits = values.to(tl.uint32, bitcast=True)
    sign, size = bits & 0x80000000, bits & 0x7FFFFFFF
    finite = size < 0x7F800000
    if DTYPE == tl.bfloat16:  # noqa: SIM300 -- Triton compares a constexpr from the left
        up = tl.minimum(size + (random >> 16), 0x7F7FFFFF)
        size = tl.where(finite, up, size | tl.where(size > 0x7F800000, 0x400000, 0))
        return ((sign | size) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif DTYPE == tl.float16:  # noqa: SIM300 -- as above
        up = tl.minimum(((size + (random >> 19)) & 0x7FFFE000).to(tl.float32, bitcast=True), 65504.0)
        steps = size.to(tl.float32, bitcast=True) * 16777216.0  # of a subnormal number
        low = tl.floor(steps)
        above = (random >> 8).to(tl.float32) * 5.9604644775390625e-08 < steps - low
        tiny = (low + above.to(tl.float32)) * 5.9604644775390625e-08
        near = tl.where(size < 0x38800000, tiny, up).to(tl.uint32, bitcast=True)
        return tl.where(finite, (sign | near).to(tl.float32, bitcast=True), values).to(tl.float16)
    else:
        return values


@triton.jit
def nearest(values, DTYPE: tl.constexpr):
    """Float32 rounded to nearest, NaN staying NaN: the integers of :func:`rounded` would carry its bits into zero."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300 -- Triton compares a constexpr from the left
        bits = values.to(tl.uint32, bitcast=True)
        bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits).to(tl.uint32)
        values = bits.to(tl.float32, bitcast=True)
    return rounded(values, DTYPE)


@triton.jit
def is_finite(values):
    return tl.abs(values) < float("inf")


@triton.jit
def pointer_to(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The cast comes after the promise is chosen: a hint holds for a value wherever it is used."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def sgd_direction(w, g, buffer, momentum, damping, decay, fresh, nesterov, has_buffer):
    """What ``torch.optim.SGD`` subtracts, times the rate; and the momentum buffer."""
    g = tl.where(decay != 0, g + decay * w, g)
    buffer = tl.where(fresh, g, momentum * buffer + damping * g)
    direction = tl.where(nesterov, g + momentum * buffer, buffer)
    return tl.where(has_buffer, direction, g), buffer


@triton.jit
def lerp(start, end, weight):
    """As torch's: from the nearer end."""
    near = weight < 0.5
    return tl.where(near, start, end) + tl.where(near, weight, weight - 1) * (end - start)


@triton.jit
def adamw_corrections(entry, options):
    """``(1 − β₁ᵗ, sqrt(1 − β₂ᵗ))``, from the host or, with a step count on the device, for the step after it."""
    step = tl.load(entry + r.STEP)
    bias1, bias2_root = tl.load(options + r.BIAS1), tl.load(options + r.BIAS2_ROOT)
    if step != 0:
        t = tl.load(step.to(tl.pointer_type(tl.float32))).to(tl.float64) + 1
        log1 = tl.log(1 - tl.load(options + r.COMPLEMENT1).to(tl.float64))
        log2 = tl.log(1 - tl.load(options + r.COMPLEMENT2).to(tl.float64))
        bias1 = (1 - tl.exp(t * log1)).to(tl.float32)
        bias2_root = tl.sqrt(1 - tl.exp(t * log2)).to(tl.float32)
    return bias1, bias2_root
