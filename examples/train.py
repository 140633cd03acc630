"""Trains a recipe of the papers: python examples/train.py --recipe normscale/mlp-5x2000/spectral --data-dir data

Every run has a folder OUT/RECIPE/seed-S with its checkpoint, log.csv, layers.csv, log.json, times.csv, TensorBoard
files, figures and result.json. A run that was stopped, however, goes on with --resume and ends in the same log as one
that was not. --list shows the recipes of the tables; those that search.py chooses from have names as well.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from papers.recipe import FULL, SCALES
from papers.recipes import find, names
from papers.runs.machine import Machine
from papers.runs.running import Run, check_seeds

COLUMNS = ("seed", "test accuracy", "test loss", "train accuracy", "gradient norm", "largest sigma", "ms a step")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", help="such as normscale/mlp-5x2000/spectral")
    what.add_argument("--list", nargs="?", const="*", metavar="PATTERN", help="print the names of recipes")
    parser.add_argument("--data-dir", type=Path, help="folder of the data sets, as their publishers' archives unpack")
    parser.add_argument("--download", action="store_true", help="get a data set that is not there")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--seeds", "--seed", type=int, nargs="+", default=[0], help="which, such as 0 1 2")
    parser.add_argument("--together", action="store_true", help="train all seeds at once, by stacked networks")
    parser.add_argument("--epochs", type=int, help="in place of the recipe's; the schedule shrinks with them")
    parser.add_argument("--scale", choices=SCALES, default=FULL.name, help="smaller networks, sets and schedules")
    parser.add_argument("--out", type=Path, default=Path("out/runs"), help="folder of all runs")
    parser.add_argument("--resume", action="store_true", help="go on with a run that is there")
    parser.add_argument("--bf16", action="store_true", help="forward passes under autocast to bfloat16")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    args = parser.parse_args()
    if args.list is None:
        try:
            check_seeds(args.seeds)
            args.chosen = find(args.recipe).scaled(SCALES[args.scale]).lasting(args.epochs)
            args.machine = Machine(
                args.data_dir, args.download, args.device, args.bf16, args.channels_last, args.compile
            )
        except ValueError as error:
            parser.error(str(error))
    args.error = parser.error
    return args


def line(seed: int, result: dict[str, Any]) -> list[str]:
    last, layers = result["epochs"][-1], result["layers"].values()
    sigmas = [layer["sigma"][-1] for layer in layers if layer["sigma"][-1] is not None]
    values = [last[name] for name in ("test_accuracy", "test_loss", "train_accuracy", "gradient_norm")]
    values += [max(sigmas, default=None), result["step_ms"]]
    return [str(seed), *("-" if value is None else f"{value:.4g}" for value in values)]


def show(lines: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for cells in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))


def main() -> None:
    args = arguments()
    if args.list is not None:
        found = names(args.list)
        if not found:
            args.error(f"--list: no recipe is called {args.list!r}")
        print("\n".join(found))
        return
    lines = [list(COLUMNS)]

    def run_of(seeds: list[int]) -> Run:
        return Run(args.chosen, seeds, args.out, args.machine, resume=args.resume)

    parts = [args.seeds] if args.together else [[seed] for seed in args.seeds]
    try:
        for seeds in parts[1:]:
            run_of(seeds)  # which fails where it would fail after hours of the seeds before
        for seeds in parts:
            results = run_of(seeds).finish()
            assert results is not None  # without a deadline every run comes to its end
            lines += [line(seed, result) for seed, result in zip(seeds, results, strict=True)]
    except (ValueError, OSError) as error:
        args.error(str(error))
    show(lines)
    print(f"\nWritten: {args.out / args.chosen.name}")


if __name__ == "__main__":
    main()
