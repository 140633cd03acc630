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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import models, reporting
from benchmarks.counter import TOGETHER, WINDOW, Traffic, measure

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
    parser.add_argument("--out", type=Path, default=reporting.OUT, help="folder of JSON file and plot")
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
