"""Every access of every launch, written down: Triton's interpreter is watched while it runs the real kernels, and torch
between them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.chip import SECTOR, Launch, moved, sectors_of

WINDOW = 24_000_000
TOGETHER = 132
PIECE = 32 * 1024
"""Bytes of one argument that an operation of torch takes at a time."""


class Row(NamedTuple):
    """One launch, all in bytes."""

    name: str
    programs: int
    read: int
    written: int
    accesses: int

    @property
    def memory(self) -> int:
        return self.read + self.written


@dataclass(frozen=True)
class Traffic:
    """What a step moved, launch by launch, in bytes."""

    rows: tuple[Row, ...]
    window: int
    together: int

    @property
    def read(self) -> int:
        return sum(row.read for row in self.rows)

    @property
    def written(self) -> int:
        return sum(row.written for row in self.rows)

    @property
    def memory(self) -> int:
        return self.read + self.written

    @property
    def accesses(self) -> int:
        return sum(row.accesses for row in self.rows)

    @property
    def launches(self) -> list[str]:
        """Names in order: kernels, and operations of torch as ``aten::...``."""
        return [row.name for row in self.rows]

    @property
    def kernels(self) -> list[str]:
        return [name for name in self.launches if not name.startswith("aten::")]

    def table(self) -> str:
        """A line for each launch; neighbours that launch the same, or are of torch, are added up."""
        lines = [f"{'launch':34} {'times':>5} {'programs':>8} {'read':>9} {'written':>9} {'accesses':>9}   in MB"]
        for times, row in [*_grouped(self.rows), (len(self.rows), self._total())]:
            figures = " ".join(f"{value / 1e6:9.3f}" for value in (row.read, row.written, row.accesses))
            lines.append(f"{row.name[:34]:34} {times:5} {row.programs:8} {figures}")
        return "\n".join(lines)

    def _total(self) -> Row:
        return Row("all", sum(row.programs for row in self.rows), self.read, self.written, self.accesses)

    def to_json(self) -> dict[str, Any]:
        return {
            "unit": "bytes",
            "window": self.window,
            "together": self.together,
            "memory": self.memory,
            "read": self.read,
            "written": self.written,
            "accesses": self.accesses,
            "launches": len(self.rows),
            "kernels": len(self.kernels),
            "rows": [{"times": times, **row._asdict()} for times, row in _grouped(self.rows)],
        }


def _grouped(rows: Sequence[Row]) -> list[tuple[int, Row]]:
    groups: list[tuple[int, Row]] = []
    for row in rows:
        times, last = groups[-1] if groups else (0, row)
        row = row._replace(name="operations of torch") if row.name.startswith("aten::") else row
        if times and last.name == row.name:
            groups[-1] = times + 1, Row(row.name, *(a + b for a, b in zip(last[1:], row[1:], strict=True)))
        else:
            groups.append((1, row))
    return groups


def measure(step: Callable[[], object], *, window: int = WINDOW, together: int = TOGETHER) -> Traffic:
    """What ``step()`` moves. In a process that was started with ``TRITON_INTERPRET=1``."""
    with Counter(window=window, together=together) as counter:
        step()
    return counter.traffic()


class Counter:
    """Within ``with Counter() as counter:`` every access of every launch is recorded; :meth:`traffic` counts it."""

    def __init__(self, *, window: int = WINDOW, together: int = TOGETHER) -> None:
        self.window, self.together = window, together
        self.launches: list[Launch] = []
        self._open: Launch | None = None
        self._undo: list[tuple[Any, str, Any]] = []
        self._torch = _Operations(self)

    def __enter__(self) -> Counter:
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError("counting traffic needs TRITON_INTERPRET=1 in the environment before triton is imported")
        from triton.runtime import interpreter

        builder = interpreter.InterpreterBuilder
        self._wrap(interpreter.GridExecutor, "__call__", self._launch)
        self._wrap(builder, "set_grid_idx", self._program)
        self._wrap(builder, "create_masked_load", self._load)
        self._wrap(builder, "create_masked_store", self._store)
        self._wrap(builder, "create_atomic_rmw", self._exchange)
        self._wrap(builder, "create_atomic_cas", self._compare)
        self._torch.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._torch.__exit__(kind, error, trace)
        while self._undo:
            setattr(*self._undo.pop())

    def _wrap(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        self._undo.append((owner, name, original))
        setattr(owner, name, lambda *args, **kwargs: wrapper(original, *args, **kwargs))

    def _launch(self, original: Any, grid: Any, *args: Any, **kwargs: Any) -> Any:
        self._open = Launch(grid.fn.__name__)
        try:
            return original(grid, *args, **kwargs)
        finally:
            self._open.close(self.together)
            self.launches.append(self._open)
            self._open = None

    def _program(self, original: Any, builder: Any, x: int, y: int, z: int) -> Any:
        if self._open is not None:
            wide, high, _ = builder.grid_dim
            self._open.program(x + wide * (y + high * z))  # in the order in which a GPU starts them
        return original(builder, x, y, z)

    def _load(self, original: Any, builder: Any, pointers: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        self._access(pointers, mask, write=False)
        return original(builder, pointers, mask, *args, **kwargs)

    def _store(self, original: Any, builder: Any, pointers: Any, value: Any, mask: Any, *args: Any, **kw: Any) -> Any:
        self._access(pointers, mask, write=True)
        return original(builder, pointers, value, mask, *args, **kw)

    def _exchange(self, original: Any, builder: Any, op: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        for write in (False, True):
            self._access(pointers, mask, write)
        return original(builder, op, pointers, value, mask, *args)

    def _compare(self, original: Any, builder: Any, pointers: Any, *args: Any) -> Any:
        for write in (False, True):
            self._access(pointers, None, write)
        return original(builder, pointers, *args)

    def _access(self, pointers: Any, mask: Any, write: bool) -> None:
        if self._open is None:
            return
        addresses, size = pointers.data, max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        inside = None if mask is None else np.broadcast_to(mask.data, addresses.shape)
        if addresses.ndim == 2 and min(addresses.shape) > 1:
            down, right = (int(addresses[at]) - int(addresses[0, 0]) for at in ((1, 0), (0, 1)))
            if abs(down) < abs(right):  # neighbours next to each other are quicker to take together
                addresses, inside = addresses.T, None if inside is None else inside.T
        flat = addresses.ravel() if inside is None or inside.all() else addresses[inside]
        if flat.size:
            self._open.add(*sectors_of(flat.astype(np.int64), size, write), flat.size * size)

    def traffic(self) -> Traffic:
        read, written = moved(self.launches, self.window // SECTOR)
        rows = [
            Row(launch.name, launch.programs, SECTOR * int(r), SECTOR * int(w), launch.accesses)
            for launch, r, w in zip(self.launches, read, written, strict=True)
        ]
        return Traffic(tuple(rows), self.window, self.together)


class _Operations(TorchDispatchMode):
    """Records what torch is asked to do between launches: not views, and not bare allocations."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.counter._open is not None or "empty" in func._schema.name:  # the interpreter's own, within a launch
            return result
        values = zip(func._schema.arguments, args, strict=False)
        named = [*values, *((a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs)]
        read, changed = [], []
        for argument, value in named:
            tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
            writes = argument.alias_info is not None and argument.alias_info.is_write
            changed += tensors if writes else []
            read += [] if writes and (argument.is_out or _overwrites(func)) else tensors
        known = {t.untyped_storage().data_ptr() for t in [*read, *changed]}
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        changed += [t for t in results if t.untyped_storage().data_ptr() not in known]
        if changed or not results:
            self._record(func._schema.name, [t for t in read if t.numel()], [t for t in changed if t.numel()])
        return result

    def _record(self, name: str, read: list[Tensor], written: list[Tensor]) -> None:
        operands = [(t, write) for write, tensors in ((False, read), (True, written)) for t in tensors]
        operands = [(t, write) for t, write in operands if t.device.type == "cpu" and t.layout == torch.strided]
        if all(t.ndim == 0 for t, _ in operands):  # AdamW's counts of steps, which torch keeps on the host
            return
        launch = Launch(name)
        streams = [list(_pieces(t, write)) for t, write in operands]
        for piece in range(max(map(len, streams))):
            launch.program(piece)
            for (tensor, _), stream in zip(operands, streams, strict=True):
                if piece < len(stream):
                    last = piece == len(stream) - 1
                    size = tensor.numel() * tensor.element_size()
                    done = size * piece // len(stream)
                    launch.add(*stream[piece], (size if last else size * (piece + 1) // len(stream)) - done)
        launch.close(self.counter.together)
        self.counter.launches.append(launch)


def _overwrites(func: Any) -> bool:
    return func._schema.name.split("::")[-1] in ("copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_")


def _pieces(tensor: Tensor, write: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The sectors of a tensor in order of address, so many at a time."""
    size, start = tensor.element_size(), tensor.data_ptr()
    step = min(size, 8)  # 16: complex, of two words
    if _dense(tensor):
        words = np.arange(start, start + tensor.numel() * size, step)
    else:
        words = np.arange(start, start + size, step)
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
            words = (words[:, None] + np.arange(length) * (stride * size)).ravel()
    sectors, masks = sectors_of(words, step, write)
    for at in range(0, len(sectors), PIECE // SECTOR):
        piece = slice(at, at + PIECE // SECTOR)
        yield sectors[piece], masks[piece]


def _dense(tensor: Tensor) -> bool:
    """Without gaps and overlaps, in whatever order of dimensions."""
    expected = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True
