"""The small dense part of a step in Triton, one program a matrix: from the partial sums of a product to Ritz triplets,
the decisions of the step, and the next basis.

The same mathematics as :mod:`specopt.kernels.subspace` and the trackers, on records (:mod:`specopt.kernels.records`).
Sums over the rows of a block run in tiles, in order; their squares are of entries divided by the largest so far. Small
matrices wait in ``squares`` between uses, for few fit into registers beside a tile. Scratch blocks are aligned to 16
bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import records as r
from .. import subspace, tables
from ..products import MAX_COLUMNS
from ..small import ROUNDS, SQUARINGS
from ..small.device import diagonal_of, orthonormalizer, reflection, sorted_columns, square_product, top_direction
from ..small.reference import TINY
from ..tiles import DTYPES

RITZ = tl.constexpr(1)
"""After ``W V``: triplets, and what the step does with them."""
BASIS = tl.constexpr(2)
"""After ``Wᵀ [U | Ω]``: the next basis, and at the step's end its stats."""
TURN = tl.constexpr(3)
"""After one half product of a tracker by halves: both."""

SLOTS = tl.constexpr(4)
"""Small matrices that a program keeps in ``squares``."""

THREADS = 256
"""Of a program."""
MOST_REGISTERS = 255
"""Of a thread on NVIDIA. Said to the assembler where it would stop at 128, for a second program beside the first, and
spill; where it takes more of itself it does better untold."""

ROWS = tl.constexpr(128)
"""Rows of a block that are on chip at once; a quarter of them at 64 columns."""
LINE = tl.constexpr(1024)
"""Entries of a vector."""
SLICE = tl.constexpr(16)
"""Columns of a block that a product takes at once."""

EPS = tl.constexpr(torch.finfo(torch.float32).eps)
SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)
ZERO_NORM = tl.constexpr(TINY)
POWER = tl.constexpr(SQUARINGS)
SWEEPS = tl.constexpr(ROUNDS)
REFILLED = tl.constexpr(subspace.REFILL_THRESHOLD)
VARIANTS = tl.constexpr(subspace.VARIANTS)
SHIFT = tl.constexpr(subspace.SHIFT)
NOISE_STEP = tl.constexpr(MAX_COLUMNS)

# The schedule of specopt.tracker.common, which this package does not import; a test compares them.
COLD_MAX = tl.constexpr(16)
LOST = tl.constexpr(0.1)
JUMP = tl.constexpr(10.0)
STILL = tl.constexpr(0.1)
"""So much of the tolerance may sigma move by from pair to pair."""


# --- small things --------------------------------------------------------------------------------------------------
@triton.jit
def is_finite(value):
    return tl.abs(value) < float("inf")  # false for NaN


@triton.jit
def block_at(entry, field):
    return tl.load(entry + field).to(tl.pointer_type(tl.float32))


@triton.jit
def scratch_at(entry, field):
    return tl.multiple_of(tl.load(entry + field).to(tl.pointer_type(tl.float32)), 16)


@triton.jit
def lengths(entry):
    """``(m, n)``: rows and columns as the tracker reads the matrix."""
    rows, columns = tl.load(entry + r.ROWS).to(tl.int32), tl.load(entry + r.COLUMNS).to(tl.int32)
    swapped = tl.load(entry + r.SWAPPED) != 0
    return tl.where(swapped, columns, rows), tl.where(swapped, rows, columns)


@triton.jit
def park(pointer, square, K: tl.constexpr):
    index = tl.arange(0, K)
    tl.store(pointer + index[:, None] * K + index[None, :], square)


@triton.jit
def fetch(pointer, K: tl.constexpr):
    index = tl.arange(0, K)
    return tl.load(pointer + index[:, None] * K + index[None, :])


@triton.jit
def entry_of(vector, at, K: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, K) == at, vector, 0.0), 0)


@triton.jit
def noise_window(noise, variant):
    """Where the fixed random columns of this variant begin."""
    return noise + (variant % VARIANTS) * (SHIFT * NOISE_STEP)


# --- sums over rows ------------------------------------------------------------------------------------------------
@triton.jit
def rows_of(block, first, step):
    return block + first * (tl.zeros((), tl.int64) + step)


@triton.jit
def sum_of_chunks(product, offsets, inside, size, chunks):
    """``Σ_c product[c]`` at some offsets, in the order of the chunks, ``size`` entries each."""
    total = tl.load(product + offsets, inside, 0.0)
    for _ in range(1, chunks):
        product += size
        total += tl.load(product + offsets, inside, 0.0)
    return total


@triton.jit
def no_gram(K: tl.constexpr):
    """Where :func:`add_gram` begins: sums of as many groups of K rows as a tile has, so that every thread has enough of
    them for what it reads."""
    R: tl.constexpr = ROWS if K <= 32 else ROWS // 4
    GROUPS: tl.constexpr = R // K if K <= R else 1
    return tl.zeros((GROUPS, K, K), tl.float32), tl.full((), 0.0, tl.float32)


@triton.jit
def add_gram(gram, peak, x):
    """``XᵀX / s²`` and ``s = max |X|`` with some more rows ``x``; also by what ``s`` and those rows are divided."""
    larger = tl.maximum(peak, tl.max(tl.max(tl.abs(x), 1), 0))  # may pass a NaN by; the sum does not
    divisor = tl.where(larger == 0, 1.0, larger)
    ratio = peak / divisor
    x = x / divisor
    groups = tl.reshape(x, (gram.shape[0], x.shape[0] // gram.shape[0], x.shape[1]))
    turned = tl.permute(groups, (0, 2, 1))
    return tl.dot(turned, groups, gram * (ratio * ratio), input_precision="ieee"), larger, ratio, x


@triton.jit
def add_mixed(
    total, origin, step, row, left, columns, factor, PADDED: tl.constexpr, WIDE: tl.constexpr, K: tl.constexpr
):
    """``total + X M`` for a tile of rows, ``left`` of which exist, a few of the at most ``WIDE`` columns of ``X`` at a
    time.

    ``PADDED``: rows are K entries wide, those beyond ``columns`` being anything.
    """
    wide = tl.arange(0, K)
    for first in tl.range(0, WIDE, SLICE, num_stages=1):
        inner = first + tl.arange(0, SLICE)
        offsets = row[:, None] * step + inner[None, :]
        if PADDED:
            x = tl.load(origin + offsets, (row < left)[:, None], 0.0)
            x = tl.where((inner < columns)[None, :], x, 0.0)
        else:
            x = tl.load(origin + offsets, (row < left)[:, None] & (inner < columns)[None, :], 0.0)
        part = tl.load(factor + inner[:, None] * K + wide[None, :])
        total = tl.dot(x, part, total, input_precision="ieee")
    return total


@triton.jit
def mix(source, step, factor, out, out_step, n, k, PADDED: tl.constexpr, K: tl.constexpr):
    """``out = X M``, k columns each; ``out`` may be ``X``."""
    R: tl.constexpr = ROWS if K <= 32 else ROWS // 4
    row, wide = tl.arange(0, R), tl.arange(0, K)
    for first in range(0, n, R):
        left = n - first
        total = tl.zeros((R, K), tl.float32)
        total = add_mixed(total, rows_of(source, first, step), step, row, left, k, factor, PADDED, K, K)
        tl.debug_barrier()
        inside = (row < left)[:, None] & (wide < k)[None, :]
        tl.store(rows_of(out, first, out_step) + row[:, None] * out_step + wide[None, :], total, inside)


# --- triplets ------------------------------------------------------------------------------------------------------
@triton.jit
def scaled_product(parked, trace, basis, K: tl.constexpr):
    """``G Q / trace``. ``G`` is loaded anew each time: kept, it would stay in registers as an operand of a dot."""
    return square_product(fetch(parked, K) / trace, basis)


@triton.jit
def rotate(gram, k, squares, K: tl.constexpr):
    """``Q`` and ``λ`` of :func:`specopt.kernels.rotations`."""
    park(squares, gram, K)
    tl.debug_barrier()
    parked, waiting = squares, squares + K * K
    trace = tl.maximum(tl.sum(diagonal_of(gram, K), 0), SMALLEST)
    basis = reflection(top_direction(fetch(parked, K) / trace, POWER, SMALLEST, K), K)
    quotients = tl.sum(basis * scaled_product(parked, trace, basis, K), 0)
    basis = sorted_columns(basis, quotients, k, K)
    shift = k * EPS
    for _ in tl.range(0, SWEEPS, loop_unroll_factor=1):
        image = scaled_product(parked, trace, basis, K)
        peak = tl.max(tl.abs(image), 0)
        image = image / tl.where(peak > 0, peak, 1.0)[None, :]
        if K > 32:  # there is no room for it in registers beside the elimination
            park(waiting, image, K)
        factor, _dropped = orthonormalizer(square_product(tl.trans(image), image), k, shift, 8 * shift, ZERO_NORM, K)
        if K > 32:
            tl.debug_barrier()
            image = fetch(waiting, K)
            tl.debug_barrier()
        basis = square_product(image, factor)
    quotients = tl.sum(basis * scaled_product(parked, trace, basis, K), 0)
    return basis, tl.where(quotients < 0, 0.0, quotients) * trace  # a maximum would turn NaN into 0


@triton.jit
def ritz_values(gram, peak, k, squares, K: tl.constexpr):
    """``Q``, ``θ`` and ``1/θ`` (0 where nothing is left) from ``G = YᵀY / s²``; θ is NaN where G is not finite."""
    poison = 0.0 * tl.sum(tl.sum(gram, 1), 0)
    scale = tl.where(peak == 0, 1.0, peak)
    basis, weight = rotate(gram, k, squares, K)
    root = tl.sqrt(weight)
    present = root > 64 * EPS * entry_of(root, 0, K)
    inverse = tl.where(present, 1 / tl.where(present, root, 1.0), 0.0) / scale
    sigma = tl.where(present, root, 0.0) * scale + poison
    return basis, sigma, inverse


@triton.jit
def summed(product, chunks, m, k, total, K: tl.constexpr):
    """The chunks of a product summed into ``total``, and ``G / s²`` and ``s`` of its first k columns."""
    R: tl.constexpr = ROWS if K <= 32 else ROWS // 4
    row, wide = tl.arange(0, R), tl.arange(0, K)
    offsets = row[:, None] * K + wide[None, :]
    size = m.to(tl.int64) * K
    gram, peak = no_gram(K)
    for first in range(0, m, R):
        inside = (row < m - first)[:, None]
        x = sum_of_chunks(rows_of(product, first, K), offsets, inside, size, chunks)
        tl.store(rows_of(total, first, K) + offsets, x, inside)
        gram, peak, _ratio, _x = add_gram(gram, peak, tl.where((wide < k)[None, :], x, 0.0))
    return tl.sum(gram, 0), peak


@triton.jit
def summed_beside(product, chunks, m, k, total, old, old_step, few, K: tl.constexpr):
    """:func:`summed`, and ``y_i · x_i / s`` with the first ``few`` columns of another block."""
    R: tl.constexpr = ROWS if K <= 32 else ROWS // 4
    row, wide = tl.arange(0, R), tl.arange(0, K)
    offsets = row[:, None] * K + wide[None, :]
    size = m.to(tl.int64) * K
    gram, peak = no_gram(K)
    dots = tl.zeros((R, K), tl.float32)
    for first in range(0, m, R):
        inside = (row < m - first)[:, None]
        x = sum_of_chunks(rows_of(product, first, K), offsets, inside, size, chunks)
        tl.store(rows_of(total, first, K) + offsets, x, inside)
        gram, peak, ratio, x = add_gram(gram, peak, tl.where((wide < k)[None, :], x, 0.0))
        other = rows_of(old, first, old_step) + row[:, None] * old_step + wide[None, :]
        dots = dots * ratio + x * tl.load(other, inside & (wide < few)[None, :], 0.0)
    return tl.sum(gram, 0), peak, tl.sum(dots, 0)


# --- bases ---------------------------------------------------------------------------------------------------------
@triton.jit
def orthonormalize(gram, peak, candidates, n, k, noise, out, out_step, squares, K: tl.constexpr):
    """:func:`specopt.kernels.subspace.orthonormalize` of n rows of candidates, which are overwritten."""
    R: tl.constexpr = ROWS if K <= 32 else ROWS // 4
    row, wide = tl.arange(0, R), tl.arange(0, K)
    scale = tl.where(peak == 0, 1.0, peak)
    if is_finite(tl.sum(tl.sum(gram, 1), 0) + scale):
        shift = k * EPS
        factor, dropped = orthonormalizer(gram, k, shift, 8 * shift, ZERO_NORM, K)
        park(squares, factor / scale, K)
        refill = tl.where(dropped & (wide < k), 1 / tl.sqrt(n.to(tl.float32)), 0.0)
        tl.debug_barrier()
        again, again_peak = no_gram(K)
        for first in range(0, n, R):
            left = n - first
            inside = (row < left)[:, None]
            origin = rows_of(candidates, first, K)
            window = rows_of(noise, first, NOISE_STEP) + row[:, None] * NOISE_STEP + wide[None, :]
            total = tl.load(window, inside & (refill > 0)[None, :], 0.0) * refill[None, :]
            total = add_mixed(total, origin, K, row, left, k, squares, True, K, K)
            tl.debug_barrier()
            tl.store(origin + row[:, None] * K + wide[None, :], total, inside)
            again, again_peak, _ratio, _x = add_gram(again, again_peak, total)
        factor, _dropped = orthonormalizer(tl.sum(again, 0), k, shift, REFILLED, ZERO_NORM, K)
        park(squares + K * K, factor / tl.where(again_peak == 0, 1.0, again_peak), K)
        tl.debug_barrier()
        mix(candidates, K, squares + K * K, out, out_step, n, k, True, K)


@triton.jit
def next_basis(entry, sigma, correction, variant, noise, squares, save, K: tl.constexpr):
    """:func:`specopt.kernels.subspace.next_basis`, in place of the basis on the right; returns the residual.

    ``save``: the new probe becomes the state's.
    """
    R: tl.constexpr = ROWS if K <= 32 else ROWS // 4
    _m, n = lengths(entry)
    k, a = tl.load(entry + r.K).to(tl.int32), tl.load(entry + r.PROBES).to(tl.int32)
    block = k + a
    kept = tl.maximum(block // 16, tl.minimum(1, block // 4))
    images = k - kept - a - tl.where(k >= 8, 1, 0)
    taken = images + kept
    row, wide = tl.arange(0, R), tl.arange(0, K)

    first_sigma = entry_of(sigma, 0, K)
    top = tl.where(first_sigma > 0, first_sigma, 1.0)
    corrected = sigma / top + tl.where(wide == 0, correction / top, 0.0)
    size = tl.where(wide < k, tl.abs(corrected), -1.0)
    half_least = 0.5 * tl.min(tl.where(wide < k, corrected * corrected, float("inf")), 0)
    ahead = (size[None, :] > size[:, None]) | ((size[None, :] == size[:, None]) & (wide[None, :] < wide[:, None]))
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
    length = n.to(tl.int64) * K
    vectors = scratch_at(entry, r.RIGHT_VECTORS)
    probe, probe_step = block_at(entry, r.RIGHT_PROBE), tl.load(entry + r.RIGHT_PROBE_STEP).to(tl.int32)
    candidates = scratch_at(entry, r.RIGHT_SPARE)
    columns = scratch_at(entry, r.RIGHT_SUM)  # what the residual is of: z₁/θ₁, then v₁, one after the other
    gram, peak = no_gram(K)
    along = tl.zeros((R,), tl.float32)
    for first in range(0, n, R):
        left = n - first
        exists = row < left
        origin, unit = rows_of(product, first, K), rows_of(vectors, first, K)
        before = rows_of(probe, first, probe_step) + row[:, None] * probe_step + (wide - taken)[None, :]
        inside = exists[:, None] & needed[None, :]
        z = sum_of_chunks(origin, row[:, None] * K + column[None, :], inside, length, chunks)
        difference = z - tl.load(before, exists[:, None] & follows[None, :], 0.0)
        v = tl.load(unit + row[:, None] * K + source[None, :], exists[:, None] & (wide < taken)[None, :], 0.0)
        candidate = difference * from_z[None, :] - v * from_v[None, :]
        tl.store(rows_of(candidates, first, K) + row[:, None] * K + wide[None, :], candidate, exists[:, None])
        if save:
            tl.debug_barrier()
            tl.store(before, z, exists[:, None] & follows[None, :])
        gram, peak, _ratio, _x = add_gram(gram, peak, candidate)
        x = sum_of_chunks(origin, row * K, exists, length, chunks) / top
        y = tl.load(unit + row * K, exists, 0.0)
        along += x * y
        tl.store(columns + first + row, x, exists)
        tl.store(columns + n + first + row, y, exists)
    tl.debug_barrier()
    residual = distance(columns, columns + n, tl.sum(along, 0), n)
    basis, step = block_at(entry, r.RIGHT), tl.load(entry + r.RIGHT_STEP).to(tl.int32)
    orthonormalize(tl.sum(gram, 0), peak, candidates, n, k, noise_window(noise, variant), basis, step, squares, K)
    return residual


@triton.jit
def distance(x, y, along, n):
    """``‖x − along · y‖`` of two vectors of n entries."""
    at = tl.arange(0, LINE)
    sums = tl.zeros((LINE,), tl.float32)
    for first in range(0, n, LINE):
        inside = first + at < n
        difference = tl.load(x + first + at, inside, 0.0) - along * tl.load(y + first + at, inside, 0.0)
        sums += difference * difference
    return tl.sqrt(tl.sum(sums, 0))


# --- the step's decisions ------------------------------------------------------------------------------------------
@triton.jit
def first_wanted(options, sigma, expected, residual, lost):
    """``Schedule.first``: whether another pair is called for after the step's first product."""
    tolerance = tl.load(options + r.TOLERANCE)
    moved = tl.abs(sigma - expected) > JUMP * tolerance * sigma
    unsettled = (residual > tolerance) | moved | (tl.load(options + r.COLD) > 0) | lost
    return called_for(options, 1.0, sigma, unsettled, lost)


@triton.jit
def again_wanted(options, pairs, sigma, before, residual, lost):
    """``Schedule.again``: the same after ``pairs`` of them."""
    tolerance = tl.load(options + r.TOLERANCE)
    moved = tl.abs(sigma - before) > STILL * tolerance * sigma
    return called_for(options, pairs, sigma, (residual > tolerance) | moved, lost)


@triton.jit
def called_for(options, pairs, sigma, unsettled, lost):
    raised = lost & (tl.load(options + r.FIXED) == 0)
    most = tl.where(raised, COLD_MAX * 1.0, tl.load(options + r.MAXIMUM))
    least = tl.minimum(tl.load(options + r.MINIMUM), most)
    return (is_finite(sigma) & (most > pairs) & ((least > pairs) | unsettled)).to(tl.float32)


@triton.jit
def change_of(entry, options, stats, sigma):
    """``c``, ``f`` and whether still capped: the change ``W ← f W + c u₁v₁ᵀ`` that the rule may make."""
    target = tl.load(options + r.TARGET)
    if tl.load(entry + r.TARGET_AT) != 0:
        target = tl.load(block_at(entry, r.TARGET_AT))
    rate = tl.load(options + r.RATE)
    if tl.load(entry + r.LR) != 0:
        rate = tl.load(block_at(entry, r.LR))
    mode = tl.load(options + r.MODE)
    reached = (sigma >= target) | (tl.load(options + r.RAISE_SMALL) > 0)
    capped = (tl.load(stats + r.STAT_CAPPED) > 0) & (reached == 0)
    change = tl.where(is_finite(sigma) & (sigma > 0), target - sigma, 0.0)
    change = tl.where((capped | (mode == 1)) & (change > 0), 0.0, change)
    decayed = tl.where(is_finite(sigma), -rate * tl.load(options + r.STRENGTH) * sigma, 0.0)
    change = tl.where(mode == 3, decayed, change)
    change = tl.where(rate != 0, change, 0.0)
    whole = mode == 2
    factor = tl.where(whole & (change != 0), target / tl.where(sigma > 0, sigma, 1.0), 1.0)
    return tl.where(whole, 0.0, change), factor, capped.to(tl.float32)


@triton.jit
def decide_on_weights(entry, options, stats, mine, sigma, residual, pairs, wanted, round):
    """What the step does after the base update, into the scalars; every thread has read them before."""
    change, factor, capped = change_of(entry, options, stats, sigma)
    counted = tl.load(entry + r.STEP)
    tl.debug_barrier()
    tl.store(mine + r.SIGMA, sigma)
    tl.store(mine + r.RESIDUAL, residual)
    tl.store(mine + r.PAIRS, pairs)
    tl.store(mine + r.WANTED, wanted)
    tl.store(mine + r.CHANGE, change)
    tl.store(mine + r.FACTOR, factor)
    tl.store(mine + r.STILL_CAPPED, capped)
    if (round == 0) & (counted != 0):
        step = counted.to(tl.pointer_type(tl.float32))
        value = tl.load(step) + 1
        tl.debug_barrier()
        tl.store(step, value)


@triton.jit
def record_on_weights(stats, mine, sigmas, k, residual, K: tl.constexpr):
    """The stats after the correction. ``residual``: of a triplet that is finite."""
    wide = tl.arange(0, K)
    sigma, change, factor = tl.load(mine + r.SIGMA), tl.load(mine + r.CHANGE), tl.load(mine + r.FACTOR)
    after = tl.load(sigmas + wide, wide < k, 0.0) * factor + tl.where(wide == 0, change, 0.0)
    top, valid = tl.max(tl.abs(after), 0), is_finite(sigma)
    top = tl.where(valid, top, tl.load(stats + r.STAT_TOP))
    count = tl.load(stats + r.STAT_COUNT) + 1
    capped, pairs = tl.load(mine + r.STILL_CAPPED), tl.load(mine + r.PAIRS)
    tl.debug_barrier()
    tl.store(stats + r.STAT_SIGMA, sigma)
    tl.store(stats + r.STAT_RESIDUAL, residual)
    tl.store(stats + r.STAT_TOP, top)
    tl.store(stats + r.STAT_VALID, valid.to(tl.float32))
    tl.store(stats + r.STAT_CAPPED, capped)
    tl.store(stats + r.STAT_PAIRS, pairs)
    tl.store(stats + r.STAT_COUNT, count)


@triton.jit
def record_on_gradients(stats, sigma, residual, pairs):
    """The stats of a step before the base update, but for their count."""
    valid = is_finite(sigma)
    top = tl.where(valid, sigma, tl.load(stats + r.STAT_TOP))
    residual = tl.where(valid, residual, tl.load(stats + r.STAT_RESIDUAL))
    tl.debug_barrier()
    tl.store(stats + r.STAT_SIGMA, sigma)
    tl.store(stats + r.STAT_RESIDUAL, residual)
    tl.store(stats + r.STAT_TOP, top)
    tl.store(stats + r.STAT_VALID, valid.to(tl.float32))
    tl.store(stats + r.STAT_PAIRS, pairs)


# --- the three kinds -----------------------------------------------------------------------------------------------
@triton.jit
def ritz(entry, options, stats, mine, sigmas, squares, round, K: tl.constexpr):
    before, residual = tl.load(mine + r.SIGMA), tl.load(mine + r.RESIDUAL)
    active = (round == 0) | (tl.load(mine + r.WANTED) != 0)
    pairs = tl.where(round == 0, 1.0, tl.load(mine + r.PAIRS) + 1)
    if round == 0:
        residual = tl.load(stats + r.STAT_RESIDUAL)
    if active:
        m, n = lengths(entry)
        k = tl.load(entry + r.K).to(tl.int32)
        total = scratch_at(entry, r.LEFT_SUM)
        product, chunks = scratch_at(entry, r.LEFT_PRODUCT), tl.load(entry + r.LEFT_CHUNKS).to(tl.int32)
        gram, peak = summed(product, chunks, m, k, total, K)
        basis, sigma, inverse = ritz_values(gram, peak, k, squares, K)
        wide = tl.arange(0, K)
        tl.store(sigmas + wide, sigma)
        park(squares + 2 * K * K, basis, K)
        park(squares + 3 * K * K, basis * inverse[None, :], K)
        tl.debug_barrier()
        mix(total, K, squares + 3 * K * K, scratch_at(entry, r.LEFT_VECTORS), K, m, k, True, K)
        right, step = block_at(entry, r.RIGHT), tl.load(entry + r.RIGHT_STEP).to(tl.int32)
        mix(right, step, squares + 2 * K * K, scratch_at(entry, r.RIGHT_VECTORS), K, n, k, False, K)
        top = entry_of(sigma, 0, K)
        lost = tl.load(stats + r.STAT_RESIDUAL) > LOST
        if round == 0:
            wanted = first_wanted(options, top, tl.load(stats + r.STAT_TOP), residual, lost)
        else:
            wanted = again_wanted(options, pairs, top, before, residual, lost)
        decide_on_weights(entry, options, stats, mine, top, residual, pairs, wanted, round)


@triton.jit
def basis_after(entry, stats, mine, sigmas, squares, noise, round, last, K: tl.constexpr):
    wide = tl.arange(0, K)
    k = tl.load(entry + r.K).to(tl.int32)
    residual = tl.load(mine + r.RESIDUAL)
    sigma = tl.load(sigmas + wide, wide < k, 0.0)
    active = (tl.load(mine + r.WANTED) != 0) & is_finite(tl.load(mine + r.SIGMA))
    correction, shift = 0.0, round
    if last != 0:
        active = is_finite(tl.load(mine + r.SIGMA))
        correction, shift = tl.load(mine + r.CHANGE), 0
        sigma = sigma * tl.load(mine + r.FACTOR)
    if active:
        variant = 2 * COLD_MAX * tl.load(stats + r.STAT_COUNT).to(tl.int32) + shift
        residual = next_basis(entry, sigma, correction, variant, noise, squares, last != 0, K)
    tl.debug_barrier()
    if last != 0:
        record_on_weights(stats, mine, sigmas, k, residual, K)
    elif active:
        tl.store(mine + r.RESIDUAL, residual)


@triton.jit
def turn(entry, options, stats, mine, sigmas, squares, noise, half, last, K: tl.constexpr):
    R: tl.constexpr = ROWS if K <= 32 else ROWS // 4
    row, wide = tl.arange(0, R), tl.arange(0, K)
    before, pairs = tl.load(mine + r.SIGMA), tl.load(mine + r.PAIRS)
    seen = tl.load(mine + r.SEEN)
    active = (half == 0) | (tl.load(mine + r.WANTED) != 0)
    done = tl.load(stats + r.STAT_COUNT).to(tl.int32) - tl.where(half == 0, 0, 1)  # steps before this one
    if active:
        side = (done + half) & 1
        m, n = lengths(entry)
        length, other_length = tl.where(side == 0, m, n), tl.where(side == 0, n, m)
        k, a = tl.load(entry + r.K).to(tl.int32), tl.load(entry + r.PROBES).to(tl.int32)
        kept = k // 4
        images = k - kept - a
        product = scratch_at(entry, tl.where(side == 0, r.LEFT_PRODUCT, r.RIGHT_PRODUCT))
        chunks = tl.load(entry + tl.where(side == 0, r.LEFT_CHUNKS, r.RIGHT_CHUNKS)).to(tl.int32)
        total = scratch_at(entry, tl.where(side == 0, r.LEFT_SUM, r.RIGHT_SUM))
        old = block_at(entry, tl.where(side == 0, r.LEFT, r.RIGHT))
        old_step = tl.load(entry + tl.where(side == 0, r.LEFT_STEP, r.RIGHT_STEP)).to(tl.int32)
        gram, peak, dots = summed_beside(product, chunks, length, k, total, old, old_step, tl.maximum(kept, 1), K)
        basis, sigma, inverse = ritz_values(gram, peak, k, squares, K)
        tl.store(sigmas + wide, sigma)
        top = entry_of(sigma, 0, K)
        valid = is_finite(top)
        scale = tl.where(top > 0, top, 1.0)
        dots = dots * (tl.where(peak == 0, 1.0, peak) / scale)
        residual = tl.full((), float("nan"), tl.float32)
        if valid:
            into, outof = wide[:, None], wide[None, :]
            one = ((outof - images == into) & (into < kept)) | ((outof - images - kept == into - k) & (into >= k))
            chosen = tl.where(outof < images, basis * inverse[None, :], tl.where(one & (outof < k), 1 / scale, 0.0))
            tl.debug_barrier()
            park(squares + 2 * K * K, basis, K)
            park(squares + 3 * K * K, chosen, K)
            along = entry_of(dots, 0, K)
            minus = tl.where((outof - images == into) & (into < kept), -dots[:, None], 0.0)
            park(squares, minus, K)
            park(squares + K * K, tl.where((outof - images - kept == into) & (into < a), -1 / scale, 0.0), K)
            tl.debug_barrier()
            probe = block_at(entry, tl.where(side == 0, r.LEFT_PROBE, r.RIGHT_PROBE))
            probe_step = tl.load(entry + tl.where(side == 0, r.LEFT_PROBE_STEP, r.RIGHT_PROBE_STEP)).to(tl.int32)
            vectors = scratch_at(entry, tl.where(side == 0, r.LEFT_VECTORS, r.RIGHT_VECTORS))
            candidates = scratch_at(entry, tl.where(side == 0, r.LEFT_SPARE, r.RIGHT_SPARE))
            again, again_peak = no_gram(K)
            sums = tl.zeros((R,), tl.float32)
            for first in range(0, length, R):
                left = length - first
                exists = row < left
                inside = exists[:, None]
                origin, kin = rows_of(total, first, K), rows_of(old, first, old_step)
                was = rows_of(probe, first, probe_step)
                candidate = tl.zeros((R, K), tl.float32)
                candidate = add_mixed(candidate, kin, old_step, row, left, kept, squares, False, SLICE, K)
                candidate = add_mixed(candidate, was, probe_step, row, left, a, squares + K * K, False, SLICE, K)
                candidate = add_mixed(candidate, origin, K, row, left, k + a, squares + 3 * K * K, True, K, K)
                at = row[:, None] * K + wide[None, :]
                tl.store(rows_of(candidates, first, K) + at, candidate, inside)
                tl.store(rows_of(vectors, first, K) + at, candidate, inside & (wide == 0)[None, :])
                again, again_peak, _ratio, _x = add_gram(again, again_peak, candidate)
                x = tl.load(origin + row * K, exists, 0.0) / scale
                difference = x - along * tl.load(kin + row * old_step, exists, 0.0)
                sums += difference * difference
            residual = tl.sqrt(tl.sum(sums, 0))
            tl.debug_barrier()
            variant = 2 * COLD_MAX * done + half
            orthonormalize(
                tl.sum(again, 0),
                again_peak,
                candidates,
                length,
                k,
                noise_window(noise, variant),
                old,
                old_step,
                squares,
                K,
            )
            turned = block_at(entry, tl.where(side == 0, r.RIGHT, r.LEFT))
            step = tl.load(entry + tl.where(side == 0, r.RIGHT_STEP, r.LEFT_STEP)).to(tl.int32)
            vectors = scratch_at(entry, tl.where(side == 0, r.RIGHT_VECTORS, r.LEFT_VECTORS))
            mix(turned, step, squares + 2 * K * K, turned, step, other_length, k, False, K)
            tl.debug_barrier()
            copy_column(turned, step, vectors, K, other_length)
        lost = tl.load(stats + r.STAT_RESIDUAL) > LOST
        if half == 0:
            wanted = first_wanted(options, top, tl.load(stats + r.STAT_TOP), residual, lost)
        else:
            wanted = again_wanted(options, pairs + 1.5, top, before, residual, lost)
        if half % 2 == 1:
            tl.debug_barrier()
            if half == 1:
                tl.store(mine + r.SEEN, valid.to(tl.float32))
        else:
            finish_turn(options, stats, mine, top, residual, tl.where(half == 0, 0.5, pairs + 1), wanted, done + 1)
            if (last != 0) | (wanted == 0):
                if (half != 0) | valid:
                    keep_probe(entry, side, K)
                if (half != 0) & (seen != 0):
                    keep_probe(entry, 1 - side, K)
                record_on_gradients(stats, top, residual, tl.where(half == 0, 0.5, pairs + 1))


@triton.jit
def finish_turn(options, stats, mine, sigma, residual, pairs, wanted, count):
    """What an odd number of halves has found, into the scalars."""
    penalty = tl.where(is_finite(sigma), tl.load(options + r.STRENGTH) * sigma, 0.0)
    tl.debug_barrier()
    tl.store(mine + r.SIGMA, sigma)
    tl.store(mine + r.RESIDUAL, residual)
    tl.store(mine + r.PAIRS, pairs)
    tl.store(mine + r.WANTED, wanted)
    tl.store(mine + r.PENALTY, penalty)
    tl.store(stats + r.STAT_COUNT, count.to(tl.float32))


@triton.jit
def copy_column(source, step, out, out_step, n):
    """The first column of a block of n rows."""
    row = tl.arange(0, LINE)
    for first in range(0, n, LINE):
        x = tl.load(rows_of(source, first, step) + row * step, row < n - first, 0.0)
        tl.store(rows_of(out, first, out_step) + row * out_step, x, row < n - first)


@triton.jit
def keep_probe(entry, side, K: tl.constexpr):
    """The probe behind this step's product on one side, for the next step to be compared with."""
    R: tl.constexpr = ROWS
    m, n = lengths(entry)
    length = tl.where(side == 0, m, n)
    k, a = tl.load(entry + r.K).to(tl.int32), tl.load(entry + r.PROBES).to(tl.int32)
    total = scratch_at(entry, tl.where(side == 0, r.LEFT_SUM, r.RIGHT_SUM))
    probe = block_at(entry, tl.where(side == 0, r.LEFT_PROBE, r.RIGHT_PROBE))
    step = tl.load(entry + tl.where(side == 0, r.LEFT_PROBE_STEP, r.RIGHT_PROBE_STEP)).to(tl.int32)
    row, wide = tl.arange(0, R), tl.arange(0, SLICE)  # a is at most an eighth of 64
    for first in range(0, length, R):
        inside = (row < length - first)[:, None] & (wide < a)[None, :]
        x = tl.load(rows_of(total, first, K) + row[:, None] * K + (k + wide)[None, :], inside, 0.0)
        tl.store(rows_of(probe, first, step) + row[:, None] * step + wide[None, :], x, inside)


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
            finish_turn(options, stats, mine, sigma, 0.0, 0.5, 0.0, count)
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


@triton.jit
def solve(
    b, table, numbers, scalars, sigmas, squares, noise, round, last,
    KIND: tl.constexpr, KP: tl.constexpr, KX: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """What follows a product of matrix b, by all threads of one program.

    Args:
        table, numbers, scalars: rows of :mod:`specopt.kernels.records`.
        sigmas: (B, W) float32, Ritz values, with ``W = max(KP, KX)``.
        squares: (B, SLOTS, W, W) float32 scratch.
        noise: fixed random columns (rows, 64).
        round: which pair of the step (``TURN``: which half) the product belongs to.
        last: 1 for the last of the step; the stats are written. ``BASIS``: after the correction.
        KIND: RITZ, BASIS or TURN.
        KP, KX: columns of a block, padded, and of an exact matrix (0: there is none).
        DTYPE: of the weights, read where they are exact.
    """
    WIDTH: tl.constexpr = KP if KP > KX else KX
    entry = table + b.to(tl.int64) * r.FIELDS
    options, mine = numbers + b * r.NUMBERS, scalars + b * r.SCALARS
    sigmas += b * WIDTH
    squares += b.to(tl.int64) * (SLOTS * WIDTH * WIDTH)
    stats = block_at(entry, r.STATS)
    is_exact = tl.load(entry + r.EXACT) != 0
    if KX > 0:  # noqa: SIM102 -- compiled only where there are such matrices
        if is_exact:
            exact(entry, options, stats, mine, sigmas, squares, round, last, KIND, KP, KX, DTYPE)
    if is_exact == 0:
        if KIND == RITZ:
            ritz(entry, options, stats, mine, sigmas, squares, round, KP)
        elif KIND == BASIS:
            basis_after(entry, stats, mine, sigmas, squares, noise, round, last, KP)
        else:
            turn(entry, options, stats, mine, sigmas, squares, noise, round, last, KP)


@triton.jit(do_not_specialize=["round", "last"])
def solve_kernel(
    table,
    numbers,
    scalars,
    sigmas,
    squares,
    noise,
    found_inf,
    round,
    last,
    KIND: tl.constexpr,
    KP: tl.constexpr,
    KX: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """:func:`solve`, one program a matrix; nothing where a gradient scaler has found an infinity."""
    if found_inf is not None:  # noqa: SIM102 -- without the flag the load must not be compiled
        if tl.load(found_inf) != 0:
            return
    solve(tl.program_id(0), table, numbers, scalars, sigmas, squares, noise, round, last, KIND, KP, KX, DTYPE)


def warps(hip: bool = torch.version.hip is not None) -> int:
    """Warps of a program; a wavefront of AMD's counts two."""
    return THREADS // (64 if hip else 32)


def options(device: torch.device, kind: int, kp: int, kx: int) -> dict[str, object]:
    """What :func:`solve_kernel` is launched with."""
    hip = torch.version.hip is not None
    limit = most_registers(kind, kp, kx) if device.type == "cuda" and not hip else None
    return {"num_warps": warps(hip), "enable_fp_fusion": True, **({"maxnreg": limit} if limit else {})}


def most_registers(kind: int, kp: int, kx: int) -> int | None:
    return MOST_REGISTERS if kind == BASIS.value or (kind == RITZ.value and max(kp, kx) <= 32) else None


def launch(records: Any, kind: int, round: int, last: bool, found_inf: Tensor | None) -> None:
    """The solves of a bucket's matrices: its table, numbers, scalars, sigmas, squares, noise, dtype, KP and KX."""
    device = records.table.device
    with tables.on(device):
        solve_kernel[(len(records.table),)](
            records.table,
            records.numbers,
            records.scalars,
            records.sigmas,
            records.squares,
            records.noise,
            found_inf,
            round,
            int(last),
            KIND=kind,
            KP=records.KP,
            KX=records.KX,
            DTYPE=DTYPES[records.dtype],
            **options(device, kind, records.KP, records.KX),
        )
