"""Blocks of columns and their small square matrices in Triton: sums over rows, triplets, orthonormal bases.

The same mathematics as :mod:`specopt.kernels.subspace`, on records (:mod:`specopt.kernels.records`). Sums over the rows
of a block run in tiles, in order; their squares are of entries divided by the largest so far. Small matrices wait in
``squares`` between uses, for few fit into registers beside a tile. Scratch blocks are aligned to 16 bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import records as r
from .. import subspace, triplets
from ..products import MAX_COLUMNS
from ..small import ROUNDS, SQUARINGS
from ..small.device import diagonal_of, orthonormalizer, reflection, sorted_columns, square_product, top_direction
from ..small.reference import TINY

SLOTS = tl.constexpr(4)
"""Small matrices that a program keeps in ``squares``."""

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
REFILLED = tl.constexpr(triplets.REFILL_THRESHOLD)
VARIANTS = tl.constexpr(subspace.VARIANTS)
SHIFT = tl.constexpr(subspace.SHIFT)
NOISE_STEP = tl.constexpr(MAX_COLUMNS)


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
