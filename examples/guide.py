"""What each rule does to the singular values of a layer in training, and what a step costs: docs/guide.md's figures.

A network of linear layers and one with a convolution start from scaled orthogonal weights and train without control and
under each rule, all on the same batches, a step of each in turn. A PNG for each rule shows the spectrum of the second
layer before and after, and without control; table.md and guide.json hold the numbers. One seed: the figures show what
rules do to spectra, and rank nothing by accuracy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from guide_data import Data, load
from guide_figure import draw_all
from guide_training import BATCH, CONTROLS, Trained, train
from tqdm import tqdm

SMALLEST = 16
"""Width: the rank of a cap."""
KEPT = 32
"""Leading singular values in guide.json."""


def row(trained: Trained) -> dict[str, Any]:
    """A line of the table, with numbers as measured."""
    return {
        "rule": trained.control.name,
        "base": trained.control.base,
        "step_ms": statistics.median(trained.step_ms),
        "over_base": trained.over_base,
        "sigma_1": trained.after[0].item(),
        "median_sigma": trained.after.median().item(),
        "target": 1.0 if trained.control.target == "sigma" else None,
        "accuracy": trained.accuracy,
        "spectrum_before": trained.before[:KEPT].tolist(),
        "spectrum_after": trained.after[:KEPT].tolist(),
    }


def table(rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> str:
    """In Markdown, with what it was measured on."""
    head = "| rule | step / base's | largest σ | median σ | σ* | test accuracy |\n|---|---:|---:|---:|---:|---:|"
    lines = [
        f"| {r['rule']} | {r['over_base']:.2f} | {r['sigma_1']:.3f} | {r['median_sigma']:.3f} | "
        f"{'1' if r['target'] else '-'} | {r['accuracy']:.3f} |"
        for r in rows
    ]
    note = (
        f"{settings['data']}, width {settings['width']}, {settings['steps']} steps of batch {settings['batch']}, one "
        f"seed; one thread of a {settings['cores']}-core CPU; GPU: not measured."
    )
    return "\n".join([head, *lines, "", note, ""])


def settings_of(args: argparse.Namespace, data: Data) -> dict[str, Any]:
    return {
        "data": data.name,
        "width": args.width,
        "steps": args.steps,
        "batch": BATCH,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }


def arguments() -> tuple[argparse.Namespace, Data]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/guide"), help="folder for figures, table and numbers")
    parser.add_argument("--data-dir", type=Path, help="folder with MNIST/raw/*.gz; without it, UCI digits")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--width", type=int, default=384, help="of the linear layers")
    args = parser.parse_args()
    for name, least in (("steps", 1), ("width", SMALLEST)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be {least} or more, got {getattr(args, name)}")
    try:
        data = load(args.data_dir)
    except ValueError as error:
        parser.error(f"--data-dir {args.data_dir}: {error}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        parser.error(f"--out {args.out}: cannot write there ({error.strerror})")
    return args, data


def main() -> None:
    args, data = arguments()
    torch.set_num_threads(1)
    with tqdm(total=args.steps * len(CONTROLS), unit="step") as bar:
        found = train(data, args.width, args.steps, bar)
    rows, settings = [row(trained) for trained in found], settings_of(args, data)
    draw_all(found, args.width, args.out)
    (args.out / "table.md").write_text(table(rows, settings))
    (args.out / "guide.json").write_text(json.dumps({"settings": settings, "results": rows}, indent=1))
    print(table(rows, settings))
    print(f"Written: {args.out}/*.png, table.md, guide.json")


if __name__ == "__main__":
    main()
