"""The skinny products in Triton: one program reads a strip of rows and, of a long matrix, a chunk of its columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tables
from ..tiles import DTYPES, load_matrix, matrix_fields

FIELDS = tl.constexpr(13)
"""Of a table row: the matrix's five, block, k, its row stride, out, its row stride, index in ``active``, columns a
chunk, first partial (-1: the matrix is one chunk, and its program writes ``out`` itself)."""

CHUNK = 2048
MOST_CHUNKS = 32


class Tile(NamedTuple):
    rows: int
    columns: int
    warps: int


TILES = {16: Tile(64, 64, 4), 32: Tile(64, 32, 4), 64: Tile(64, 16, 8)}
"""For each padded number of columns: what is on chip at once, and no register spills."""


@triton.jit
def product_kernel(
    table,
    work,
    active,
    partials,
    DTYPE: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``Y[strip] = W[strip, chunk] B[chunk]``, into ``out`` or, where there are several chunks, into a partial.

    ``EVEN``: blocks are aligned to 16 bytes, so are their rows, and k is a multiple of 4.
    """
    task = work + tl.program_id(0) * 3
    entry = table + tl.load(task) * FIELDS
    if active is not None and tl.load(active + tl.load(entry + 10)) == 0:
        return
    pointer, m, n, row_step, column_step = load_matrix(entry, DTYPE, UNIT, ALIGNED)
    block = tl.load(entry + 5).to(tl.pointer_type(tl.float32))
    k = tl.load(entry + 6).to(tl.int32)
    block_step = tl.load(entry + 7)
    if EVEN:
        block = tl.multiple_of(block, 16)
        k = tl.multiple_of(k, 4)
        block_step = tl.multiple_of(block_step, 4)
    chunk = tl.load(task + 2)
    size = tl.multiple_of(tl.load(entry + 11).to(tl.int32), COLUMNS)
    start = chunk * size
    rows = tl.load(task + 1) * ROWS + tl.arange(0, ROWS)
    wide = tl.arange(0, K)  # [K]
    inner = tl.arange(0, COLUMNS)  # [C]
    row_origins = pointer + rows[:, None] * row_step  # [R, 1]
    total = tl.zeros((ROWS, K), tl.float32)
    for first in range(start, tl.minimum(start + size, n), COLUMNS):
        at = first + inner
        w = tl.load(row_origins + at[None, :] * column_step, (rows < m)[:, None] & (at < n)[None, :], 0.0)  # [R, C]
        b = tl.load(block + at[:, None] * block_step + wide[None, :], (at < n)[:, None] & (wide < k)[None, :], 0.0)
        total = tl.dot(w.to(tl.float32), b, total, input_precision="ieee")  # [R, K]
    inside = (rows < m)[:, None] & (wide < k)[None, :]
    first_partial = tl.load(entry + 12)
    if first_partial < 0:
        out = tl.load(entry + 8).to(tl.pointer_type(tl.float32))
        tl.store(out + rows[:, None] * tl.load(entry + 9) + wide[None, :], total, inside)
    else:
        row = first_partial + chunk.to(tl.int64) * m + rows
        tl.store(partials + row[:, None] * K + wide[None, :], total, inside)


@triton.jit
def sum_chunks_kernel(table, work, active, partials, K: tl.constexpr, ROWS: tl.constexpr):
    """``Y[strip] = Σ_chunks partial[chunk, strip]``, in the order of the chunks."""
    task = work + tl.program_id(0) * 3
    entry = table + tl.load(task) * FIELDS
    if active is not None and tl.load(active + tl.load(entry + 10)) == 0:
        return
    m = tl.load(entry + 1).to(tl.int32)
    n = tl.load(entry + 2).to(tl.int32)
    k = tl.load(entry + 6).to(tl.int32)
    rows = tl.load(task + 1) * ROWS + tl.arange(0, ROWS)
    wide = tl.arange(0, K)
    inside = (rows < m)[:, None] & (wide < k)[None, :]
    source = partials + (tl.load(entry + 12) + rows)[:, None] * K + wide[None, :]  # [R, K]
    total = tl.zeros((ROWS, K), tl.float32)
    for _ in range(tl.cdiv(n, tl.load(entry + 11).to(tl.int32))):
        total += tl.load(source, inside, 0.0)
        source += m.to(tl.int64) * K
    out = tl.load(entry + 8).to(tl.pointer_type(tl.float32))
    tl.store(out + rows[:, None] * tl.load(entry + 9) + wide[None, :], total, inside)


class _Launch(NamedTuple):
    """The matrices of one layout."""

    layout: tables.Layout
    even: bool
    table: Tensor
    work: Tensor
    split: Tensor
    """The work list of :func:`sum_chunks_kernel`: strips of matrices of several chunks."""


class _Plan(NamedTuple):
    width: int
    launches: list[_Launch]
    partial_rows: int


def skinny_products(
    matrices: Sequence[Tensor], blocks: Sequence[Tensor], out: Sequence[Tensor], active: Tensor | None
) -> None:
    device = blocks[0].device
    key = ("products", tables.key_of(matrices), tables.key_of(blocks), tables.key_of(out))
    plan = tables.remembered(key, device, lambda: _plan(matrices, blocks, out))
    tile, mask = TILES[plan.width], tables.flags(active)
    partials = torch.empty(plan.partial_rows, plan.width, dtype=torch.float32, device=device)
    with tables.on(device):
        for launch in plan.launches:
            product_kernel[(len(launch.work),)](
                launch.table,
                launch.work,
                mask,
                partials,
                DTYPE=DTYPES[launch.layout.dtype],
                UNIT=launch.layout.unit,
                ALIGNED=launch.layout.aligned,
                EVEN=launch.even,
                K=plan.width,
                ROWS=tile.rows,
                COLUMNS=tile.columns,
                num_warps=tile.warps,
                enable_fp_fusion=True,
            )
            if len(launch.split):
                sum_chunks_kernel[(len(launch.split),)](
                    launch.table,
                    launch.split,
                    mask,
                    partials,
                    K=plan.width,
                    ROWS=tile.rows,
                    num_warps=tile.warps,
                    enable_fp_fusion=True,
                )


def _plan(matrices: Sequence[Tensor], blocks: Sequence[Tensor], out: Sequence[Tensor]) -> _Plan:
    device = blocks[0].device
    width = tables.padded(max(block.shape[1] for block in blocks))
    tile, launches, partial_rows = TILES[width], [], 0
    for layout, members in tables.by_layout(matrices).items():
        rows, counts, splits = [], [], []
        for i in members:
            matrix, block = matrices[i], blocks[i]
            size, chunks = tables.pieces(matrix.shape[1], CHUNK, MOST_CHUNKS)
            strips, split = -(-matrix.shape[0] // tile.rows), chunks > 1
            target = (tables.address(out[i]), out[i].stride(0), i, size, partial_rows if split else -1)
            rows.append((*matrix_fields(matrix), tables.address(block), block.shape[1], block.stride(0), *target))
            counts.append((strips, max(chunks, 1)))  # without columns the sum is zero, and has to be written
            splits.append((strips if split else 0, 1))
            partial_rows += chunks * matrix.shape[0] if split else 0
        if any(strips for strips, _ in counts):
            work, split_work = tables.work_list(counts, device), tables.work_list(splits, device)
            table = tables.upload(rows, torch.int64, device)
            launches.append(_Launch(layout, all(_even(blocks[i]) for i in members), table, work, split_work))
    return _Plan(width, launches, partial_rows)


def _even(block: Tensor) -> bool:
    return not (block.data_ptr() % 16 or block.shape[1] % 4 or block.stride(0) % 4)
