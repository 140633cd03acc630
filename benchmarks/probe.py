"""One run on a machine with a GPU that tells what the kernels cost: the passes with and without their update, the
solves, an empty launch, a copy, cuBLAS on the same products and torch's fused optimizers on the same weights.

    python -m benchmarks.probe --out benchmarks/results
    python -m benchmarks.probe --dry-run        every launch once on a CPU in Triton's interpreter, tiny, nothing timed
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import reporting
from .kernel_bandwidth import (
    COLUMNS,
    EXPECTED,
    Case,
    Shape,
    copy_bandwidth,
    pass_cases,
    row,
    shapes,
    solve_cases,
    update_cases,
)
from .timing import Stopwatch, repeated

BLOCKS = (8, 16, 32)
LAUNCHES = 100


def torch_products(matrices: Sequence[Shape], block: int, device: torch.device) -> Iterator[Case]:
    """cuBLAS in full float32, one call a matrix."""
    weights = [torch.randn(shape, device=device) for shape in matrices]
    rights = [torch.randn(w.shape[1], block, device=device) for w in weights]
    lefts = [torch.randn(w.shape[0], block, device=device) for w in weights]
    moved = sum(4 * (m * n + block * (m + n)) for m, n in matrices)
    yield Case("torch.mm W V", lambda: [torch.mm(w, v) for w, v in zip(weights, rights, strict=True)], moved)
    yield Case("torch.mm Wᵀ U", lambda: [torch.mm(w.mT, u) for w, u in zip(weights, lefts, strict=True)], moved)


def torch_optimizers(matrices: Sequence[Shape], device: torch.device) -> Iterator[Case]:
    size = sum(m * n for m, n in matrices)
    for name, each in (("SGD", 20), ("AdamW", 28)):
        weights = [torch.randn(shape, device=device, requires_grad=True) for shape in matrices]
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        options: dict[str, Any] = {"momentum": 0.9} if name == "SGD" else {}
        made = getattr(torch.optim, name)(weights, lr=1e-6, fused=True, **options)
        yield Case(f"torch {name}(fused=True)", made.step, each * size)


def launches(device: torch.device) -> Iterator[Case]:
    from .empty_kernel import launch

    pointer = torch.zeros(4, device=device)

    def many() -> None:
        for _ in range(LAUNCHES):
            launch(pointer)

    yield Case("empty launch", lambda: launch(pointer))
    yield Case(f"{LAUNCHES} empty launches", many)


def probe(device: torch.device, lists: dict[str, list[Shape]], blocks: Sequence[int], dry: bool) -> reporting.Report:
    watch = None if dry else Stopwatch(device)
    copy = None if watch is None else copy_bandwidth(watch)
    rows: list[dict[str, Any]] = []

    def take(cases: Iterator[Case], where: str, **more: Any) -> None:
        for case in cases:
            rows.append(row(case, where, watch, copy, **more))
            if not dry:
                print(".", end="", file=sys.stderr, flush=True)

    take(launches(device), "none")
    for where, matrices in lists.items():
        for block in blocks:
            take(pass_cases(matrices, block, device), where, block=block)
            take(solve_cases(matrices, block, device), where, block=block)
            take(torch_products(matrices, block, device), where, block=block)
        take(torch_optimizers(matrices, device), where)
        take(update_cases([torch.randn(shape, device=device) for shape in matrices]), where)
    notes = [EXPECTED]
    if watch is None or copy is None:
        notes.append("A dry run: every launch was made once in Triton's interpreter, and nothing was timed.")
    else:
        host = repeated(lambda work: watch.on_host(work) or 0.0, next(launches(device)).work)
        notes.append(
            f"Copy: {copy / 1e9:.0f} GB/s, read and written. Host time of an empty launch: {1e6 * host.median:.1f} µs."
        )
    columns = {key: head for key, head in COLUMNS.items() if any(key in line for line in rows)}
    made = reporting.about("probe", device) | {"title": "Probe of the kernels" + (" (dry run)" if dry else "")}
    return made | {"columns": columns, "notes": notes, "results": rows}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--block", type=reporting.whole(1, 64), nargs="+", default=list(BLOCKS))
    parser.add_argument("--out", type=Path, default=reporting.OUT, help="folder of JSON file and plot")
    arguments = parser.parse_args(words)
    if not arguments.dry_run:
        if not torch.cuda.is_available():
            raise SystemExit("probe: torch sees no GPU here, so nothing can be measured; --dry-run tries the script")
        report = probe(torch.device("cuda"), shapes(), arguments.block, False)
    else:
        if os.environ.get("TRITON_INTERPRET") != "1":  # Triton reads it when a kernel is defined: begin anew
            os.environ["TRITON_INTERPRET"] = "1"
            os.execv(sys.executable, [sys.executable, "-m", "benchmarks.probe", *(words or sys.argv[1:])])
        os.environ["SPECOPT_BACKEND"] = "triton"
        tiny = {"mixed, tiny": [(96, 66), (8, 100), (70, 30)]}
        report = probe(torch.device("cpu"), tiny, arguments.block, True)
    reporting.publish(report, "probe_dry_run" if arguments.dry_run else "probe", arguments.out, None)


if __name__ == "__main__":
    main()
