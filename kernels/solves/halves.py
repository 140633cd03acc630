"""The solve of a tracker by halves (``TURN``), in stages: each by the strips of a block's rows, and then one program on
what they left.

After one half product: sums, Gram matrix and residual of it; triplets and what the step does with them; candidates of
the next basis on its side, and the basis on the other one turned; then :mod:`.algebra` makes the candidates
orthonormal.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import records as r
from .algebra import entry_of, ritz_values
from .decisions import LOST, again_wanted, decide_on_gradients, first_wanted, record_on_gradients
from .rows import (
    ROWS,
    SLICE,
    add_distance,
    add_gram,
    add_mixed,
    block_at,
    copy_column,
    distance_of,
    dots_of,
    gram_of,
    is_finite,
    leave_distance,
    leave_gram,
    lengths,
    mix,
    no_gram,
    park,
    partial_of,
    rows_of,
    scratch_at,
    strip_rows,
    strips_of,
    sum_strip,
)


@triton.jit
def steps_before(stats, half):
    """Steps that were made before this one."""
    return tl.load(stats + r.STAT_COUNT).to(tl.int32) - tl.where(half == 0, 0, 1)


@triton.jit
def lengths_by_side(entry, side):
    """Of the product, and of the other side."""
    m, n = lengths(entry)
    return tl.where(side == 0, m, n), tl.where(side == 0, n, m)


@triton.jit
def basis_on(entry, side):
    block = block_at(entry, tl.where(side == 0, r.LEFT, r.RIGHT))
    return block, tl.load(entry + tl.where(side == 0, r.LEFT_STEP, r.RIGHT_STEP)).to(tl.int32)


@triton.jit
def columns_of(entry):
    """``(k, a, kept, images)``."""
    k, a = tl.load(entry + r.K).to(tl.int32), tl.load(entry + r.PROBES).to(tl.int32)
    kept = k // 4
    return k, a, kept, k - kept - a


@triton.jit
def turn_sums(entry, side, index, count, K: tl.constexpr):
    """The chunks of the product summed; of strips the Gram matrix, ``y_i · x_i`` with the basis before and what the
    residual is made of."""
    R: tl.constexpr = ROWS if K <= 32 else ROWS // 4
    row, wide = tl.arange(0, R), tl.arange(0, K)
    length, _other = lengths_by_side(entry, side)
    k, _a, kept, _images = columns_of(entry)
    few = tl.maximum(kept, 1)
    product = scratch_at(entry, tl.where(side == 0, r.LEFT_PRODUCT, r.RIGHT_PRODUCT))
    chunks = tl.load(entry + tl.where(side == 0, r.LEFT_CHUNKS, r.RIGHT_CHUNKS)).to(tl.int32)
    total = scratch_at(entry, tl.where(side == 0, r.LEFT_SUM, r.RIGHT_SUM))
    old, old_step = basis_on(entry, side)
    offsets = row[:, None] * K + wide[None, :]
    for strip in range(index, strips_of(length, K), count):
        start, stop, peak = sum_strip(entry, strip, product, chunks, total, length, k, K)
        tl.debug_barrier()
        scale = tl.where(peak == 0, 1.0, peak)
        dots = tl.zeros((K,), tl.float32)
        along, square, rest = 0.0, 0.0, 0.0
        for first in range(start, stop, R):
            exists = row < stop - first
            inside = exists[:, None] & (wide < few)[None, :]
            y, x = rows_of(total, first, K), rows_of(old, first, old_step)
            terms = tl.load(y + offsets, inside, 0.0) / scale
            dots += tl.sum(terms * tl.load(x + row[:, None] * old_step + wide[None, :], inside, 0.0), 0)
            y, x = tl.load(y + row * K, exists, 0.0) / scale, tl.load(x + row * old_step, exists, 0.0)
            along, square, rest = add_distance(along, square, rest, y, x)
        tl.store(partial_of(entry, strip, K) + K * K + wide, dots)
        leave_distance(entry, strip, scale, along, square, rest, K)


@triton.jit
def turn_triplets(entry, options, stats, mine, sigmas, squares, side, half, last, K: tl.constexpr):
    """Ritz values, the small matrices of what follows, and what the step does; whether it wants a pair."""
    wide = tl.arange(0, K)
    before, pairs, done = tl.load(mine + r.SIGMA), tl.load(mine + r.PAIRS), steps_before(stats, half)
    length, _other = lengths_by_side(entry, side)
    k, a, kept, images = columns_of(entry)
    strips = strips_of(length, K)
    gram, peak = gram_of(entry, strips, K)
    basis, sigma, inverse = ritz_values(gram, peak, k, squares, K)
    tl.store(sigmas + wide, sigma)
    top = entry_of(sigma, 0, K)
    valid = is_finite(top)
    scale = tl.where(top > 0, top, 1.0)
    residual = tl.full((), float("nan"), tl.float32)
    if valid:
        dots = dots_of(entry, strips, peak, K) * (tl.where(peak == 0, 1.0, peak) / scale)
        residual = distance_of(entry, strips, scale, K)
        into, outof = wide[:, None], wide[None, :]
        one = ((outof - images == into) & (into < kept)) | ((outof - images - kept == into - k) & (into >= k))
        chosen = tl.where(outof < images, basis * inverse[None, :], tl.where(one & (outof < k), 1 / scale, 0.0))
        tl.debug_barrier()
        park(squares + 2 * K * K, basis, K)
        park(squares + 3 * K * K, chosen, K)
        minus = tl.where((outof - images == into) & (into < kept), -dots[:, None], 0.0)
        park(squares, minus, K)
        park(squares + K * K, tl.where((outof - images - kept == into) & (into < a), -1 / scale, 0.0), K)
    lost = tl.load(stats + r.STAT_RESIDUAL) > LOST
    if half == 0:
        wanted = first_wanted(options, top, tl.load(stats + r.STAT_TOP), residual, lost)
    else:
        wanted = again_wanted(options, pairs + 1.5, top, before, residual, lost)
    made = tl.where(half == 0, 0.5, pairs + 1)
    if half % 2 == 1:
        wanted = tl.load(mine + r.WANTED)
        tl.debug_barrier()
        if half == 1:
            tl.store(mine + r.SEEN, valid.to(tl.float32))
    else:
        decide_on_gradients(options, stats, mine, top, residual, made, wanted, done + 1)
        if (last != 0) | (wanted == 0):
            record_on_gradients(stats, top, residual, made)
    return wanted


@triton.jit
def turn_blocks(entry, squares, side, keep, index, count, K: tl.constexpr):
    """Strips of candidates on this side, and behind them strips of the turned basis on the other.

    ``keep``: this product's probe becomes the state's.
    """
    R: tl.constexpr = ROWS if K <= 32 else ROWS // 4
    row, wide = tl.arange(0, R), tl.arange(0, K)
    length, other_length = lengths_by_side(entry, side)
    k, a, kept, _images = columns_of(entry)
    old, old_step = basis_on(entry, side)
    total = scratch_at(entry, tl.where(side == 0, r.LEFT_SUM, r.RIGHT_SUM))
    probe = block_at(entry, tl.where(side == 0, r.LEFT_PROBE, r.RIGHT_PROBE))
    probe_step = tl.load(entry + tl.where(side == 0, r.LEFT_PROBE_STEP, r.RIGHT_PROBE_STEP)).to(tl.int32)
    vectors = scratch_at(entry, tl.where(side == 0, r.LEFT_VECTORS, r.RIGHT_VECTORS))
    candidates = scratch_at(entry, tl.where(side == 0, r.LEFT_SPARE, r.RIGHT_SPARE))
    here, there = strips_of(length, K), strips_of(other_length, K)
    size, other_size = strip_rows(length, K), strip_rows(other_length, K)
    for unit in range(index, here + there, count):
        if unit < here:
            start, stop = unit * size, tl.minimum(unit * size + size, length)
            gram, peak = no_gram(K)
            for first in range(start, stop, R):
                left = stop - first
                inside = (row < left)[:, None]
                kin, was = rows_of(old, first, old_step), rows_of(probe, first, probe_step)
                candidate = tl.zeros((R, K), tl.float32)
                candidate = add_mixed(candidate, kin, old_step, row, left, kept, squares, False, SLICE, K)
                candidate = add_mixed(candidate, was, probe_step, row, left, a, squares + K * K, False, SLICE, K)
                origin, factor = rows_of(total, first, K), squares + 3 * K * K
                candidate = add_mixed(candidate, origin, K, row, left, k + a, factor, True, K, K)
                at = row[:, None] * K + wide[None, :]
                tl.store(rows_of(candidates, first, K) + at, candidate, inside)
                tl.store(rows_of(vectors, first, K) + at, candidate, inside & (wide == 0)[None, :])
                gram, peak, _ratio, _x = add_gram(gram, peak, candidate)
            leave_gram(entry, unit, gram, peak, K)
            if keep:
                tl.debug_barrier()
                keep_probe(entry, side, start, stop, K)
        else:
            start = (unit - here) * other_size
            stop = tl.minimum(start + other_size, other_length)
            turned, step = basis_on(entry, 1 - side)
            other_vectors = scratch_at(entry, tl.where(side == 0, r.RIGHT_VECTORS, r.LEFT_VECTORS))
            mix(turned, step, squares + 2 * K * K, turned, step, start, stop, k, False, K)
            tl.debug_barrier()
            copy_column(turned, step, other_vectors, K, start, stop, K)


@triton.jit
def keep_probe(entry, side, start, stop, K: tl.constexpr):
    """Rows of the probe behind this step's product on one side, for the next step to be compared with."""
    R: tl.constexpr = ROWS if K <= 32 else ROWS // 4
    k, a = tl.load(entry + r.K).to(tl.int32), tl.load(entry + r.PROBES).to(tl.int32)
    total = scratch_at(entry, tl.where(side == 0, r.LEFT_SUM, r.RIGHT_SUM))
    probe = block_at(entry, tl.where(side == 0, r.LEFT_PROBE, r.RIGHT_PROBE))
    step = tl.load(entry + tl.where(side == 0, r.LEFT_PROBE_STEP, r.RIGHT_PROBE_STEP)).to(tl.int32)
    row, wide = tl.arange(0, R), tl.arange(0, SLICE)  # a is at most an eighth of 64
    for first in range(start, stop, R):
        inside = (row < stop - first)[:, None] & (wide < a)[None, :]
        x = tl.load(rows_of(total, first, K) + row[:, None] * K + (k + wide)[None, :], inside, 0.0)
        tl.store(rows_of(probe, first, step) + row[:, None] * step + wide[None, :], x, inside)
