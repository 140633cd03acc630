"""Blocks of columns by strips of their rows: sums, products with small matrices, and what a strip leaves for the sum
over all of them.

Several programs may share the rows of a matrix, each its strips; the last one to arrive adds up what they left, in the
order of the strips. So the bits are the same for any number of programs. Squares are of entries divided by the largest
so far. Scratch blocks are aligned to 16 bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import records as r
from .. import tables
from ..small.device import SMALLEST

ROWS = tl.constexpr(128)
"""Rows of a block that are on chip at once; a quarter of them at 64 columns."""
SLICE = tl.constexpr(16)
"""Columns of a block that a product takes at once."""
MOST_STRIPS = tl.constexpr(64)
"""Of a matrix: a strip is one tile of rows, or several of a long matrix."""

PEAK, ALONG, SQUARE, DISTANCE = (tl.constexpr(i) for i in range(4))
"""Numbers of a strip, behind its Gram matrix and a row of K dots: what the Gram matrix is divided by, and of a distance
``‖x − c y‖`` the c, ``‖y‖²`` and itself."""


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
def rows_of(block, first, step):
    return block + first * (tl.zeros((), tl.int64) + step)


# --- strips --------------------------------------------------------------------------------------------------------
@triton.jit
def strip_rows(length, K: tl.constexpr):
    """Rows of a strip; in Python: :func:`strips`."""
    R: tl.constexpr = ROWS if K <= 32 else ROWS // 4
    return tl.cdiv(tl.cdiv(length, MOST_STRIPS), R) * R


@triton.jit
def strips_of(length, K: tl.constexpr):
    return tl.cdiv(length, strip_rows(length, K))


def strips(length: int, kp: int) -> int:
    """How many strips a block of so many rows has."""
    tile = ROWS.value if kp <= 32 else ROWS.value // 4
    return max(tables.pieces(length, tile, MOST_STRIPS.value)[1], 1)


def partial_rows(shape: tuple[int, int], kp: int) -> int:
    """Rows of KP entries that the strips of a matrix's blocks leave. A longer side may have fewer strips: 8,192 rows
    are cut into 64 strips, 8,193 into 33."""
    return max(strips(length, kp) for length in shape) * (kp + 2)


@triton.jit
def partial_of(entry, strip, K: tl.constexpr):
    return scratch_at(entry, r.PARTIALS) + strip * (K * K + 2 * K)


@triton.jit
def leave_gram(entry, strip, gram, peak, K: tl.constexpr):
    """Sums of :func:`add_gram` over a strip."""
    partial = partial_of(entry, strip, K)
    park(partial, tl.sum(gram, 0), K)
    tl.store(partial + K * K + K + PEAK, peak)


@triton.jit
def leave_distance(entry, strip, scale, along, square, rest, K: tl.constexpr):
    """Sums of :func:`add_distance` over a strip, of an x that was divided by ``scale``."""
    numbers = partial_of(entry, strip, K) + K * K + K
    tl.store(numbers + ALONG, along * scale)
    tl.store(numbers + SQUARE, square)
    tl.store(numbers + DISTANCE, tl.sqrt(rest) * scale)


@triton.jit
def number_of(entry, at, count, K: tl.constexpr):
    """One number of every strip, 0 beyond ``count``."""
    strip = tl.arange(0, MOST_STRIPS)
    return tl.load(partial_of(entry, 0, K) + strip * (K * K + 2 * K) + (K * K + K + at), strip < count, 0.0)


@triton.jit
def gram_of(entry, count, K: tl.constexpr):
    """``G = XᵀX / s²`` and ``s = max |X|`` of all strips; subnormal numbers count for 0: their inverses may be none."""
    peak = tl.max(number_of(entry, PEAK, count, K), 0)  # may pass a NaN by; the sum does not
    faint = peak < SMALLEST
    divisor = tl.where(faint, 1.0, peak)
    gram = tl.zeros((K, K), tl.float32)
    partial = partial_of(entry, 0, K)
    for _ in range(count):
        ratio = tl.load(partial + K * K + K + PEAK) / divisor
        gram += fetch(partial, K) * (ratio * ratio)
        partial += K * K + 2 * K
    return gram, tl.where(faint, 0.0, peak)


@triton.jit
def dots_of(entry, count, peak, K: tl.constexpr):
    """The dots of all strips, each of which divided them by its own largest entry, divided by ``peak``."""
    wide = tl.arange(0, K)
    divisor = tl.where(peak == 0, 1.0, peak)
    dots = tl.zeros((K,), tl.float32)
    partial = partial_of(entry, 0, K) + K * K
    for _ in range(count):
        dots += tl.load(partial + wide) * (tl.load(partial + K + PEAK) / divisor)
        partial += K * K + 2 * K
    return dots


@triton.jit
def distance_of(entry, count, scale, K: tl.constexpr):
    """``min_c ‖x − c y‖ / scale`` over all strips.

    A strip's own difference is at right angles to its y, so ``‖x − c y‖² = Σ_p (d_p² + (c_p − c)² ‖y_p‖²)``: squares
    are added and never subtracted, or a distance of 1e-4 would be lost in their rounding.
    """
    along = number_of(entry, ALONG, count, K) / scale
    square = number_of(entry, SQUARE, count, K)
    rest = number_of(entry, DISTANCE, count, K) / scale
    whole = tl.sum(square, 0)
    apart = along - tl.sum(along * square, 0) / tl.where(whole > 0, whole, 1.0)
    return tl.sqrt(tl.sum(rest * rest + apart * apart * square, 0))


# --- tiles ---------------------------------------------------------------------------------------------------------
@triton.jit
def add_distance(along, square, rest, x, y):
    """``c = x·y / y·y``, ``‖y‖²`` and ``‖x − c y‖²`` with some more entries."""
    more = tl.sum(y * y, 0)
    part = tl.sum(x * y, 0) / tl.where(more > 0, more, 1.0)
    difference = x - part * y
    both = square + more
    share = more / tl.where(both > 0, both, 1.0)
    apart = part - along
    rest += tl.sum(difference * difference, 0) + apart * apart * square * share
    return along + apart * share, both, rest


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
def sum_strip(entry, strip, product, chunks, total, n, k, K: tl.constexpr):
    """One strip of a product of n rows: its chunks summed into ``total``, and the Gram matrix of k columns left behind.
    Returns the strip's first row, the row after its last, and what the Gram matrix is divided by."""
    R: tl.constexpr = ROWS if K <= 32 else ROWS // 4
    row, wide = tl.arange(0, R), tl.arange(0, K)
    offsets = row[:, None] * K + wide[None, :]
    start = strip * strip_rows(n, K)
    stop = tl.minimum(start + strip_rows(n, K), n)
    gram, peak = no_gram(K)
    for first in range(start, stop, R):
        inside = (row < stop - first)[:, None]
        y = sum_of_chunks(rows_of(product, first, K), offsets, inside, n.to(tl.int64) * K, chunks)
        tl.store(rows_of(total, first, K) + offsets, y, inside)
        gram, peak, _ratio, _y = add_gram(gram, peak, tl.where((wide < k)[None, :], y, 0.0))
    leave_gram(entry, strip, gram, peak, K)
    return start, stop, peak


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
def mix(source, step, factor, out, out_step, start, stop, k, PADDED: tl.constexpr, K: tl.constexpr):
    """``out = X M`` for some rows, k columns each; ``out`` may be ``X``."""
    R: tl.constexpr = ROWS if K <= 32 else ROWS // 4
    row, wide = tl.arange(0, R), tl.arange(0, K)
    for first in range(start, stop, R):
        left = stop - first
        total = tl.zeros((R, K), tl.float32)
        total = add_mixed(total, rows_of(source, first, step), step, row, left, k, factor, PADDED, K, K)
        tl.debug_barrier()
        inside = (row < left)[:, None] & (wide < k)[None, :]
        tl.store(rows_of(out, first, out_step) + row[:, None] * out_step + wide[None, :], total, inside)


@triton.jit
def copy_column(source, step, out, out_step, start, stop, K: tl.constexpr):
    """The first column of a block, for some rows."""
    R: tl.constexpr = ROWS if K <= 32 else ROWS // 4
    row = tl.arange(0, R)
    for first in range(start, stop, R):
        x = tl.load(rows_of(source, first, step) + row * step, row < stop - first, 0.0)
        tl.store(rows_of(out, first, out_step) + row * out_step, x, row < stop - first)
