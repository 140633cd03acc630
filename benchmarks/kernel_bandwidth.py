"""Bandwidth of every kernel beside a copy of memory on the same device, by shape.

    python -m benchmarks.run kernels

What a kernel has to move, over its time, over the bandwidth of a large copy. Without a GPU the kernels are not
measured; then the torch reference is, on the CPU, and the table says so.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specopt import kernels

from . import models, reporting
from .timing import Stopwatch, Work, repeated

Shape = tuple[int, int]

PASSES = (
    ("product W V", "NONE", "LEFT"),
    ("product Wᵀ U", "NONE", "RIGHT"),
    ("SGD", "SGD", "NOTHING"),
    ("SGD and W V", "SGD", "LEFT"),
    ("SGD and Wᵀ U", "SGD", "RIGHT"),
    ("AdamW", "ADAMW", "NOTHING"),
    ("AdamW and W V", "ADAMW", "LEFT"),
    ("correction", "CORRECT", "NOTHING"),
    ("correction and Wᵀ U", "CORRECT", "RIGHT"),
)
SOLVES = (
    ("Ritz", "RITZ", 0),
    ("Ritz, vectors", "RITZ", 1),
    ("next basis", "BASIS", 0),
    ("turn", "TURN", 0),
    ("turn, candidates", "TURN", 1),
    ("turn, orthonormal", "TURN", 2),
)
"""What it is called, and kind and stage."""
NO_GPU = f"{reporting.NOT_MEASURED}: no GPU"
COPIED = 1 << 30
"""Bytes of the copy's source; a fourth of it on a CPU."""


class Case(NamedTuple):
    """A launch, and the bytes it has to move (0: its time does not go by bytes)."""

    name: str
    work: Work
    bytes: int = 0


def shapes() -> dict[str, list[Shape]]:
    lists: dict[str, list[Shape]] = {f"{n} x {n}": [(n, n)] for n in (768, 2000, 4000)}
    lists["MLP 5 x 2000"] = models.shapes(lambda: models.mlp(2000, 5))[0]
    lists["ResNet-50"] = models.shapes(models.resnet50)[0]
    return lists


def pass_cases(matrices: Sequence[Shape], block: int, device: torch.device) -> Iterator[Case]:
    """Every pass on the list, one launch each; products of SGD follow by halves, the others by pairs."""
    from .device_bucket import NoiseBucket

    for halves in (True, False):
        bucket = NoiseBucket(matrices, block, device, halves=halves)
        for name, update, side in PASSES:
            if halves == (update == "SGD"):
                yield Case(name, partial(bucket.launch, update, side), bucket.bytes(update, side))


def solve_cases(matrices: Sequence[Shape], block: int, device: torch.device) -> Iterator[Case]:
    """The small dense part of matrices that call for no further pair, by stages."""
    from .device_bucket import NoiseBucket

    for halves in (False, True):
        bucket = NoiseBucket(matrices, block, device, halves=halves)
        bucket.launch("NONE", "LEFT")
        if not halves:
            bucket.solve("RITZ")
        bucket.launch("NONE", "RIGHT")
        for name, kind, stage in SOLVES:
            if halves == (kind == "TURN"):
                yield Case(f"solve: {name}", partial(bucket.solve, kind, stage))


def update_cases(weights: list[Tensor]) -> Iterator[Case]:
    """The operations of Frobenius scaling, on whichever backend the device has."""
    size = sum(w.numel() for w in weights)
    factors = torch.full((len(weights),), 1 - 2.0**-20, device=weights[0].device)
    yield Case("Frobenius norms", lambda: kernels.frobenius_norms(weights), 4 * size)
    yield Case("scaling", lambda: kernels.scale_(weights, factors), 8 * size)


def reference_cases(weights: list[Tensor], block: int) -> Iterator[Case]:
    """What the torch reference does for the same ends."""
    sides = [(w, torch.randn(w.shape[1], block), torch.randn(w.shape[0], block)) for w in weights]
    rights, lefts = [v for _, v, _ in sides], [u for _, _, u in sides]
    size, small = sum(w.numel() for w in weights), sum(4 * block * sum(w.shape) for w in weights)
    transposed = [w.mT for w in weights]
    change = torch.full((len(weights), 1), 1e-6)
    yield Case("product W V", lambda: kernels.skinny_products(weights, rights), 4 * size + small)
    yield Case("product Wᵀ U", lambda: kernels.skinny_products(transposed, lefts), 4 * size + small)
    yield Case("product W V, torch.mm", lambda: without_onednn(weights, rights), 4 * size + small)
    yield Case("product Wᵀ U, torch.mm", lambda: without_onednn(transposed, lefts), 4 * size + small)
    yield Case("correction", lambda: kernels.rank_updates_(weights, change, lefts, rights), 8 * size)
    yield from update_cases(weights)


def without_onednn(matrices: Sequence[Tensor], blocks: Sequence[Tensor]) -> None:
    # torch warns of flags that stay as they are
    with warnings.catch_warnings(action="ignore"), torch.backends.mkldnn.flags(enabled=False):
        kernels.skinny_products(matrices, blocks)


def copy_bandwidth(watch: Stopwatch, size: int | None = None) -> float:
    """Bytes a second: both what is read and what is written."""
    size = size or (COPIED if watch.gpu else COPIED // 4)
    source = torch.ones(size // 4, device=watch.device)
    target = torch.empty_like(source)
    found = repeated(watch.on_device, lambda: target.copy_(source), repeats=20)
    return 2 * size / found.median


def row(case: Case, where: str, watch: Stopwatch | None, copy: float | None, **more: Any) -> dict[str, Any]:
    """A line of the table; without a stopwatch the work runs once, and its time is not measured."""
    line: dict[str, Any] = {"name": case.name, "where": where, **more}
    if watch is None:
        case.work()
        return line | unmeasured(case)
    found = repeated(watch.on_device, case.work)
    line |= {"measured_us": 1e6 * found.median, "spread": found.spread}
    if case.bytes and copy:
        expected = case.bytes / copy
        line |= {"bytes_mb": case.bytes / 1e6, "expected_us": 1e6 * expected}
        line |= {"difference_us": 1e6 * (found.median - expected), "of_copy": 100 * expected / found.median}
    return line


def unmeasured(case: Case) -> dict[str, Any]:
    moved = {"bytes_mb": case.bytes / 1e6, "expected_us": None, "of_copy": None} if case.bytes else {}
    return moved | {"measured_us": None}


COLUMNS = {
    "name": "kernel",
    "where": "weights",
    "block": "block",
    "bytes_mb": "has to move (MB)",
    "expected_us": "expected (µs)",
    "measured_us": "measured (µs)",
    "difference_us": "difference (µs)",
    "spread": "± (%)",
    "of_copy": "of a copy's bandwidth (%)",
    "note": "",
}
EXPECTED = "Expected: the bytes over the bandwidth of a copy. Cold caches; ± is the distance of the quartiles."


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("kernels", help="bandwidth of every kernel", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--block", type=reporting.whole(1, 64), default=32)
    parser.add_argument("--threads", type=reporting.whole(1), default=2, help="of a CPU")
    parser.add_argument(
        "--largest", type=reporting.whole(1), default=4096, help="leaves out lists with a longer side than this"
    )
    parser.add_argument("--out", type=Path, default=reporting.OUT, help="folder of JSON file and plot")
    parser.set_defaults(main=main)


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = {name: found for name, found in shapes().items() if max(map(max, found)) <= arguments.largest}
    report = measure(device, chosen, arguments.block)
    reporting.publish(
        report,
        f"kernels_{'gpu' if report['gpu'] else 'cpu'}",
        arguments.out,
        {
            "title": f"bandwidth over that of a copy\n{report['device']}",
            "label": "per cent",
            "values": {f"{row['name']}, {row['where']}": row.get("of_copy") for row in report["results"]},
        },
    )


def measure(device: torch.device, lists: dict[str, list[Shape]], block: int) -> reporting.Report:
    watch = Stopwatch(device)
    copy = copy_bandwidth(watch)
    rows: list[dict[str, Any]] = []
    for where, matrices in lists.items():
        weights = [torch.randn(shape, device=device) for shape in matrices]
        if watch.gpu:
            for case in (*pass_cases(matrices, block, device), *solve_cases(matrices, block, device)):
                rows.append(row(case, where, watch, copy, block=block))
            rows += [row(case, where, watch, copy) for case in update_cases(weights)]
        else:
            rows += [row(c, where, watch, copy, note="torch reference") for c in reference_cases(weights, block)]
    notes = [EXPECTED]
    if watch.gpu:
        notes.append(f"Copy of {COPIED / 2**30:.0f} GiB: {copy / 1e9:.0f} GB/s, read and written.")
    else:
        names = [p[0] for p in PASSES] + [f"solve: {name}" for name, *_ in SOLVES] + ["Frobenius norms", "scaling"]
        rows += [{"name": name, "where": "any", "measured_us": None, "of_copy": None, "note": NO_GPU} for name in names]
        notes.append(f"The Triton kernels: {NO_GPU}. The rows before them are the torch reference on the CPU.")
    columns = {key: head for key, head in COLUMNS.items() if any(key in line for line in rows)}
    settings = {"block": block, "copy_gb_s": copy / 1e9}
    made = reporting.about("kernels", device) | {"title": "Bandwidth of the kernels", "settings": settings}
    return made | {"columns": columns, "notes": notes, "results": rows}
