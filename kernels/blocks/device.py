"""The operations on skinny blocks in Triton. Blocks are float32 with unit column stride; a program takes a strip of
rows, and sums over rows go through one partial a strip, added in the order of the strips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tables
from ..small.device import SMALLEST

GRAM_FIELDS = tl.constexpr(6)
"""Of a table row: block, n, k, row stride, rows a strip, first partial."""
GRAM_STRIP = 256
GRAM_MOST = tl.constexpr(64)
"""Strips of a block at most."""

MIX_FIELDS = tl.constexpr(13)
"""Of a table row: out, n, k, row stride; then of each of three terms block, columns, row stride."""
MIX_INNER = tl.constexpr(16)

PAIR_FIELDS = tl.constexpr(6)
"""Of a table row: n, k, block, its row stride, the other block, its row stride."""


class Tile(NamedTuple):
    rows: int
    warps: int


GRAM_TILES = {16: Tile(32, 4), 32: Tile(32, 4), 64: Tile(32, 8)}
MIX_TILES = {16: Tile(64, 4), 32: Tile(64, 4), 64: Tile(64, 8)}
RESIDUAL_TILE = Tile(1024, 8)
DOT_TILES = {16: Tile(128, 8), 32: Tile(64, 8), 64: Tile(32, 8)}


@triton.jit
def gram_partials_kernel(table, work, partials, peaks, K: tl.constexpr, ROWS: tl.constexpr):
    """``(X/s)ᵀ(X/s)`` and ``s = max |X|`` of one strip of rows."""
    program = tl.program_id(0)
    entry = table + tl.load(work + program * 3) * GRAM_FIELDS
    block = tl.load(entry).to(tl.pointer_type(tl.float32))
    n = tl.load(entry + 1).to(tl.int32)
    k = tl.load(entry + 2).to(tl.int32)
    step = tl.load(entry + 3)
    size = tl.load(entry + 4).to(tl.int32)
    start = tl.load(work + program * 3 + 1) * size
    stop = tl.minimum(start + size, n)
    row = tl.arange(0, ROWS)
    wide = tl.arange(0, K)
    largest = tl.zeros((ROWS, K), tl.float32)
    for first in range(start, stop, ROWS):
        at = first + row
        x = tl.load(block + at[:, None] * step + wide[None, :], (at < n)[:, None] & (wide < k)[None, :], 0.0)
        largest = tl.maximum(largest, tl.abs(x))
    peak = tl.max(tl.max(largest, 1), 0)  # may pass a NaN by; the sum below does not
    divisor = tl.where(peak == 0, 1.0, peak)
    gram = tl.zeros((K, K), tl.float32)
    for first in range(start, stop, ROWS):
        at = first + row
        x = tl.load(block + at[:, None] * step + wide[None, :], (at < n)[:, None] & (wide < k)[None, :], 0.0) / divisor
        gram = tl.dot(tl.trans(x), x, gram, input_precision="ieee")
    tl.store(peaks + program, peak)
    square = wide[:, None] * K + wide[None, :]
    tl.store(partials + program.to(tl.int64) * (K * K) + square, gram)


@triton.jit
def gram_sums_kernel(table, partials, peaks, gram, scale, width, K: tl.constexpr):
    """``G = Σ_p (s_p/s)² G_p`` with ``s = max_p s_p``, one program a block."""
    b = tl.program_id(0)
    entry = table + b * GRAM_FIELDS
    count = tl.cdiv(tl.load(entry + 1), tl.load(entry + 4)).to(tl.int32)
    first = tl.load(entry + 5)
    slot = tl.arange(0, GRAM_MOST)
    peak = tl.max(tl.load(peaks + first + slot, slot < count, 0.0), 0)
    faint = peak < SMALLEST
    divisor = tl.where(faint, 1.0, peak)
    wide = tl.arange(0, K)
    source = partials + first * (K * K) + wide[:, None] * K + wide[None, :]
    total = tl.zeros((K, K), tl.float32)
    for p in range(count):
        ratio = tl.load(peaks + first + p) / divisor
        total += tl.load(source) * (ratio * ratio)
        source += K * K
    inside = (wide < width)[:, None] & (wide < width)[None, :]
    target = gram + b.to(tl.int64) * width * width + wide[:, None] * width + wide[None, :]
    tl.store(target, total, inside)
    tl.store(scale + b, divisor)


@triton.jit
def add_mixed(total, entry, small, b, height, width, rows, n, k, WIDE: tl.constexpr, K: tl.constexpr):
    """``total + X M`` for one strip of rows, a few columns of ``X`` at a time."""
    block = tl.load(entry).to(tl.pointer_type(tl.float32))
    columns = tl.load(entry + 1).to(tl.int32)
    step = tl.load(entry + 2)
    wide = tl.arange(0, K)
    for first in range(0, WIDE, MIX_INNER):
        inner = first + tl.arange(0, MIX_INNER)
        x = tl.load(
            block + rows[:, None] * step + inner[None, :], (rows < n)[:, None] & (inner < columns)[None, :], 0.0
        )  # [R, I]
        factor = tl.load(
            small + b.to(tl.int64) * height * width + inner[:, None] * width + wide[None, :],
            (inner < columns)[:, None] & (wide < k)[None, :],
            0.0,
        )  # [I, K]
        total = tl.dot(x, factor, total, input_precision="ieee")
    return total


@triton.jit
def mix_kernel(
    table,
    work,
    active,
    small0,
    small1,
    small2,
    height0,
    height1,
    height2,
    width0,
    width1,
    width2,
    WIDE0: tl.constexpr,
    WIDE1: tl.constexpr,
    WIDE2: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``out[strip] = Σ_t X_t[strip] M_t``; ``WIDE_t`` is the padded number of columns of ``X_t``, 0 without a term."""
    task = work + tl.program_id(0) * 3
    b = tl.load(task)
    if active is not None and tl.load(active + b) == 0:
        return
    entry = table + b * MIX_FIELDS
    n = tl.load(entry + 1).to(tl.int32)
    k = tl.load(entry + 2).to(tl.int32)
    rows = tl.load(task + 1) * ROWS + tl.arange(0, ROWS)
    wide = tl.arange(0, K)
    total = tl.zeros((ROWS, K), tl.float32)
    total = add_mixed(total, entry + 4, small0, b, height0, width0, rows, n, k, WIDE0, K)
    if WIDE1 > 0:
        total = add_mixed(total, entry + 7, small1, b, height1, width1, rows, n, k, WIDE1, K)
    if WIDE2 > 0:
        total = add_mixed(total, entry + 10, small2, b, height2, width2, rows, n, k, WIDE2, K)
    out = tl.load(entry).to(tl.pointer_type(tl.float32))
    inside = (rows < n)[:, None] & (wide < k)[None, :]
    tl.store(out + rows[:, None] * tl.load(entry + 3) + wide[None, :], total, inside)


@triton.jit
def column_dot_kernel(table, scales, dots, width, K: tl.constexpr, ROWS: tl.constexpr):
    """``x_i / s · y_i`` of the i-th columns, one program a pair of blocks."""
    b = tl.program_id(0)
    entry = table + b * PAIR_FIELDS
    n = tl.load(entry).to(tl.int32)
    k = tl.load(entry + 1).to(tl.int32)
    x_step, y_step = tl.load(entry + 3), tl.load(entry + 5)
    row, wide = tl.arange(0, ROWS)[:, None], tl.arange(0, K)
    block = tl.load(entry + 2).to(tl.pointer_type(tl.float32)) + row * x_step + wide[None, :]  # [R, K]
    other = tl.load(entry + 4).to(tl.pointer_type(tl.float32)) + row * y_step + wide[None, :]
    scale = tl.load(scales + b)
    sums = tl.zeros((ROWS, K), tl.float32)
    for first in range(0, n, ROWS):
        inside = (first + row < n) & (wide < k)[None, :]
        sums += tl.load(block + first * x_step, inside, 0.0) / scale * tl.load(other + first * y_step, inside, 0.0)
    tl.store(dots + b.to(tl.int64) * width + wide, tl.sum(sums, 0), wide < width)


@triton.jit
def residual_kernel(table, scales, residuals, ROWS: tl.constexpr):
    """``‖x/s − (x/s·y) y‖``, one program a block. The differences are squared, not the squares subtracted: a residual
    of 1e-4 would be lost in their rounding."""
    b = tl.program_id(0)
    entry = table + b * PAIR_FIELDS
    n = tl.load(entry).to(tl.int32)
    x_step, y_step = tl.load(entry + 3), tl.load(entry + 5)
    row = tl.arange(0, ROWS)
    block = tl.load(entry + 2).to(tl.pointer_type(tl.float32)) + row * x_step
    unit = tl.load(entry + 4).to(tl.pointer_type(tl.float32)) + row * y_step
    scale = tl.load(scales + b)
    sums = tl.zeros((ROWS,), tl.float32)
    for first in range(0, n, ROWS):
        inside = first + row < n
        sums += tl.load(block + first * x_step, inside, 0.0) / scale * tl.load(unit + first * y_step, inside, 0.0)
    along = tl.sum(sums, 0)
    sums = tl.zeros((ROWS,), tl.float32)
    for first in range(0, n, ROWS):
        inside = first + row < n
        x = tl.load(block + first * x_step, inside, 0.0) / scale
        difference = x - along * tl.load(unit + first * y_step, inside, 0.0)
        sums += difference * difference
    tl.store(residuals + b, tl.sqrt(tl.sum(sums, 0)))


def grams(blocks: Sequence[Tensor], width: int) -> tuple[Tensor, Tensor]:
    device = blocks[0].device
    table, work = tables.remembered(("grams", tables.key_of(blocks)), device, lambda: _gram_plan(blocks))
    size = tables.padded(width)
    tile, count = GRAM_TILES[size], len(blocks)
    gram, scale, partials, peaks = (
        torch.empty(shape, dtype=torch.float32, device=device)
        for shape in [(count, width, width), (count,), (len(work), size, size), (len(work),)]
    )
    with tables.on(device):
        if len(work):
            gram_partials_kernel[(len(work),)](
                table, work, partials, peaks, K=size, ROWS=tile.rows, num_warps=tile.warps, enable_fp_fusion=True
            )
        gram_sums_kernel[(count,)](
            table, partials, peaks, gram, scale, width, K=size, num_warps=tile.warps, enable_fp_fusion=True
        )
    return gram, scale


def _gram_plan(blocks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    rows, counts, first = [], [], 0
    for block in blocks:
        size, strips = tables.pieces(block.shape[0], GRAM_STRIP, GRAM_MOST.value)
        rows.append((tables.address(block), *block.shape, block.stride(0), size, first))
        counts.append((strips, 1))
        first += strips
    device = blocks[0].device
    return tables.upload(rows, torch.int64, device), tables.work_list(counts, device)


def mixes(terms: Sequence[tuple[Sequence[Tensor], Tensor]], out: Sequence[Tensor], active: Tensor | None) -> None:
    device = out[0].device
    size = tables.padded(max(target.shape[1] for target in out))
    tile = MIX_TILES[size]
    key = ("mixes", tables.key_of(out), *(tables.key_of(blocks) for blocks, _ in terms))
    table, work = tables.remembered(key, device, lambda: _mix_plan(terms, out, tile.rows))
    if not len(work):
        return
    missing = 3 - len(terms)
    small = [factors.contiguous() for _, factors in terms]
    wide = [tables.padded(max(block.shape[1] for block in blocks)) for blocks, _ in terms] + [0] * missing
    with tables.on(device):
        mix_kernel[(len(work),)](
            table,
            work,
            tables.flags(active),
            *small,
            *[None] * missing,
            *(factors.shape[1] for factors in small),
            *[0] * missing,
            *(factors.shape[2] for factors in small),
            *[0] * missing,
            *wide,
            K=size,
            ROWS=tile.rows,
            num_warps=tile.warps,
            enable_fp_fusion=True,
        )


def _mix_plan(
    terms: Sequence[tuple[Sequence[Tensor], Tensor]], out: Sequence[Tensor], strip: int
) -> tuple[Tensor, Tensor]:
    rows = []
    for b, target in enumerate(out):
        row = [tables.address(target), *target.shape, target.stride(0)]
        for blocks, _ in terms:
            row += [tables.address(blocks[b]), blocks[b].shape[1], blocks[b].stride(0)]
        rows.append(row + [0] * (MIX_FIELDS.value - len(row)))
    device = out[0].device
    counts = [(-(-target.shape[0] // strip), 1) for target in out]
    return tables.upload(rows, torch.int64, device), tables.work_list(counts, device)


def column_dots(blocks: Sequence[Tensor], others: Sequence[Tensor], scales: Tensor) -> Tensor:
    device = blocks[0].device
    width = max(block.shape[1] for block in blocks)
    size = tables.padded(width)
    tile = DOT_TILES[size]
    dots = torch.empty(len(blocks), width, dtype=torch.float32, device=device)
    with tables.on(device):
        column_dot_kernel[(len(blocks),)](
            _pair_table(blocks, others),
            scales.contiguous(),
            dots,
            width,
            K=size,
            ROWS=tile.rows,
            num_warps=tile.warps,
            enable_fp_fusion=True,
        )
    return dots


def first_column_residuals(blocks: Sequence[Tensor], units: Sequence[Tensor], scales: Tensor) -> Tensor:
    device = blocks[0].device
    residuals = torch.empty(len(blocks), dtype=torch.float32, device=device)
    with tables.on(device):
        residual_kernel[(len(blocks),)](
            _pair_table(blocks, units),
            scales.contiguous(),
            residuals,
            ROWS=RESIDUAL_TILE.rows,
            num_warps=RESIDUAL_TILE.warps,
            enable_fp_fusion=True,
        )
    return residuals


def _pair_table(blocks: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    def build() -> Tensor:
        pairs = zip(blocks, others, strict=True)
        rows = [(*x.shape, tables.address(x), x.stride(0), tables.address(y), y.stride(0)) for x, y in pairs]
        return tables.upload(rows, torch.int64, blocks[0].device)

    return tables.remembered(("pairs", tables.key_of(blocks), tables.key_of(others)), blocks[0].device, build)
