"""Bytes that a step moves, counted: the real Triton kernels run in Triton's interpreter, and every load and store is
written down. Needs no GPU, and the same step gives the same figures.

    python -m benchmarks.run traffic --workload mlp --optimizer NormScaleAdamW

Two figures for each launch:

``memory``    what memory must move. A cache line is a sector of 32 bytes; a step begins with nothing on chip. A sector
              stays on chip until more than 24 MB of other accesses have passed since its last use (half of the L2 of an
              H100; sectors touched, hits included, so it is a stricter rule than "least recently used"). An access to a
              sector that is not on chip begins a *stay*. A stay costs one read, unless it begins with writes that cover
              the sector whole before anything reads it; and one write at its end if anything was written, however
              often. The window goes on from launch to launch. Reads are put down to the launch that began the stay,
              writes to the first launch in it that wrote.
``accesses``  all bytes of all loads and stores (of lanes that are not masked out), whatever is on chip; an atomic is a
              load and a store.

132 programs run at a time, one for each multiprocessor: 132 consecutive programs take turns, one load or store
instruction each, and the next 132 follow. (On a GPU they do not wait for each other; nor do they keep in step.)

Operations of torch in the step count as launches too, under their ``aten::`` names, as if each read its arguments once
and wrote its results once, in pieces of 32 KB: what is not in a kernel shows. Tensors without dimensions do not count:
those of a step are AdamW's counts of steps, which stay on the host beside a GPU. What temporary tensors cost depends on
where the allocator puts them; kernels on tables of kept tensors do not have that doubt.

``--scale s`` takes s times the data where the interpreter is too slow: widths are multiplied by √s, and strips and
chunks stay as they are. The number of programs, and the bytes that pass between two uses of a weight, then shrink with
the data; so the window and the 132 are multiplied by the same factor (the ratio of the parameters). Then a weight is
still on chip in the second pass, or not, as it would be, and a wave of programs is still the same share of the launch.
Small arrays shrink only by √s and are a larger share of the scaled step; the goal counts them at their scaled size.
Not below about 0.1: the few programs left then read the small arrays anew for too small a share of the weights.
"""

from __future__ import annotations

import argparse
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import models, reporting

SECTOR = 32
"""Bytes that memory moves at least."""
FULL = np.uint32(0xFFFFFFFF)
"""The mask of a sector with all its bytes written."""
WINDOW = 24_000_000
TOGETHER = 132
PIECE = 32 * 1024
"""Bytes of one argument that an operation of torch takes at a time."""
PART = 1 << 22
"""Accesses that are sorted at a time, about."""


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
        self.launches: list[_Launch] = []
        self._open: _Launch | None = None
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

    # --- the interpreter -----------------------------------------------------------------------------------------

    def _launch(self, original: Any, grid: Any, *args: Any, **kwargs: Any) -> Any:
        self._open = _Launch(grid.fn.__name__)
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
            self._open.add(*_sectors(flat.astype(np.int64), size, write), flat.size * size)

    # --- counting ------------------------------------------------------------------------------------------------

    def traffic(self) -> Traffic:
        read, written = _moved(self.launches, self.window // SECTOR)
        rows = [
            Row(launch.name, launch.programs, SECTOR * int(r), SECTOR * int(w), launch.accesses)
            for launch, r, w in zip(self.launches, read, written, strict=True)
        ]
        return Traffic(tuple(rows), self.window, self.together)


class _Launch:
    """The accesses of one launch: for each instruction of each program the sectors that it touched, and the bytes of
    them that it wrote as a mask (0: read)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.programs = self.accesses = 0
        self._program = self._turn = 0
        self._places: list[tuple[int, int]] = []
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []

    def program(self, index: int) -> None:
        self._program, self._turn = index, 0
        self.programs += 1

    def add(self, sectors: np.ndarray, masks: np.ndarray, size: int) -> None:
        self._places.append((self._program, self._turn))
        self._parts.append((sectors, masks))
        self._turn += 1
        self.accesses += size

    def close(self, together: int) -> None:
        """Puts the accesses into the order in which ``together`` programs at a time make them."""
        program, turn = np.array(self._places, np.int64).reshape(-1, 2).T
        order = np.lexsort((program, turn, program // together))
        none = np.empty(0, np.int64), np.empty(0, np.uint32)
        sectors, masks = zip(none, *(self._parts[i] for i in order), strict=True)
        self.sectors, self.masks = np.concatenate(sectors), np.concatenate(masks)
        del self._places, self._parts


def _sectors(addresses: np.ndarray, size: int, write: bool) -> tuple[np.ndarray, np.ndarray]:
    """The sectors that elements lie in, ascending, and the bytes of each that are written."""
    if (addresses & (size - 1)).any():
        raise ValueError(f"an access of {size} bytes at an address that is not a multiple of {size}")
    sectors = addresses >> 5
    masks = np.zeros(1, np.uint32)
    if write:
        masks = np.uint32((1 << size) - 1) << (addresses & (SECTOR - 1)).astype(np.uint32)
    sectors, masks = _merged(sectors, masks)
    if (sectors[1:] < sectors[:-1]).any():
        order = np.argsort(sectors, kind="stable")
        sectors, masks = _merged(sectors[order], masks[order])
    return sectors, masks


def _merged(sectors: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours in the same sector made one. A single mask stands for reads."""
    first = np.flatnonzero(np.concatenate([[True], sectors[1:] != sectors[:-1]]))
    if not masks[0]:
        return sectors[first], np.zeros(len(first), np.uint32)
    return sectors[first], np.bitwise_or.reduceat(masks, first)


def _moved(launches: Sequence[_Launch], window: int) -> tuple[np.ndarray, np.ndarray]:
    """Sectors read from memory and written to it, for each launch."""
    none = np.empty(0, np.int64), np.empty(0, np.uint32)
    sectors = np.concatenate([none[0], *(launch.sectors for launch in launches)])
    masks = np.concatenate([none[1], *(launch.masks for launch in launches)])
    starts = np.cumsum([0, *(len(launch.sectors) for launch in launches)])
    read, written = (np.zeros(len(launches), np.int64) for _ in range(2))
    parts = -(-len(sectors) // PART)  # a sector's fate depends on its own accesses and the clock alone
    for part in range(parts):
        times = np.flatnonzero(sectors % parts == part) if parts > 1 else np.arange(len(sectors))
        began, fetched, wrote = _stays(sectors[times], masks[times], times, window)
        for counts, at in ((read, began[fetched]), (written, wrote)):
            counts += np.bincount(np.searchsorted(starts, at, side="right") - 1, minlength=len(launches))
    return read, written


def _stays(
    sectors: np.ndarray, masks: np.ndarray, times: np.ndarray, window: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For accesses in order of time: when each stay began, whether its sector had to be read, and for each stay with a
    write the time of the first."""
    order = np.argsort(sectors, kind="stable")
    sectors, masks, times = sectors[order], masks[order], times[order]
    gap = np.diff(times, prepend=0) - 1
    first = np.flatnonzero((np.diff(sectors, prepend=-1) != 0) | (gap > window))
    if not len(first):
        return times, np.empty(0, np.bool_), times
    stay = np.repeat(np.arange(len(first)), np.diff(first, append=len(sectors)))
    never, writes = np.iinfo(np.int64).max, masks != 0
    place = np.arange(len(sectors))
    first_read = np.minimum.reduceat(np.where(writes, never, place), first)
    before = np.bitwise_or.reduceat(np.where(place < first_read[stay], masks, np.uint32(0)), first)
    first_write = np.minimum.reduceat(np.where(writes, times, never), first)
    return times[first], before != FULL, first_write[first_write != never]


# --- operations of torch -------------------------------------------------------------------------------------------


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
        launch = _Launch(name)
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
    sectors, masks = _sectors(words, step, write)
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


# --- the goal ------------------------------------------------------------------------------------------------------

BYTES = {"SNRSGD": 20, "NormScaleAdamW": 36}
"""For a float32 parameter. SNRSGD: read p, g, buf; write p, buf. NormScaleAdamW: read p, g and two moments, write p and
the moments (28); then the correction and the second half product read and write p (8)."""
CONDITIONAL = 8
"""One more pair of products reads p twice."""
SMALL_ARRAYS = ("V", "U", "Y", "Z", "followers")


class Budget(NamedTuple):
    """Bytes that a step may move."""

    streams: int
    small: int

    @property
    def total(self) -> int:
        return self.streams + self.small


def budget(shapes: Sequence[tuple[int, int]], k: int, kind: str, *, conditional: bool = False) -> Budget:
    """The goal for matrices (m, n) with a block of k columns: 20 or 36 bytes a parameter, and ``4 k (m + n)`` for each
    of V, U, Y, Z and the followers (k at most m and n).

    V and Z have n rows, U and Y have m: written once and read once they are ``8 k n`` or ``8 k m`` bytes, so
    ``4 k (m + n)`` is what one of the four comes to on average.
    """
    each = BYTES[kind] + CONDITIONAL * conditional
    small = sum(4 * min(k, m, n) * (m + n) for m, n in shapes)
    return Budget(each * sum(m * n for m, n in shapes), len(SMALL_ARRAYS) * small)


# --- workloads -----------------------------------------------------------------------------------------------------

WORKLOADS: dict[str, Callable[[], nn.Module]] = {
    "mlp": partial(models.mlp, 2000, 5),
    "resnet50": models.resnet50,
    "gpt2": partial(models.gpt2, 1600, 1),
}
"""MLP 3072 - 4 x 2000 - 100, the 54 matrices of ResNet-50, a block of GPT-2 XL."""
CHANNELS, EVEN = 3, 8
"""Inputs that are not scaled, the colours of an image; scaled widths are multiples of 8."""


def shapes(workload: str, scale: float = 1.0) -> list[tuple[int, ...]]:
    """Of the weights of linear and conv layers, each width times √scale."""

    def wide(width: int) -> int:
        return width if scale == 1 or width <= CHANNELS else max(EVEN, EVEN * round(width * math.sqrt(scale) / EVEN))

    with torch.device("meta"):
        layers = [layer for layer in WORKLOADS[workload]().modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    return [(*map(wide, layer.weight.shape[:2]), *layer.weight.shape[2:]) for layer in layers]


def _size(found: Sequence[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in found)


ENOUGH, NEVER_ENOUGH = 1e3, 1e-9
"""Tolerances with which no matrix takes the conditional pair, and with which all do."""


class Count(NamedTuple):
    """One warm step of one optimizer on one workload."""

    workload: str
    optimizer: str
    scale: float
    """Parameters here over parameters of the workload."""
    parameters: int
    block: int
    conditional: bool
    goal: Budget
    traffic: Traffic

    @property
    def over(self) -> float:
        """Memory traffic over the goal."""
        return self.traffic.memory / self.goal.total

    @property
    def accessed(self) -> float:
        """All accesses over the goal."""
        return self.traffic.accesses / self.goal.total

    def row(self) -> dict[str, Any]:
        """For the table."""
        traffic, each = self.traffic, self.parameters
        return {
            "workload": f"{self.workload} x {self.scale:.3g}" if self.scale != 1 else self.workload,
            "optimizer": self.optimizer,
            "parameters": each,
            "launches": len(traffic.rows),
            "kernels": len(traffic.kernels),
            "memory": traffic.memory / each,
            "goal": self.goal.total / each,
            "accesses": traffic.accesses / each,
            "memory_over_goal": self.over,
            "accesses_over_goal": self.accessed,
        }

    def to_json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self._fields[:-2]}
        goal = {"streams": self.goal.streams, "small": self.goal.small}
        return {**fields, "goal": goal, "traffic": self.traffic.to_json()}


COLUMNS = {
    "workload": "workload",
    "optimizer": "optimizer",
    "parameters": "parameters",
    "launches": "launches",
    "kernels": "of them Triton",
    "memory": "memory, B/param",
    "goal": "goal, B/param",
    "accesses": "accesses, B/param",
    "memory_over_goal": "memory / goal",
    "accesses_over_goal": "accesses / goal",
}
NOTES = (
    "Counted in Triton's interpreter, not timed: sectors of 32 bytes, 132 programs that take turns, what was used in "
    "the last 24 MB of accesses is on chip.",
    "Goal: 20 (SNRSGD) or 36 (NormScaleAdamW) bytes a float32 parameter and the small arrays; memory at most 1.02 and "
    "all accesses at most 1.15 of it.",
)
SCALED_NOTE = "Scaled workloads: 24 MB and 132 are multiplied by the same factor as the parameters."


def count_step(workload: str, optimizer: str, *, scale: float = 1.0, conditional: bool = False, warm: int = 1) -> Count:
    """One step on seeded weights and gradients past the cold phase, after ``warm`` steps of the same kind that are not
    counted (they leave what a step finds from the one before). The cold steps run on the torch reference."""
    import specopt
    from specopt.tracker.common import COLD_STEPS, STATS, STEP, Stat

    chosen = shapes(workload, scale)
    parameters, whole = _size(chosen), _size(shapes(workload))
    generator = torch.Generator().manual_seed(0)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    params = [(normal(s) / math.sqrt(math.prod(s[1:]))).requires_grad_() for s in chosen]
    tolerance = NEVER_ENOUGH if conditional else ENOUGH
    made: Any = {
        "SNRSGD": lambda: specopt.SNRSGD(params, lr=1e-3, momentum=0.9, tolerance=tolerance),
        "NormScaleAdamW": lambda: specopt.NormScaleAdamW(params, lr=1e-3, tolerance=tolerance),
    }[optimizer]()
    for param in params:
        param.grad = normal(tuple(param.shape)) / math.sqrt(param.numel())

    def step() -> None:
        made.step()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the first step moves")
        with backend("reference"):
            for _ in range(2):
                step()
        for param in params:
            made.state[param][STEP] += COLD_STEPS
            made.state[param][STATS][Stat.COUNT] += COLD_STEPS
        ratio = parameters / whole
        with backend("triton"):
            for _ in range(warm):
                step()
            traffic = measure(step, window=round(WINDOW * ratio), together=max(1, round(TOGETHER * ratio)))
    block = int(made.param_groups[0]["block"])
    goal = budget([(s[0], math.prod(s[1:])) for s in chosen], block, optimizer, conditional=conditional)
    return Count(workload, optimizer, ratio, parameters, block, conditional, goal, traffic)


@contextmanager
def backend(name: str) -> Iterator[None]:
    before = os.environ.get("SPECOPT_BACKEND")
    os.environ["SPECOPT_BACKEND"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["SPECOPT_BACKEND"]
        else:
            os.environ["SPECOPT_BACKEND"] = before


# --- command line --------------------------------------------------------------------------------------------------


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "traffic",
        help="bytes moved in a step, counted in the interpreter",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workload", choices=WORKLOADS, action="append", help="default: all")
    parser.add_argument("--optimizer", choices=BYTES, action="append", help="default: both")
    parser.add_argument("--scale", type=float, default=1.0, help="of the data; default: all of it")
    parser.add_argument("--conditional", action="store_true", help="with the conditional pair in every matrix")
    parser.add_argument("--rows", action="store_true", help="print every launch")
    parser.add_argument("--out", type=Path, default=reporting.RESULTS, help="folder of the JSON file and the plot")
    parser.set_defaults(main=main)
    return parser


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prints the table, writes ``traffic.json`` and a plot, and returns what is in the file. In a process that was
    started with ``TRITON_INTERPRET=1``."""
    counts = []
    for workload in arguments.workload or WORKLOADS:
        for optimizer in arguments.optimizer or BYTES:
            counts.append(count_step(workload, optimizer, scale=arguments.scale, conditional=arguments.conditional))
            if arguments.rows:
                print(f"{workload}, {optimizer}\n{counts[-1].traffic.table()}\n", flush=True)
    rows = [count.row() for count in counts]
    report = {
        **reporting.about("traffic", torch.device("cpu")),
        "title": "Bytes that a warm step moves" + (", with the conditional pair" if arguments.conditional else ""),
        "columns": COLUMNS,
        "results": rows,
        "notes": NOTES if arguments.scale == 1 else (*NOTES, SCALED_NOTE),
        "steps": [count.to_json() for count in counts],
    }
    names = [f"{row['workload']}, {row['optimizer']}" for row in rows]
    bars = {
        "title": report["title"],
        "label": "bytes from and to memory, a parameter",
        "values": {name: row["memory"] for name, row in zip(names, rows, strict=True)},
        "goals": {name: row["goal"] for name, row in zip(names, rows, strict=True)},
    }
    reporting.publish(report, "traffic", arguments.out, bars)
    return report
