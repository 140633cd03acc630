"""The solve of a matrix of at most 64 columns, from the matrix itself, by one program."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import records as r
from .algebra import entry_of, ritz_values
from .decisions import decide_on_gradients, decide_on_weights, record_on_gradients, record_on_weights
from .kinds import BASIS, RITZ
from .rows import ROWS, add_gram, is_finite, lengths, no_gram, rows_of, scratch_at


@triton.jit
def exact(
    entry, options, stats, mine, sigmas, squares, round, last,
    KIND: tl.constexpr, KP: tl.constexpr, K: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A matrix of at most 64 columns: everything is read from the matrix itself."""
    k = tl.load(entry + r.K).to(tl.int32)
    if KIND == BASIS:
        if last != 0:
            before = tl.load(stats + r.STAT_RESIDUAL)
            residual = tl.where(is_finite(tl.load(mine + r.SIGMA)), 0.0, before)
            record_on_weights(stats, mine, sigmas, k, residual, K)
    elif round == 0:
        sigma = exact_triplet(entry, k, sigmas, squares, KP, K, DTYPE)
        if KIND == RITZ:
            residual = tl.where(is_finite(sigma), 0.0, tl.load(stats + r.STAT_RESIDUAL))
            decide_on_weights(entry, options, stats, mine, sigma, residual, 0.5, 0.0, round)
        else:
            count = tl.load(stats + r.STAT_COUNT) + 1
            decide_on_gradients(options, stats, mine, sigma, 0.0, 0.5, 0.0, count)
            record_on_gradients(stats, sigma, 0.0, 0.5)


@triton.jit
def weight_of(entry, DTYPE: tl.constexpr):
    """The matrix, and its steps from row to row and from column to column as the tracker reads it."""
    swapped = tl.load(entry + r.SWAPPED) != 0
    down, across = tl.load(entry + r.ROW_STEP), tl.load(entry + r.COLUMN_STEP)
    weight = tl.load(entry + r.WEIGHT).to(tl.pointer_type(DTYPE))
    return weight, tl.where(swapped, across, down), tl.where(swapped, down, across)


@triton.jit
def exact_triplet(entry, k, sigmas, squares, KP: tl.constexpr, K: tl.constexpr, DTYPE: tl.constexpr):
    """All singular values and the first vectors of a matrix; returns the first value."""
    R: tl.constexpr = ROWS if K <= 32 else ROWS // 4
    row, wide = tl.arange(0, R), tl.arange(0, K)
    m, _n = lengths(entry)
    weight, step, inner_step = weight_of(entry, DTYPE)
    offsets = row[:, None] * step + wide[None, :] * inner_step
    gram, peak = no_gram(K)
    for first in tl.range(0, m, R, num_stages=1):
        inside = (row < m - first)[:, None] & (wide < k)[None, :]
        x = tl.load(rows_of(weight, first, step) + offsets, inside, 0.0).to(tl.float32)
        gram, peak, _ratio, _x = add_gram(gram, peak, x)
    basis, sigma, inverse = ritz_values(tl.sum(gram, 0), peak, k, squares, K)
    tl.store(sigmas + wide, sigma)
    right = tl.sum(tl.where(wide[None, :] == 0, basis, 0.0), 1)
    tl.store(scratch_at(entry, r.RIGHT_VECTORS) + wide * KP, right, wide < k)
    mixed = right * entry_of(inverse, 0, K)
    left = scratch_at(entry, r.LEFT_VECTORS)
    tl.debug_barrier()
    weight, step, inner_step = weight_of(entry, DTYPE)  # again, so that no offset is kept until here
    offsets = row[:, None] * step + wide[None, :] * inner_step
    for first in range(0, m, R):
        inside = (row < m - first)[:, None] & (wide < k)[None, :]
        x = tl.load(rows_of(weight, first, step) + offsets, inside, 0.0).to(tl.float32)
        u = tl.sum(x * mixed[None, :], 1)
        tl.store(rows_of(left, first, KP) + row * KP, u, row < m - first)
    return entry_of(sigma, 0, K)
