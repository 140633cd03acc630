"""The small dense part of a step in Triton: from the partial sums of a product to Ritz triplets, the decisions of the
step, and the next basis.

The same mathematics as the trackers, on records (:mod:`specopt.kernels.records`). A solve goes by stages: in each one
the programs of a matrix take strips of a block's rows, and the last of them to arrive does the k x k part that needs
them all. What comes next needs another launch. Where a matrix calls for no further pair of products, the programs of
the launches of that pair have nothing else to do and take the later stages; where it does, and behind the products of a
conditional pair, one program makes all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import records as r
from .. import tables
from ..tiles import DTYPES
from .algebra import SLOTS, first_factor, first_round, orthonormalize, second_round, sound_basis
from .decisions import COLD_MAX
from .exact import exact
from .halves import basis_on, keep_probe, lengths_by_side, steps_before, turn_blocks, turn_sums, turn_triplets
from .kinds import BASIS, RITZ, TURN
from .pairs import (
    basis_candidates,
    basis_is_due,
    basis_orthonormal,
    basis_residual,
    ritz_sums,
    ritz_triplets,
    ritz_vectors,
)
from .rows import block_at, is_finite, scratch_at, strips

STAGES = {RITZ.value: 2, BASIS.value: 1, TURN.value: 3}
"""Launches that a solve takes by itself."""

THREADS = 256
"""Of a program."""
MOST_REGISTERS = 255
"""Of a thread on NVIDIA. Said to the assembler where it would stop at 128, for a second program beside the first, and
spill; where it takes more of itself it does better untold: BASIS of KP 32 spills 64 bytes on sm_90 with Triton 3.6, and
272 when told."""


@triton.jit
def all_arrived(tickets, b, count, HIP: tl.constexpr):
    """Whether the other programs of matrix b were here before, and what they have stored can be read."""
    if HIP:  # a barrier of AMD's waits for no stores, and the release is of the one wave that takes the ticket
        wait: tl.constexpr = "s_waitcnt vmcnt(0)\n v_mov_b32 $0, $1"
        tl.inline_asm_elementwise(wait, "=v,v,~{memory}", [count], tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()
    last = tl.atomic_add(tickets + b, 1, sem="acq_rel") == count - 1
    if HIP:  # what one wave has acquired there, the others have behind a barrier
        tl.debug_barrier()
    if last:
        tl.store(tickets + b, 0)
    return last


@triton.jit
def is_due(stats, mine, round, last, KIND: tl.constexpr):
    """Whether there is something to solve behind this product."""
    if KIND == BASIS:
        return basis_is_due(mine, last)
    else:
        return (round == 0) | (tl.load(mine + r.WANTED) != 0)


@triton.jit
def side_of(stats, round):
    return (steps_before(stats, round) + round) & 1


@triton.jit
def first_stage(entry, stats, mine, sigmas, round, last, index, count, KIND: tl.constexpr, KP: tl.constexpr):
    if KIND == RITZ:
        ritz_sums(entry, index, count, KP)
    elif KIND == BASIS:
        basis_candidates(entry, mine, sigmas, last, index, count, KP)
    else:
        turn_sums(entry, side_of(stats, round), index, count, KP)


@triton.jit
def after_first_stage(
    entry, options, stats, mine, sigmas, squares, noise, round, last, due, whole,
    KIND: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """By one program. ``whole``: with the later stages, which are made in any case where a pair is called for."""
    done = tl.load(stats + r.STAT_COUNT).to(tl.int32)
    if KIND == RITZ:
        if due:
            wanted = ritz_triplets(entry, options, stats, mine, sigmas, squares, round, KP)
            if whole | (wanted != 0):
                tl.debug_barrier()
                ritz_vectors(entry, squares, 0, 1, KP)
    elif KIND == BASIS:
        basis_residual(entry, stats, mine, sigmas, last, due, KP)
        if due:
            basis_orthonormal(entry, noise, done, tl.where(last != 0, 0, round), squares, KP)
    else:
        if due:
            side, before = side_of(stats, round), steps_before(stats, round)
            wanted = turn_triplets(entry, options, stats, mine, sigmas, squares, side, round, last, KP)
            ends = (last != 0) | (wanted == 0)
            tl.debug_barrier()
            if is_finite(tl.load(sigmas)) & (whole | (wanted != 0)):
                length, _other = lengths_by_side(entry, side)
                turn_blocks(entry, squares, side, (round == 0) & ends, 0, 1, KP)
                tl.debug_barrier()
                candidates = scratch_at(entry, tl.where(side == 0, r.LEFT_SPARE, r.RIGHT_SPARE))
                k, variant = tl.load(entry + r.K).to(tl.int32), 2 * COLD_MAX * before + round
                out, step = basis_on(entry, side)
                orthonormalize(entry, candidates, length, k, noise, variant, out, step, squares, KP)
            if ends & (round != 0) & (round % 2 == 0):
                length, other = lengths_by_side(entry, side)
                keep_probe(entry, side, 0, length, KP)
                if tl.load(mine + r.SEEN) != 0:
                    keep_probe(entry, 1 - side, 0, other, KP)


@triton.jit
def solve(
    b, table, numbers, scalars, sigmas, squares, noise, tickets, round, last, index, count,
    KIND: tl.constexpr, KP: tl.constexpr, KX: tl.constexpr, DTYPE: tl.constexpr, ALONE: tl.constexpr,
    HIP: tl.constexpr,
):  # fmt: skip
    """What follows a product of matrix b, by all threads of a program.

    Args:
        table, numbers, scalars: rows of :mod:`specopt.kernels.records`.
        sigmas: (B, W) float32, Ritz values, with ``W = max(KP, KX)``.
        squares: (B, SLOTS, W, W) float32 scratch.
        noise: fixed random columns (rows, 64).
        tickets: (B,) int32, zero before and after.
        round: which pair of the step (``TURN``: which half) the product belongs to.
        last: 1 for the last of the step; the stats are written. ``BASIS``: after the correction.
        index, count: which of how many programs that share the first stage.
        KIND: RITZ, BASIS or TURN.
        KP, KX: columns of a block, padded, and of an exact matrix (0: there is none).
        DTYPE: of the weights, read where they are exact.
        ALONE: one program makes all stages.
        HIP: for AMD.
    """
    WIDTH: tl.constexpr = KP if KP > KX else KX
    entry = table + b.to(tl.int64) * r.FIELDS
    options, mine = numbers + b * r.NUMBERS, scalars + b * r.SCALARS
    sigmas += b * WIDTH
    squares += b.to(tl.int64) * (SLOTS * WIDTH * WIDTH)
    stats = block_at(entry, r.STATS)
    is_exact = tl.load(entry + r.EXACT) != 0
    if KX > 0 and is_exact:
        exact(entry, options, stats, mine, sigmas, squares, round, last, KIND, KP, KX, DTYPE)
    if is_exact == 0:
        due = is_due(stats, mine, round, last, KIND)
        if due:
            first_stage(entry, stats, mine, sigmas, round, last, index, count, KIND, KP)
        if ALONE:
            tl.debug_barrier()
            arrived = True
        else:
            arrived = all_arrived(tickets, b, count, HIP)
        if arrived:
            whole = ALONE | (round != 0)
            after_first_stage(entry, options, stats, mine, sigmas, squares, noise, round, last, due, whole, KIND, KP)


@triton.jit
def settle(
    b, table, scalars, squares, noise, tickets, stage, index, count,
    KIND: tl.constexpr, KP: tl.constexpr, KX: tl.constexpr, HIP: tl.constexpr,
):  # fmt: skip
    """The stage 1 or 2 of a solve of round 0 that called for no other pair, by ``count`` programs."""
    WIDTH: tl.constexpr = KP if KP > KX else KX
    entry, mine = table + b.to(tl.int64) * r.FIELDS, scalars + b * r.SCALARS
    squares += b.to(tl.int64) * (SLOTS * WIDTH * WIDTH)
    STAGES: tl.constexpr = 2 if KIND == TURN else 1
    left_over = (stage >= 1) & (stage <= STAGES)  # in later rounds there is nothing
    if left_over & (tl.load(entry + r.EXACT) == 0) & is_finite(tl.load(mine + r.SIGMA)):
        if KIND == RITZ:
            ritz_vectors(entry, squares, index, count, KP)
        else:
            stats = block_at(entry, r.STATS)
            done = tl.load(stats + r.STAT_COUNT).to(tl.int32) - 1  # it is counted by now
            side = done & 1
            length, _other = lengths_by_side(entry, side)
            k = tl.load(entry + r.K).to(tl.int32)
            if stage == 1:
                turn_blocks(entry, squares, side, True, index, count, KP)
                if all_arrived(tickets, b, count, HIP):
                    first_factor(entry, length, k, squares, KP)
            elif sound_basis(squares, KP):
                candidates = scratch_at(entry, tl.where(side == 0, r.LEFT_SPARE, r.RIGHT_SPARE))
                variant = 2 * COLD_MAX * done
                first_round(entry, candidates, length, k, noise, variant, squares, index, count, KP)
                if all_arrived(tickets, b, count, HIP):
                    out, step = basis_on(entry, side)
                    second_round(entry, candidates, length, k, out, step, squares, KP)


@triton.jit(do_not_specialize=["round", "last"])
def solve_kernel(
    table,
    numbers,
    scalars,
    sigmas,
    squares,
    noise,
    work,
    tickets,
    found_inf,
    round,
    last,
    KIND: tl.constexpr,
    STAGE: tl.constexpr,
    KP: tl.constexpr,
    KX: tl.constexpr,
    DTYPE: tl.constexpr,
    HIP: tl.constexpr,
):
    """One stage of :func:`solve`; nothing where a gradient scaler has found an infinity."""
    if found_inf is not None and tl.load(found_inf) != 0:
        return
    task = work + tl.program_id(0) * 3
    b, index, count = tl.load(task), tl.load(task + 1), tl.load(task + 2)
    if STAGE == 0:
        solve(
            b, table, numbers, scalars, sigmas, squares, noise, tickets, round, last, index, count,
            KIND, KP, KX, DTYPE, False, HIP,
        )  # fmt: skip
    else:
        if tl.load(scalars + b * r.SCALARS + r.WANTED) == 0:
            settle(b, table, scalars, squares, noise, tickets, STAGE, index, count, KIND, KP, KX, HIP)


def programs(rows: int, columns: int, alone: bool, kp: int, kind: int, stage: int) -> int:
    """How many programs of a stage's launch belong to a matrix, by its shape as the tracker reads it."""
    left, right = strips(rows, kp), strips(columns, kp)
    if alone:
        return 1 if stage == 0 else 0
    if stage == 1:
        return left + right
    return {RITZ.value: left, BASIS.value: right, TURN.value: max(left, right)}[kind]


def work_list(
    shapes: Sequence[tuple[int, int]], alone: Sequence[bool], kp: int, kind: int, stage: int, device: torch.device
) -> Tensor:
    """(matrix, index, count) of every program, int32 (P, 3)."""
    counts = [programs(*shape, one, kp, kind, stage) for shape, one in zip(shapes, alone, strict=True)]
    return tables.upload(
        [(b, index, count) for b, count in enumerate(counts) for index in range(count)], torch.int32, device
    )


def work_lists(
    shapes: Sequence[tuple[int, int]], alone: Sequence[bool], kp: int, device: torch.device
) -> dict[tuple[int, int], Tensor]:
    """By kind and stage. ``alone``: solved exactly."""
    return {
        (kind, stage): work_list(shapes, alone, kp, kind, stage, device)
        for kind, stages in STAGES.items()
        for stage in range(stages)
    }


def warps(hip: bool = torch.version.hip is not None) -> int:
    """Warps of a program; a wavefront of AMD's counts two."""
    return THREADS // (64 if hip else 32)


def options(device: torch.device, kind: int, kp: int, kx: int, stage: int) -> dict[str, object]:
    """What :func:`solve_kernel` is launched with."""
    hip = tables.is_amd(device)
    limit = most_registers(kind, kp, kx, stage) if device.type == "cuda" and not hip else None
    return {"num_warps": warps(hip), "enable_fp_fusion": True, **({"maxnreg": limit} if limit else {})}


def most_registers(kind: int, kp: int, kx: int, stage: int) -> int | None:
    return MOST_REGISTERS if kind == RITZ.value and max(kp, kx) <= 32 and stage == 0 else None


def launch(records: Any, kind: int, round: int, last: bool, found_inf: Tensor | None, stage: int = 0) -> None:
    """A stage of the solves of a bucket's matrices: its table, numbers, scalars, sigmas, squares, noise, tickets,
    dtype, KP, KX and ``solving[kind, stage]``."""
    work = records.solving[kind, stage]
    if not len(work):
        return
    device = records.table.device
    with tables.on(device):
        solve_kernel[(len(work),)](
            records.table,
            records.numbers,
            records.scalars,
            records.sigmas,
            records.squares,
            records.noise,
            work,
            records.tickets,
            found_inf,
            round,
            int(last),
            KIND=kind,
            STAGE=stage,
            KP=records.KP,
            KX=records.KX,
            DTYPE=DTYPES[records.dtype],
            HIP=tables.is_amd(device),
            **options(device, kind, records.KP, records.KX, stage),
        )
