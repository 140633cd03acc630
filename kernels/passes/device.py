"""One pass over the weights in Triton: a base update or a correction, and a half product, in one touch of memory.

A program takes one strip of the product's output rows and one chunk of the inner length. It updates its part of the
weight, rounds and stores it, and multiplies what it stored by the operand's rows. A matrix is walked in memory order
of its table row: strips of rows where the product sums along a row, strips of columns (``ACROSS``) where it sums along
a column.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .. import records as r
from .. import tables
from ..solves.device import all_arrived, settle, solve
from ..solves.kinds import BASIS, RITZ
from ..tiles import DTYPES, rounded
from .arithmetic import adamw_corrections, is_finite, lerp, nearest, pointer_to, random_bits, sgd_direction, stochastic
from .tiling import (
    ADAMW,
    CORRECT,
    NONE,
    NOTHING,
    RIGHT,
    SGD,
    STRIP,
    TURNING,
    most_registers,
    tile_of,
)

NOISE_STEP = tl.constexpr(64)


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
            finite = is_finite(penalized) & is_finite(rounded(penalized, DTYPE).to(tl.float32))
            g = tl.where(finite, penalized, g)
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
                by_chance = stochastic(new, random_bits(seed, UPDATE, index), DTYPE)
                narrow = tl.where(seed != 0, by_chance, nearest(new, DTYPE))
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

    if PRODUCT and tracked:
        out_at = tl.load(entry + tl.where(on_right, r.LEFT_PRODUCT, r.RIGHT_PRODUCT))
        out = pointer_to(out_at, tl.float32, True)
        line = (chunk.to(tl.int64) * outer + fixed)[:, None] * KP
        tl.store(out + line + wide[None, :], total, (fixed < outer)[:, None])


@triton.jit
def programs_of(entry, SIDE: tl.constexpr, STRIP: tl.constexpr):
    """How many programs of a launch belong to one matrix; in Python: :func:`.tiling.programs`."""
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
    HIP: tl.constexpr,
):
    """One program of one matrix; the last one of a matrix to arrive goes on with its solve, where ``THEN`` names one.
    Those of a matrix that is not ``WANTED`` in a conditional pass take a stage of the solve before.

    Every program of a matrix decides from the same numbers, which nothing but the solve changes; so all of them take a
    ticket, also those that found nothing to do.
    """
    task = work + tl.program_id(0) * 2
    b = tl.load(task)
    index = tl.load(task + 1)
    entry = table + b * r.FIELDS
    options = numbers + b * r.NUMBERS
    scalar = scalars + b * r.SCALARS
    if found_inf is not None and tl.load(found_inf) != 0:
        return
    if CONDITIONAL and tl.load(scalar + r.WANTED) == 0:
        SETTLED: tl.constexpr = RITZ if THEN == BASIS else THEN
        if THEN != 0 and THEN != RITZ:
            sharing = programs_of(entry, SIDE, STRIP)
            settle(b, table, scalars, squares, noise, tickets, round, index, sharing, SETTLED, KP, KX, HIP)
        return
    if ((UPDATE == SGD) | (UPDATE == ADAMW)) and tl.load(entry + r.GRAD) == 0:
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
    if THEN != 0 and all_arrived(tickets, b, programs_of(entry, SIDE, STRIP), HIP):
        solve(
            b, table, numbers, scalars, sigmas, squares, noise, tickets, round, last, 0, 1,
            THEN, KP, KX, DTYPE, True, HIP,
        )  # fmt: skip


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
    limit = most_registers(records.KP, update, side, stochastic, then)
    nvidia = work.device.type == "cuda" and not tables.is_amd(work.device)
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
            HIP=tables.is_amd(work.device),
            num_warps=tile.warps,
            enable_fp_fusion=True,
            **({"maxnreg": limit} if limit and nvidia else {}),
        )
