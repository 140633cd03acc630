"""Writing into matrices in Triton, and Frobenius norms: one program takes a strip of rows and a chunk of columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tables
from ..tiles import DTYPES, load_matrix, matrix_fields, rounded

FIELDS = tl.constexpr(10)
"""Of a table row: the matrix's five, its index, then left block, row stride, right block, row stride."""

CHUNK = tl.constexpr(1024)
INNER = tl.constexpr(16)
BATCH = tl.constexpr(128)
"""Partial norms added at once."""


class Tile(NamedTuple):
    rows: int
    columns: int
    warps: int


TILE = Tile(32, 64, 8)
DOT_TILE = Tile(32, 32, 4)
"""For updates of rank above 1, which hold the operands of a dot besides; as many rows, so the work lists agree."""


@triton.jit
def store_finite(pointers, new, inside, DTYPE: tl.constexpr):
    """An entry that would not be finite keeps its old value: decided after rounding, which may overflow."""
    narrow = rounded(new, DTYPE)
    finite = (new == new) & (tl.abs(narrow.to(tl.float32)) < float("inf"))
    tl.store(pointers, narrow, inside & finite)


@triton.jit
def rank_update_kernel(
    table,
    work,
    coefficients,
    rank,
    DTYPE: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``W ← W + Σ_i c_i u_i v_iᵀ`` on one strip and chunk; ``RANK`` is 1 or the padded rank."""
    task = work + tl.program_id(0) * 3
    entry = table + tl.load(task) * FIELDS
    index = tl.arange(0, RANK)
    coefficients += tl.load(entry + 5) * rank
    c = tl.load(coefficients + index, index < rank, 0.0)  # [RANK]
    if tl.sum((c != 0).to(tl.int32), 0) == 0:
        return
    pointer, m, n, row_step, column_step = load_matrix(entry, DTYPE, UNIT, ALIGNED)
    left, left_step = tl.load(entry + 6).to(tl.pointer_type(tl.float32)), tl.load(entry + 7)
    right, right_step = tl.load(entry + 8).to(tl.pointer_type(tl.float32)), tl.load(entry + 9)
    rows = tl.load(task + 1) * ROWS + tl.arange(0, ROWS)
    start = tl.load(task + 2) * CHUNK
    row_origins = pointer + rows[:, None] * row_step
    left_rows = left + rows * left_step
    for first in range(start, tl.minimum(start + CHUNK, n), COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        right_rows = right + columns * right_step
        pointers = row_origins + columns[None, :] * column_step
        inside = (rows < m)[:, None] & (columns < n)[None, :]
        w = tl.load(pointers, inside, 0.0).to(tl.float32)  # [R, C]
        if RANK == 1:
            u = tl.load(left_rows, rows < m, 0.0) * tl.load(coefficients)
            new = w + u[:, None] * tl.load(right_rows, columns < n, 0.0)[None, :]
        else:
            new = w
            for low in range(0, RANK, INNER):
                i = low + tl.arange(0, INNER)
                weight = tl.load(coefficients + i, i < rank, 0.0)
                u = tl.load(left_rows[:, None] + i[None, :], (rows < m)[:, None] & (i < rank)[None, :], 0.0)
                v = tl.load(right_rows[None, :] + i[:, None], (i < rank)[:, None] & (columns < n)[None, :], 0.0)
                new = tl.dot(u * weight[None, :], v, new, input_precision="ieee")
        store_finite(pointers, new, inside, DTYPE)


@triton.jit
def scale_kernel(
    table,
    work,
    factors,
    DTYPE: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``W ← f W`` on one strip and chunk."""
    task = work + tl.program_id(0) * 3
    entry = table + tl.load(task) * FIELDS
    factor = tl.load(factors + tl.load(entry + 5))
    if factor == 1:
        return
    pointer, m, n, row_step, column_step = load_matrix(entry, DTYPE, UNIT, ALIGNED)
    rows = tl.load(task + 1) * ROWS + tl.arange(0, ROWS)
    start = tl.load(task + 2) * CHUNK
    row_origins = pointer + rows[:, None] * row_step
    for first in range(start, tl.minimum(start + CHUNK, n), COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        pointers = row_origins + columns[None, :] * column_step
        inside = (rows < m)[:, None] & (columns < n)[None, :]
        store_finite(pointers, tl.load(pointers, inside, 0.0).to(tl.float32) * factor, inside, DTYPE)


@triton.jit
def add_squares(peak, total, part_peak, part):
    """``(s, q)`` with ``s² q = peak² total + part_peak² part`` and ``s`` the larger peak."""
    larger = tl.maximum(peak, part_peak)
    divisor = tl.where(larger == 0, 1.0, larger)
    old, new = peak / divisor, part_peak / divisor
    return larger, total * old * old + part * new * new


@triton.jit
def norm_partials_kernel(
    table,
    work,
    partials,
    DTYPE: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``s = max |W|`` and ``q = Σ (W/s)²`` of one strip and chunk. The maximum may pass a NaN by, the sum does not."""
    program = tl.program_id(0)
    task = work + program * 3
    entry = table + tl.load(task) * FIELDS
    pointer, m, n, row_step, column_step = load_matrix(entry, DTYPE, UNIT, ALIGNED)
    rows = tl.load(task + 1) * ROWS + tl.arange(0, ROWS)
    start = tl.load(task + 2) * CHUNK
    row_origins = pointer + rows[:, None] * row_step
    peak, total = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    for first in range(start, tl.minimum(start + CHUNK, n), COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        inside = (rows < m)[:, None] & (columns < n)[None, :]
        w = tl.load(row_origins + columns[None, :] * column_step, inside, 0.0).to(tl.float32)
        part_peak = tl.max(tl.max(tl.abs(w), 1), 0)
        scaled = w / tl.where(part_peak == 0, 1.0, part_peak)
        peak, total = add_squares(peak, total, part_peak, tl.sum(tl.sum(scaled * scaled, 1), 0))
    tl.store(partials + program * 2, peak)
    tl.store(partials + program * 2 + 1, total)


@triton.jit
def norm_sums_kernel(spans, partials, norms):
    """``s √q`` over the partials of one matrix, ``spans`` (B, 2): the first and their number."""
    b = tl.program_id(0)
    start = tl.load(spans + 2 * b)
    count = tl.load(spans + 2 * b + 1).to(tl.int32)
    slot = tl.arange(0, BATCH)
    peak, total = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    for first in range(0, count, BATCH):
        inside = first + slot < count
        source = partials + (start + first + slot) * 2
        peaks = tl.load(source, inside, 0.0)
        part_peak = tl.max(peaks, 0)
        ratio = peaks / tl.where(part_peak == 0, 1.0, part_peak)
        part = tl.sum(tl.load(source + 1, inside, 0.0) * ratio * ratio, 0)
        peak, total = add_squares(peak, total, part_peak, part)
    tl.store(norms + b, peak * tl.sqrt(total))


class _Launch(NamedTuple):
    """The matrices of one layout."""

    layout: tables.Layout
    table: Tensor
    work: Tensor


class _Plan(NamedTuple):
    launches: list[_Launch]
    spans: Tensor
    """Of each matrix, over all launches: its first program and their number, int64 (B, 2)."""


def rank_updates_(
    matrices: Sequence[Tensor], coefficients: Tensor, lefts: Sequence[Tensor], rights: Sequence[Tensor]
) -> None:
    rank = coefficients.shape[1]
    coefficients = coefficients.contiguous()
    with tables.on(coefficients.device):
        for launch in _plan(matrices, lefts, rights).launches:
            rank_update_kernel[(len(launch.work),)](
                launch.table,
                launch.work,
                coefficients,
                rank,
                **_constants(launch, TILE if rank == 1 else DOT_TILE),
                RANK=1 if rank == 1 else tables.padded(rank),
            )
    torch.autograd.graph.increment_version(matrices)


def scale_(matrices: Sequence[Tensor], factors: Tensor) -> None:
    factors = factors.contiguous()
    with tables.on(factors.device):
        for launch in _plan(matrices).launches:
            scale_kernel[(len(launch.work),)](launch.table, launch.work, factors, **_constants(launch))
    torch.autograd.graph.increment_version(matrices)


def frobenius_norms(matrices: Sequence[Tensor]) -> Tensor:
    device = matrices[0].device
    plan = _plan(matrices)
    norms = torch.empty(len(matrices), dtype=torch.float32, device=device)
    partials = torch.empty(sum(len(launch.work) for launch in plan.launches), 2, dtype=torch.float32, device=device)
    first = 0
    with tables.on(device):
        for launch in plan.launches:
            part = partials[first : first + len(launch.work)]
            norm_partials_kernel[(len(launch.work),)](launch.table, launch.work, part, **_constants(launch))
            first += len(launch.work)
        norm_sums_kernel[(len(matrices),)](plan.spans, partials, norms, num_warps=4, enable_fp_fusion=True)
    return norms


def _constants(launch: _Launch, tile: Tile = TILE) -> dict[str, object]:
    return {
        "DTYPE": DTYPES[launch.layout.dtype],
        "UNIT": launch.layout.unit,
        "ALIGNED": launch.layout.aligned,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "num_warps": tile.warps,
        "enable_fp_fusion": True,
    }


def _plan(matrices: Sequence[Tensor], lefts: Sequence[Tensor] = (), rights: Sequence[Tensor] = ()) -> _Plan:
    device = matrices[0].device

    def build() -> _Plan:
        launches, spans, first = [], [(0, 0)] * len(matrices), 0
        for layout, members in tables.by_layout(matrices).items():
            rows, counts = [], []
            for i in members:
                row = [*matrix_fields(matrices[i]), i]
                for blocks in (lefts, rights):
                    row += [tables.address(blocks[i]), blocks[i].stride(0)] if blocks else [0, 0]
                rows.append(row)
                m, n = matrices[i].shape
                counts.append((-(-m // TILE.rows), -(-n // CHUNK.value)))
                programs = counts[-1][0] * counts[-1][1]
                spans[i] = (first, programs)
                first += programs
            work = tables.work_list(counts, device)
            if len(work):
                launches.append(_Launch(layout, tables.upload(rows, torch.int64, device), work))
        return _Plan(launches, tables.upload(spans, torch.int64, device))

    return tables.remembered(
        ("updates", *(tables.key_of(tensors) for tensors in (matrices, lefts, rights))), device, build
    )
