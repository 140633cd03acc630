"""Pointer tables and work lists: how one launch serves a list of matrices of different shapes.

A launch reads an int64 table with one row a matrix (address, sizes, strides) and an int32 work list with one row a
program (matrix, strip, chunk). Both are fixed by addresses and shapes alone, never by the number of multiprocessors,
so the same input gives the same bits on every GPU. They are uploaded from pinned memory without waiting, and kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")

KEPT = 256
"""Plans and work lists kept, the least recently used dropped first."""

_plans: OrderedDict[Hashable, object] = OrderedDict()
_lock = Lock()
_captured: list[Tensor] = []


class Layout(NamedTuple):
    """What the compiler may rely on. Matrices of one layout share a launch; vector loads need these facts at compile
    time, for nothing is known of an address that comes out of a table."""

    dtype: torch.dtype
    unit: int
    """1: neighbours in a row are adjacent in memory; 2: neighbours in a column; 0: neither."""
    aligned: bool
    """The address, the other stride and the length along the adjacent direction are multiples of 16 bytes."""


def layout(matrix: Tensor) -> Layout:
    (rows, columns), (row_step, column_step) = matrix.shape, matrix.stride()
    if column_step == 1:
        unit, length, step = 1, columns, row_step
    elif row_step == 1:
        unit, length, step = 2, rows, column_step
    else:
        return Layout(matrix.dtype, 0, False)
    size = matrix.element_size()
    aligned = not (matrix.data_ptr() % 16 or length * size % 16 or step * size % 16)
    return Layout(matrix.dtype, unit, aligned)


def by_layout(matrices: Sequence[Tensor]) -> dict[Layout, list[int]]:
    groups: dict[Layout, list[int]] = {}
    for i, matrix in enumerate(matrices):
        groups.setdefault(layout(matrix), []).append(i)
    return groups


def padded(columns: int) -> int:
    """The power of two, at least 16, that a block of so many columns is computed with."""
    return max(16, 1 << (columns - 1).bit_length())


def pieces(length: int, least: int, most: int) -> tuple[int, int]:
    """Size and number of the pieces that a length is cut into: multiples of ``least``, at most ``most`` of them."""
    size = least * max(1, -(-length // (least * most)))
    return size, -(-length // size)


def address(tensor: Tensor) -> int:
    """Of its first entry, as the int64 of a table: one of 2⁶³ and more, as on Intel GPUs, is negative."""
    pointer = tensor.data_ptr()
    return pointer - (1 << 64) if pointer >> 63 else pointer


def key_of(tensors: Iterable[Tensor]) -> Hashable:
    return tuple((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors)


def remembered(key: Hashable, device: torch.device, build: Callable[[], T]) -> T:
    """``build()``, or what it returned before for the same key on the same device and stream.

    The stream belongs to the key: work on another stream would not wait for the upload. What is built while a graph is
    captured is filled by the graph only, and not kept.
    """
    if device.type == "cpu":
        key = (key, device)
    else:
        if capturing(device):
            return build()
        key = (key, device, torch.get_device_module(device).current_stream(device).stream_id)
    with _lock:
        if key in _plans:
            _plans.move_to_end(key)
            return cast(T, _plans[key])
    plan = build()
    with _lock:
        _plans[key] = plan
        if len(_plans) > KEPT:
            _plans.popitem(last=False)
    return plan


def upload(rows: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host numbers on the device, without waiting for them."""
    host = torch.as_tensor(rows, dtype=dtype, device="cpu")
    if device.type == "cpu":
        return host
    host = host.pin_memory()
    if capturing(device):
        _captured.append(host)  # the graph reads this memory whenever it is replayed
    return host.to(device, non_blocking=True)


def constant(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host numbers as a tensor, uploaded once per set of values. Not to be written to."""
    values = tuple(values)
    return remembered(("constant", values, dtype), device, lambda: upload(values, dtype, device))


def identity(columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Not to be written to."""
    return remembered(("identity", columns, dtype), device, lambda: torch.eye(columns, dtype=dtype, device=device))


def work_list(counts: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """(matrix, strip, chunk) of every program, int32 (P, 3), for so many strips and chunks of each matrix."""

    def build() -> Tensor:
        parts = [np.empty((0, 3), np.int32)]
        for i, (strips, chunks) in enumerate(counts):
            strip, chunk = np.indices((strips, chunks), np.int32).reshape(2, -1)
            parts.append(np.stack([np.full_like(strip, i), strip, chunk], axis=1))
        return upload(np.concatenate(parts), torch.int32, device)

    return remembered(("work", tuple(counts)), device, build)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Makes ``device`` the current one for a launch."""
    if device.type == "cpu":
        return nullcontext()
    return cast(AbstractContextManager[object], torch.get_device_module(device).device(device))


def is_amd(device: torch.device) -> bool:
    """Whether kernels on this device run on an AMD GPU: torch calls it "cuda" too."""
    return device.type == "cuda" and torch.version.hip is not None


def flags(active: Tensor | None) -> Tensor | None:
    """The mask as bytes, which a kernel reads."""
    return None if active is None else active.contiguous().view(torch.uint8)


def capturing(device: torch.device) -> bool:
    """Whether a graph is being captured on the device's current stream."""
    if device.type != "cuda":
        return False
    with on(device):
        return torch.cuda.is_current_stream_capturing()
