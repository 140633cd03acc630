"""The solves of a tracker by pairs, in stages: each by the strips of a block's rows, and then one program on what they
left.

After ``W V`` (``RITZ``): sums and Gram matrix of Y; triplets and what the step does with them; their vectors.
After ``Wᵀ [U | Ω]`` (``BASIS``): candidates of the next basis; then :mod:`.algebra` makes them orthonormal.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import records as r
from .algebra import entry_of, orthonormalize, ritz_values
from .decisions import COLD_MAX, LOST, again_wanted, decide_on_weights, first_wanted, record_on_weights
from .rows import (
    ROWS,
    add_distance,
    add_gram,
    block_at,
    distance_of,
    gram_of,
    is_finite,
    leave_distance,
    leave_gram,
    lengths,
    mix,
    no_gram,
    park,
    rows_of,
    scratch_at,
    strip_rows,
    strips_of,
    sum_of_chunks,
    sum_strip,
)


@triton.jit
def ritz_sums(entry, index, count, K: tl.constexpr):
    """The chunks of Y summed, and the Gram matrices of strips."""
    m, _n = lengths(entry)
    k = tl.load(entry + r.K).to(tl.int32)
    product, chunks = scratch_at(entry, r.LEFT_PRODUCT), tl.load(entry + r.LEFT_CHUNKS).to(tl.int32)
    total = scratch_at(entry, r.LEFT_SUM)
    for strip in range(index, strips_of(m, K), count):
        sum_strip(entry, strip, product, chunks, total, m, k, K)


@triton.jit
def ritz_triplets(entry, options, stats, mine, sigmas, squares, round, K: tl.constexpr):
    """Ritz values, the small matrices that make the vectors, and what the step does; whether it wants a pair."""
    before, residual = tl.load(mine + r.SIGMA), tl.load(mine + r.RESIDUAL)
    pairs = tl.where(round == 0, 1.0, tl.load(mine + r.PAIRS) + 1)
    if round == 0:
        residual = tl.load(stats + r.STAT_RESIDUAL)
    m, _n = lengths(entry)
    k = tl.load(entry + r.K).to(tl.int32)
    gram, peak = gram_of(entry, strips_of(m, K), K)
    basis, sigma, inverse = ritz_values(gram, peak, k, squares, K)
    tl.store(sigmas + tl.arange(0, K), sigma)
    park(squares + 2 * K * K, basis, K)
    park(squares + 3 * K * K, basis * inverse[None, :], K)
    top = entry_of(sigma, 0, K)
    lost = tl.load(stats + r.STAT_RESIDUAL) > LOST
    if round == 0:
        wanted = first_wanted(options, top, tl.load(stats + r.STAT_TOP), residual, lost)
    else:
        wanted = again_wanted(options, pairs, top, before, residual, lost)
    decide_on_weights(entry, options, stats, mine, top, residual, pairs, wanted, round)
    return wanted


@triton.jit
def ritz_vectors(entry, squares, index, count, K: tl.constexpr):
    """``U = Y Q θ⁻¹`` and ``V Q``, the strips of one behind those of the other."""
    m, n = lengths(entry)
    k = tl.load(entry + r.K).to(tl.int32)
    on_left = strips_of(m, K)
    for unit in range(index, on_left + strips_of(n, K), count):
        if unit < on_left:
            start = unit * strip_rows(m, K)
            stop = tl.minimum(start + strip_rows(m, K), m)
            total, vectors = scratch_at(entry, r.LEFT_SUM), scratch_at(entry, r.LEFT_VECTORS)
            mix(total, K, squares + 3 * K * K, vectors, K, start, stop, k, True, K)
        else:
            start = (unit - on_left) * strip_rows(n, K)
            stop = tl.minimum(start + strip_rows(n, K), n)
            right, step = block_at(entry, r.RIGHT), tl.load(entry + r.RIGHT_STEP).to(tl.int32)
            vectors = scratch_at(entry, r.RIGHT_VECTORS)
            mix(right, step, squares + 2 * K * K, vectors, K, start, stop, k, False, K)


@triton.jit
def basis_is_due(mine, last):
    """Whether the product is of a triplet that is finite, and of this round."""
    return ((last != 0) | (tl.load(mine + r.WANTED) != 0)) & is_finite(tl.load(mine + r.SIGMA))


@triton.jit
def basis_candidates(entry, mine, sigmas, last, index, count, K: tl.constexpr):
    """Candidates of :func:`specopt.kernels.subspace.next_basis`, by strips, and what the residual is made of.

    ``last``: after the correction; the new probe becomes the state's.
    """
    R: tl.constexpr = ROWS if K <= 32 else ROWS // 4
    _m, n = lengths(entry)
    k, a = tl.load(entry + r.K).to(tl.int32), tl.load(entry + r.PROBES).to(tl.int32)
    block = k + a
    kept = tl.maximum(block // 16, tl.minimum(1, block // 4))
    images = k - kept - a - tl.where(k >= 8, 1, 0)
    taken = images + kept
    row, wide = tl.arange(0, R), tl.arange(0, K)

    sigma = tl.load(sigmas + wide, wide < k, 0.0)
    correction = 0.0
    if last != 0:
        correction = tl.load(mine + r.CHANGE)
        sigma = sigma * tl.load(mine + r.FACTOR)
    first_sigma = entry_of(sigma, 0, K)
    top = tl.where(first_sigma > 0, first_sigma, 1.0)
    corrected = sigma / top + tl.where(wide == 0, correction / top, 0.0)
    magnitude = tl.where(wide < k, tl.abs(corrected), -1.0)
    half_least = 0.5 * tl.min(tl.where(wide < k, corrected * corrected, float("inf")), 0)
    mine_first, other = magnitude[:, None], magnitude[None, :]
    ahead = (other > mine_first) | ((other == mine_first) & (wide[None, :] < wide[:, None]))
    place = tl.sum(ahead.to(tl.int32), 1)  # [K]
    rank = tl.where(wide < images, wide, wide - images)
    chosen = place[:, None] == rank[None, :]  # (from, to)
    source = tl.sum(tl.where(chosen, wide[:, None], 0), 0)  # [K]
    d = tl.sum(tl.where(chosen, corrected[:, None], 0.0), 0)
    follows = (wide >= taken) & (wide < taken + a)
    from_z = tl.where(wide < taken, d, tl.where(follows, 1.0, 0.0)) / top
    from_v = tl.where(wide < images, half_least, d * d)
    column = tl.where(follows, k + wide - taken, source)
    needed = (wide < taken) | follows

    product = scratch_at(entry, r.RIGHT_PRODUCT)
    chunks = tl.load(entry + r.RIGHT_CHUNKS).to(tl.int32)
    whole = n.to(tl.int64) * K
    vectors = scratch_at(entry, r.RIGHT_VECTORS)
    probe, probe_step = block_at(entry, r.RIGHT_PROBE), tl.load(entry + r.RIGHT_PROBE_STEP).to(tl.int32)
    candidates = scratch_at(entry, r.RIGHT_SPARE)
    size = strip_rows(n, K)
    for strip in range(index, strips_of(n, K), count):
        start, stop = strip * size, tl.minimum(strip * size + size, n)
        gram, peak = no_gram(K)
        for first in range(start, stop, R):
            exists = row < stop - first
            origin, unit = rows_of(product, first, K), rows_of(vectors, first, K)
            before = rows_of(probe, first, probe_step) + row[:, None] * probe_step + (wide - taken)[None, :]
            inside = exists[:, None] & needed[None, :]
            z = sum_of_chunks(origin, row[:, None] * K + column[None, :], inside, whole, chunks)
            difference = z - tl.load(before, exists[:, None] & follows[None, :], 0.0)
            v = tl.load(unit + row[:, None] * K + source[None, :], exists[:, None] & (wide < taken)[None, :], 0.0)
            candidate = difference * from_z[None, :] - v * from_v[None, :]
            tl.store(rows_of(candidates, first, K) + row[:, None] * K + wide[None, :], candidate, exists[:, None])
            if last != 0:
                tl.debug_barrier()
                tl.store(before, z, exists[:, None] & follows[None, :])
            gram, peak, _ratio, _x = add_gram(gram, peak, candidate)
        leave_gram(entry, strip, gram, peak, K)
        along, square, rest = 0.0, 0.0, 0.0
        for first in range(start, stop, R):
            exists = row < stop - first
            x = sum_of_chunks(rows_of(product, first, K), row * K, exists, whole, chunks) / top
            y = tl.load(rows_of(vectors, first, K) + row * K, exists, 0.0)
            along, square, rest = add_distance(along, square, rest, x, y)
        leave_distance(entry, strip, 1.0, along, square, rest, K)


@triton.jit
def basis_residual(entry, stats, mine, sigmas, last, due, K: tl.constexpr):
    """``‖z₁/θ₁ − v₁ (z₁/θ₁ · v₁)‖``, and at the step's end its stats."""
    _m, n = lengths(entry)
    residual = tl.load(mine + r.RESIDUAL)
    if due:
        residual = distance_of(entry, strips_of(n, K), 1.0, K)
    tl.debug_barrier()
    if last != 0:
        record_on_weights(stats, mine, sigmas, tl.load(entry + r.K).to(tl.int32), residual, K)
    elif due:
        tl.store(mine + r.RESIDUAL, residual)


@triton.jit
def basis_orthonormal(entry, noise, count_of_steps, shift, squares, K: tl.constexpr):
    _m, n = lengths(entry)
    basis, step = block_at(entry, r.RIGHT), tl.load(entry + r.RIGHT_STEP).to(tl.int32)
    variant = 2 * COLD_MAX * count_of_steps + shift
    k, candidates = tl.load(entry + r.K).to(tl.int32), scratch_at(entry, r.RIGHT_SPARE)
    orthonormalize(entry, candidates, n, k, noise, variant, basis, step, squares, K)
