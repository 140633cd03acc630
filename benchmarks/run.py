"""The benchmarks, by name:

    python -m benchmarks.run step        time of a step and of a training step, beside peers
    python -m benchmarks.run traffic     bytes that a step moves, counted in Triton's interpreter
    python -m benchmarks.run kernels     bandwidth of every kernel, beside a copy
    python -m benchmarks.run sigma       how exact the tracked sigma is, and its cost, by block and passes
    python -m benchmarks.run caps        how well caps of rank r hold, beside exact ones
    python -m benchmarks.run comm        what sharded weights send: counted, measured, modelled for up to 4,096 GPUs
    python -m benchmarks.run operators   cost of conv="operator" in a training step, printed only

Each prints a table and writes a JSON file and a plot into --out (out/bench). With --out benchmarks/results it is
recorded: `python -m benchmarks.reporting` puts what lies there into docs/performance.md and docs/distributed.md.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

MODULES = {
    "step": "step",
    "traffic": "traffic",
    "kernels": "kernel_bandwidth",
    "sigma": "sigma",
    "caps": "caps",
    "comm": "comm",
    "operators": "operators",
}


def main(words: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if words is None else words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    if not words or words[0] not in MODULES:
        parser.add_argument("benchmark", choices=MODULES)
        parser.parse_args(words[:1])
    if words[0] == "traffic" and os.environ.get("TRITON_INTERPRET") != "1":
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is defined: begin anew
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.run", *words])
    importlib.import_module(f"benchmarks.{MODULES[words[0]]}").add_parser(parser.add_subparsers())
    arguments = parser.parse_args(words)
    if arguments.__dict__.get("data_dir") and not arguments.data_dir.is_dir():
        parser.error(f"--data-dir {arguments.data_dir}: no folder is there")
    arguments.main(arguments)


if __name__ == "__main__":
    main()
