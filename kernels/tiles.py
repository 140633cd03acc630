"""What the kernels that read matrices share: the first five fields of a table row as pointer, sizes and strides."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tables

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def matrix_fields(matrix: Tensor) -> tuple[int, ...]:
    """Address, rows, columns, row stride, column stride: what :func:`load_matrix` reads."""
    return (tables.address(matrix), *matrix.shape, *matrix.stride())


@triton.jit
def load_matrix(entry, DTYPE: tl.constexpr, UNIT: tl.constexpr, ALIGNED: tl.constexpr):
    """``(pointer, m, n, row stride, column stride)`` with what the layout promises about them.

    The integer becomes a pointer only after the promise is chosen: a hint holds for a value wherever it is used.
    """
    pointer = tl.load(entry).to(tl.pointer_type(DTYPE))
    m = tl.load(entry + 1).to(tl.int32)
    n = tl.load(entry + 2).to(tl.int32)
    row_step = tl.load(entry + 3)
    column_step = tl.load(entry + 4)
    VECTOR: tl.constexpr = 128 // DTYPE.primitive_bitwidth  # elements in 16 bytes
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    if UNIT == 1:
        column_step = tl.full((), 1, tl.int64)
        if ALIGNED:
            row_step = tl.multiple_of(row_step, VECTOR)
            n = tl.multiple_of(n, VECTOR)
    if UNIT == 2:
        row_step = tl.full((), 1, tl.int64)
        if ALIGNED:
            column_step = tl.multiple_of(column_step, VECTOR)
            m = tl.multiple_of(m, VECTOR)
    return pointer, m, n, row_step, column_step


@triton.jit
def rounded(values, DTYPE: tl.constexpr):
    """Float32 values rounded once to ``DTYPE``, to nearest even; a NaN may come back as anything.

    For bfloat16 in integers, the same bits everywhere: Triton's interpreter cuts off instead.
    """
    if DTYPE == tl.bfloat16:  # noqa: SIM300 -- Triton compares a constexpr from the left
        bits = values.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return values.to(DTYPE)
