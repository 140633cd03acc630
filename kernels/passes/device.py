"""One pass over the weights in Triton: a base update or a correction, and a half product, in one touch of memory.

A program takes one strip of the product's output rows and one chunk of the inner length. It updates its part of the
weight, rounds and stores it, and multiplies what it stored by the operand's rows. A matrix is walked in memory order
of its table row: strips of rows where the product sums along a row, strips of columns (``ACROSS``) where it sums along
a column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.torch_version import TorchVersion

from .. import records as r
from .. import tables
from ..solves.device import solve
from ..tiles import DTYPES, rounded

NONE, SGD, ADAMW, CORRECT = (tl.constexpr(i) for i in range(4))
"""``UPDATE``: what happens to the weight."""
NOTHING, LEFT, RIGHT, TURNING = (tl.constexpr(i) for i in range(-1, 3))
"""``SIDE``: no product; ``W [V | Ω]``; ``Wᵀ [U | Ω]``; the one at turn by the matrix' count of steps."""

STRIP = 64
"""Output rows of a program. Every strip reads the operand again: 4 KP / 64 bytes a parameter."""
CHUNK, MOST_CHUNKS, GRAIN = 1024, 32, 64
"""Inner length of a program, about; how many partial sums at most; and what chunks are a multiple of."""
NOISE_STEP = tl.constexpr(64)


LEAST_INNER = 8 if TorchVersion(triton.__version__) >= "3.9" else 16
"""The shortest inner length of a float32 product that Triton takes. At 16 a program keeps more registers, and one runs
on a multiprocessor where two did."""


class Tile(NamedTuple):
    inner: int
    loose: int
    """Inner length of a tile of a matrix that is not aligned, each entry of which has an address of its own."""
    warps: int
    stages: int
    """Tiles of an aligned matrix that are on their way at once."""


TILES = {
    (16, 4): Tile(32, 8, 8, 3),
    (16, 2): Tile(32, 8, 8, 3),
    (32, 4): Tile(32, 8, 8, 2),
    (32, 2): Tile(32, 8, 8, 2),
    (64, 4): Tile(16, 8, 8, 2),
    (64, 2): Tile(32, 16, 8, 1),
}
"""For each KP and size of an entry, the same for every update: so the product of the same weights has the same bits."""


def tile_of(kp: int, size: int, update: int, side: int, stochastic: bool) -> Tile:
    """What a launch runs with. The number of stages changes no sum; these spill nowhere."""
    tile = TILES[32 if side == NOTHING.value else kp, size]
    tile = tile._replace(loose=max(tile.loose, LEAST_INNER))
    if update == ADAMW.value and side == TURNING.value:  # the most that is held in registers
        tile = tile._replace(stages=1)
    if stochastic:
        tile = tile._replace(stages=1 if kp != 32 else 2 if update == CORRECT.value else 3)
    return tile


def most_registers(kp: int, update: int, side: int) -> int | None:
    """Left to itself the assembler keeps the widest pass to 128 and spills; allowed more, it needs 126."""
    return 168 if kp == 64 and update == ADAMW.value and side == TURNING.value else None


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
    elif tl.float16 == DTYPE:
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


@triton.jit
def stream(
    entry,
    options,
    scalar,
    noise,
    grad_scale,
    strip,
    chunk,
    side,
    DTYPE: tl.constexpr,
    UPDATE: tl.constexpr,
    PENALIZED: tl.constexpr,
    PRODUCT: tl.constexpr,
    ACROSS: tl.constexpr,
    ALIGNED: tl.constexpr,
    AMSGRAD: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    KP: tl.constexpr,
    STRIP: tl.constexpr,
    INNER: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One strip and chunk of one matrix: update, and the partial sum of the product."""
    VECTOR: tl.constexpr = 128 // DTYPE.primitive_bitwidth  # elements in 16 bytes
    BASE: tl.constexpr = (UPDATE == SGD) | (UPDATE == ADAMW)
    RANK_ONE: tl.constexpr = PENALIZED | (UPDATE == CORRECT)
    m = tl.load(entry + r.ROWS).to(tl.int32)
    n = tl.load(entry + r.COLUMNS).to(tl.int32)
    row_step = tl.load(entry + r.ROW_STEP)
    column_step = tl.load(entry + r.COLUMN_STEP)
    if ALIGNED:
        n = tl.multiple_of(n, VECTOR)
        row_step = tl.multiple_of(row_step, VECTOR)
        column_step = tl.full((), 1, tl.int64)
    swapped = tl.load(entry + r.SWAPPED) != 0
    tracked = tl.load(entry + r.EXACT) == 0
    address = tl.load(entry + r.WEIGHT)
    weight = pointer_to(address, DTYPE, ALIGNED)

    # sizes and walk, in the order of memory
    if ACROSS:
        length, outer = m, n
    else:
        length, outer = n, m
    size = tl.load(entry + tl.where(side == 0, r.LEFT_CHUNK, r.RIGHT_CHUNK)).to(tl.int32)
    start = chunk * tl.multiple_of(size, INNER)
    stop = tl.minimum(start + size, length)
    fixed = strip * STRIP + tl.arange(0, STRIP)
    inner = tl.arange(0, INNER)

    # rank one: each entry of the weight gains (scale · a) b, a along its memory row's vector
    if RANK_ONE:
        outer_scale = tl.load(scalar + (r.PENALTY if PENALIZED else r.CHANGE))
        row_at = tl.load(entry + tl.where(swapped, r.RIGHT_VECTORS, r.LEFT_VECTORS))
        column_at = tl.load(entry + tl.where(swapped, r.LEFT_VECTORS, r.RIGHT_VECTORS))
        row_vector = row_at.to(tl.pointer_type(tl.float32))
        column_vector = column_at.to(tl.pointer_type(tl.float32))
        fixed_vector = column_vector if ACROSS else row_vector
        moving_vector = row_vector if ACROSS else column_vector
        some = tl.where(outer_scale != 0, outer, 0)
        along_strip = tl.load(fixed_vector + fixed.to(tl.int64) * KP, fixed < some, 0.0) * outer_scale  # [STRIP]
        some = tl.where(outer_scale != 0, stop, 0)

    # rows that a masked access takes part in are limited by a number: a mask and a scalar condition do not combine in
    # Triton's interpreter
    if UPDATE == CORRECT:
        factor = tl.load(scalar + r.FACTOR)
        changed = tl.where((outer_scale != 0) | (factor != 1), m, 0)
    if BASE:
        grad = pointer_to(tl.load(entry + r.GRAD), DTYPE, ALIGNED)
        first_at = tl.load(entry + r.FIRST)
        rate_at = tl.load(entry + r.LR)
        rate = tl.load(options + r.RATE)
        if rate_at != 0:
            rate = tl.load(rate_at.to(tl.pointer_type(tl.float32)))
        decay = tl.load(options + r.DECAY)
        maximize = tl.load(options + r.MAXIMIZE) != 0
        if grad_scale is not None:
            scale = tl.load(grad_scale)
    if UPDATE == SGD:
        momentum = tl.load(options + r.BETA1)
        damping = tl.load(options + r.COMPLEMENT2)
        fresh = tl.load(options + r.BIAS1) == 1
        nesterov = tl.load(options + r.BIAS2_ROOT) == 1
        has_buffer = (first_at != 0) & (momentum != 0)
        buffered = tl.where(has_buffer, m, 0)
        remembered = tl.where(fresh, 0, buffered)
        first = pointer_to(tl.where(has_buffer, first_at, address), DTYPE, ALIGNED)
    if UPDATE == ADAMW:
        complement1 = tl.load(options + r.COMPLEMENT1)
        beta2 = tl.load(options + r.BETA2)
        complement2 = tl.load(options + r.COMPLEMENT2)
        eps = tl.load(options + r.EPS)
        bias1, bias2_root = adamw_corrections(entry, options)
        first = pointer_to(first_at, DTYPE, ALIGNED)
        second = pointer_to(tl.load(entry + r.SECOND), DTYPE, ALIGNED)
        if AMSGRAD:
            peak_at = tl.load(entry + r.PEAK)
            peaked = tl.where(peak_at != 0, m, 0)
            peak = pointer_to(tl.where(peak_at != 0, peak_at, address), DTYPE, ALIGNED)
    if STOCHASTIC:
        seed = tl.load(options + r.SEED)
        row_count = tl.where(swapped, 1, n).to(tl.int64)
        column_count = tl.where(swapped, m, 1).to(tl.int64)

    if PRODUCT:
        on_right = side == 0
        basis = tl.load(entry + tl.where(on_right, r.RIGHT, r.LEFT)).to(tl.pointer_type(tl.float32))
        basis_step = tl.load(entry + tl.where(on_right, r.RIGHT_STEP, r.LEFT_STEP))
        has_probe = tl.load(entry + tl.where(on_right, r.LEFT_PROBE, r.RIGHT_PROBE)) != 0
        k = tl.where(tracked, tl.load(entry + r.K), 0).to(tl.int32)
        used = k + tl.where(tracked & has_probe, tl.load(entry + r.PROBES), 0).to(tl.int32)
        wide = tl.arange(0, KP)
        total = tl.zeros((STRIP, KP), tl.float32)

    for low in tl.range(start, stop, INNER, num_stages=STAGES):
        at = low + inner
        if ACROSS:
            rows, columns = at, fixed
        else:
            rows, columns = fixed, at
        inside = (rows < m)[:, None] & (columns < n)[None, :]
        place = rows[:, None] * row_step + columns[None, :] * column_step
        w = tl.load(weight + place, inside, 0.0).to(tl.float32)
        if RANK_ONE:
            along = tl.load(moving_vector + at.to(tl.int64) * KP, at < some, 0.0)
            rank_one = along[:, None] * along_strip[None, :] if ACROSS else along_strip[:, None] * along[None, :]
        if BASE:
            g = tl.load(grad + place, inside, 0.0).to(tl.float32)
            if grad_scale is not None:
                g = g / scale
        if PENALIZED:
            penalized = g + rank_one
            g = tl.where(is_finite(rounded(penalized, DTYPE).to(tl.float32)), penalized, g)
        if UPDATE == SGD:
            g = tl.where(maximize, -g, g)
            known = (rows < remembered)[:, None] & (columns < n)[None, :]
            buffer = tl.load(first + place, known, 0.0).to(tl.float32)
            direction, buffer = sgd_direction(w, g, buffer, momentum, damping, decay, fresh, nesterov, has_buffer)
            known = (rows < buffered)[:, None] & (columns < n)[None, :]
            tl.store(first + place, nearest(buffer, DTYPE), known)
            new = w - rate * direction
        if UPDATE == ADAMW:
            g = tl.where(maximize, -g, g)
            mean = lerp(tl.load(first + place, inside, 0.0).to(tl.float32), g, complement1)
            square = tl.load(second + place, inside, 0.0).to(tl.float32) * beta2 + complement2 * g * g
            tl.store(first + place, nearest(mean, DTYPE), inside)
            tl.store(second + place, nearest(square, DTYPE), inside)
            if AMSGRAD:
                known = (rows < peaked)[:, None] & (columns < n)[None, :]
                old = tl.load(peak + place, known, 0.0).to(tl.float32)
                square = tl.maximum(old, square, propagate_nan=tl.PropagateNan.ALL)
                tl.store(peak + place, nearest(square, DTYPE), known)
            divisor = tl.sqrt_rn(square) / bias2_root + eps
            new = w * (1 - rate * decay) - rate / bias1 * (mean / divisor)
        if UPDATE == CORRECT:
            new = factor * w + rank_one
        if UPDATE == NONE:
            # through registers, as the others: straight from shared memory the dot would hold all of it at once
            w = tl.where(inside, w, 0.0)
        else:
            if STOCHASTIC:
                index = rows[:, None] * row_count + columns[None, :] * column_count
                narrow = stochastic(new, random_bits(seed, UPDATE, index), DTYPE)
            else:
                narrow = nearest(new, DTYPE)
            written = narrow.to(tl.float32)
            if UPDATE == CORRECT:
                keep = (rows < changed)[:, None] & (columns < n)[None, :] & is_finite(written)
                if STOCHASTIC:  # which would not overflow
                    keep &= is_finite(rounded(new, DTYPE).to(tl.float32)) & is_finite(new)
                tl.store(weight + place, narrow, keep)
                w = tl.where(keep, written, w)
            else:
                tl.store(weight + place, narrow, inside)
                w = tl.where(inside, written, 0.0)
        if PRODUCT:
            here = (at < stop)[:, None]
            line = at.to(tl.int64)[:, None]
            b = tl.load(basis + line * basis_step + wide[None, :], here & (wide < k)[None, :], 0.0)
            mask = here & ((wide >= k) & (wide < used))[None, :]
            b += tl.load(noise + line * NOISE_STEP + (wide - k)[None, :], mask, 0.0)
            if ACROSS:
                w = tl.trans(w)
            total = tl.dot(w, b, total, input_precision="ieee")  # [STRIP, KP]

    if PRODUCT:  # noqa: SIM102 -- compiled only with a product
        if tracked:
            out_at = tl.load(entry + tl.where(on_right, r.LEFT_PRODUCT, r.RIGHT_PRODUCT))
            out = pointer_to(out_at, tl.float32, True)
            line = (chunk.to(tl.int64) * outer + fixed)[:, None] * KP
            tl.store(out + line + wide[None, :], total, (fixed < outer)[:, None])


@triton.jit
def programs_of(entry, SIDE: tl.constexpr, STRIP: tl.constexpr):
    """How many programs of a launch belong to one matrix; in Python: :func:`programs`."""
    swapped = tl.load(entry + r.SWAPPED) != 0
    rows, columns = tl.load(entry + r.ROWS), tl.load(entry + r.COLUMNS)
    on_left = tl.maximum(tl.cdiv(tl.where(swapped, columns, rows), STRIP), 1) * tl.load(entry + r.LEFT_CHUNKS)
    on_right = tl.maximum(tl.cdiv(tl.where(swapped, rows, columns), STRIP), 1) * tl.load(entry + r.RIGHT_CHUNKS)
    if SIDE == TURNING:
        return tl.maximum(on_left, on_right).to(tl.int32)
    elif SIDE == RIGHT:
        return on_right.to(tl.int32)
    else:
        return on_left.to(tl.int32)


@triton.jit(do_not_specialize=["flip", "round", "last"])
def pass_kernel(
    table,
    numbers,
    scalars,
    sigmas,
    squares,
    noise,
    work,
    tickets,
    found_inf,
    grad_scale,
    flip,
    round,
    last,
    DTYPE: tl.constexpr,
    UPDATE: tl.constexpr,
    SIDE: tl.constexpr,
    THEN: tl.constexpr,
    KP: tl.constexpr,
    KX: tl.constexpr,
    CONDITIONAL: tl.constexpr,
    AMSGRAD: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    STRIP: tl.constexpr,
    INNER: tl.constexpr,
    LOOSE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program of one matrix; the last one of a matrix to arrive goes on with its solve, where ``THEN`` names one.

    Every program of a matrix decides from the same numbers, which nothing but the solve changes; so all of them take a
    ticket, also those that found nothing to do.
    """
    task = work + tl.program_id(0) * 2
    b = tl.load(task)
    index = tl.load(task + 1)
    entry = table + b * r.FIELDS
    options = numbers + b * r.NUMBERS
    scalar = scalars + b * r.SCALARS
    if found_inf is not None:  # noqa: SIM102 -- without it the load must not be compiled
        if tl.load(found_inf) != 0:
            return
    if CONDITIONAL:  # noqa: SIM102 -- compiled only where it is asked for
        if tl.load(scalar + r.WANTED) == 0:
            return
    if UPDATE == SGD or UPDATE == ADAMW:  # noqa: SIM102, SIM109 -- only there; Triton knows no `in` of constexprs
        if tl.load(entry + r.GRAD) == 0:
            return

    side = 0
    if SIDE == RIGHT:
        side = 1
    if SIDE == TURNING:
        count = tl.load(tl.load(entry + r.STATS).to(tl.pointer_type(tl.float32)) + r.STAT_COUNT)
        side = (count.to(tl.int32) + flip) & 1
    swapped = (tl.load(entry + r.SWAPPED) != 0).to(tl.int32)
    pieces = tl.load(entry + tl.where(side == 0, r.LEFT_CHUNKS, r.RIGHT_CHUNKS)).to(tl.int32)
    strip = index // pieces
    chunk = index % pieces
    across = side != swapped
    busy = strip * STRIP < tl.load(entry + tl.where(across, r.COLUMNS, r.ROWS))
    if UPDATE == NONE:
        busy &= tl.load(entry + r.EXACT) == 0
    if UPDATE == CORRECT:
        wanted = (tl.load(scalar + r.CHANGE) != 0) | (tl.load(scalar + r.FACTOR) != 1)
        if SIDE != NOTHING:
            wanted |= tl.load(entry + r.EXACT) == 0
        busy &= wanted
    aligned = tl.load(entry + r.ALIGNED) != 0
    PRODUCT: tl.constexpr = SIDE != NOTHING
    PENALIZED: tl.constexpr = (UPDATE == SGD) | ((UPDATE == ADAMW) & (SIDE == TURNING))  # a tracker by halves penalizes
    if busy:
        if across:
            if aligned:
                stream(
                    entry, options, scalar, noise, grad_scale, strip, chunk, side,
                    DTYPE, UPDATE, PENALIZED, PRODUCT, True, True, AMSGRAD, STOCHASTIC, KP, STRIP, INNER, STAGES,
                )  # fmt: skip
            else:
                stream(
                    entry, options, scalar, noise, grad_scale, strip, chunk, side,
                    DTYPE, UPDATE, PENALIZED, PRODUCT, True, False, AMSGRAD, STOCHASTIC, KP, STRIP, LOOSE, 1,
                )  # fmt: skip
        else:
            if aligned:
                stream(
                    entry, options, scalar, noise, grad_scale, strip, chunk, side,
                    DTYPE, UPDATE, PENALIZED, PRODUCT, False, True, AMSGRAD, STOCHASTIC, KP, STRIP, INNER, STAGES,
                )  # fmt: skip
            else:
                stream(
                    entry, options, scalar, noise, grad_scale, strip, chunk, side,
                    DTYPE, UPDATE, PENALIZED, PRODUCT, False, False, AMSGRAD, STOCHASTIC, KP, STRIP, LOOSE, 1,
                )  # fmt: skip
    if THEN != 0:
        tl.debug_barrier()
        arrived = tl.atomic_add(tickets + b, 1, sem="acq_rel")
        if arrived == programs_of(entry, SIDE, STRIP) - 1:
            tl.store(tickets + b, 0)
            solve(b, table, numbers, scalars, sigmas, squares, noise, round, last, THEN, KP, KX, DTYPE)


def chunks(length: int) -> tuple[int, int]:
    """Size and number of the pieces that an inner length is cut into: LEFT_CHUNK and LEFT_CHUNKS of n columns,
    RIGHT_CHUNK and RIGHT_CHUNKS of m rows. Nearly equal, for the programs of a launch end together."""
    count = min(max(-(-length // CHUNK), 1), MOST_CHUNKS)
    size = max(-(-length // (count * GRAIN)), 1) * GRAIN
    return size, max(-(-length // size), 1)


def programs(rows: int, columns: int, side: int) -> int:
    """How many programs of a launch on ``side`` belong to a matrix, by its shape as the tracker reads it."""
    on_left = max(-(-rows // STRIP), 1) * chunks(columns)[1]
    on_right = max(-(-columns // STRIP), 1) * chunks(rows)[1]
    if side == TURNING.value:
        return max(on_left, on_right)
    return on_right if side == RIGHT.value else on_left


def work_list(shapes: Sequence[tuple[int, int]], side: int, device: torch.device) -> Tensor:
    """(matrix, index) of every program, int32 (P, 2); shapes as the tracker reads them."""
    counts = [programs(rows, columns, side) for rows, columns in shapes]

    def build() -> Tensor:
        matrix = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        first = np.repeat(np.cumsum([0, *counts[:-1]]), counts)
        return tables.upload(np.stack([matrix, np.arange(len(matrix)) - first], 1), torch.int32, device)

    return tables.remembered(("passes", tuple(counts)), device, build)


def launch(
    records: Any,
    update: int,
    side: int,
    *,
    then: int = 0,
    flip: int = 0,
    round: int = 0,
    last: bool | int = 0,
    conditional: bool = False,
    stochastic: bool = False,
    found_inf: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """One pass over a bucket's matrices: its table, numbers, scalars, sigmas, squares, noise, tickets, dtype, KP, KX
    and ``work[side]``; ``amsgrad``, where it is known, tells whether one of them has a ``PEAK``.

    ``flip`` turns the sides of ``TURNING``; ``conditional``: only matrices with ``WANTED``; ``then``, ``round`` and
    ``last``: of the solve that the last program of each matrix makes. Written to through pointers: it is for the caller
    to increment the versions of the tensors."""
    work = records.work[side]
    if not len(work):
        return
    tile = tile_of(records.KP, records.dtype.itemsize, update, side, stochastic)
    limit = most_registers(records.KP, update, side)
    nvidia = work.device.type == "cuda" and torch.version.hip is None
    with tables.on(work.device):
        pass_kernel[(len(work),)](
            records.table,
            records.numbers,
            records.scalars,
            records.sigmas,
            records.squares,
            records.noise,
            work,
            records.tickets,
            found_inf,
            grad_scale,
            flip,
            round,
            int(last),
            DTYPE=DTYPES[records.dtype],
            UPDATE=update,
            SIDE=side,
            THEN=then,
            KP=records.KP,
            KX=records.KX,
            CONDITIONAL=conditional,
            AMSGRAD=update == ADAMW.value and getattr(records, "amsgrad", True),
            STOCHASTIC=stochastic,
            STRIP=STRIP,
            INNER=tile.inner,
            LOOSE=tile.loose,
            STAGES=tile.stages,
            num_warps=tile.warps,
            enable_fp_fusion=True,
            **({"maxnreg": limit} if limit and nvidia else {}),
        )
