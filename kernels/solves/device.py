"""The small dense part of a step in Triton, one program a matrix: from the partial sums of a product to Ritz triplets,
the decisions of the step, and the next basis.

The same mathematics as the trackers, on records (:mod:`specopt.kernels.records`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.torch_version import TorchVersion

from .. import records as r
from .. import tables
from ..tiles import DTYPES
from .algebra import (
    LINE,
    ROWS,
    SLICE,
    SLOTS,
    add_gram,
    add_mixed,
    block_at,
    entry_of,
    is_finite,
    lengths,
    mix,
    next_basis,
    no_gram,
    noise_window,
    orthonormalize,
    park,
    ritz_values,
    rows_of,
    scratch_at,
    summed,
    summed_beside,
)
from .decisions import (
    COLD_MAX,
    LOST,
    again_wanted,
    decide_on_weights,
    first_wanted,
    record_on_gradients,
    record_on_weights,
)

RITZ = tl.constexpr(1)
"""After ``W V``: triplets, and what the step does with them."""
BASIS = tl.constexpr(2)
"""After ``Wᵀ [U | Ω]``: the next basis, and at the step's end its stats."""
TURN = tl.constexpr(3)
"""After one half product of a tracker by halves: both."""

THREADS = 256
"""Of a program."""
MOST_REGISTERS = 255
"""Of a thread on NVIDIA. Said to the assembler where it would stop at 128, for a second program beside the first, and
spill; where it takes more of itself it does better untold."""
TOLD = TorchVersion(triton.__version__) >= "3.9"
"""Before, it always takes more of itself: BASIS of KP 32 spills 8 bytes on sm_90 with Triton 3.6, and 176 when told."""


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
    if not TOLD:
        return None
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
