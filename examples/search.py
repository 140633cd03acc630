"""Chooses a setting for a row of a table by a validation split of the training set; test images are never looked at.

    python examples/search.py --recipe normscale/mlp-5x2000/none --data-dir data --scale half --epochs 15 --bf16

Trains the recipe and every candidate (papers/candidates.py) from the same starts on the same batches, times them side
by side, and prints and writes which has the best mean validation accuracy among those whose step costs at most
--most-time over the recipe's. Stopped runs are gone on with.

The one that is chosen is a recipe too, on the whole training set and judged by the test images:

    python examples/train.py --recipe normscale/mlp-5x2000/cap-8-gain-2 --data-dir data
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from papers.candidates import HELD_OUT, candidates
from papers.recipe import FULL, SCALES, Recipe
from papers.recipes import find
from papers.runs.checkpoint import reserve, write_text
from papers.runs.machine import Machine, described
from papers.runs.running import Run, images_of
from papers.runs.timing import time_methods

ROOM = 2**20
"""Bytes for what was found."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="the row's method without control")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="of candidates' names")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--download", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seeds", type=int, default=1, help="how many: 0, 1, ...")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--scale", choices=SCALES, default=FULL.name)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--most-time", type=float, default=1.05, help="of a step, over the recipe's")
    parser.add_argument("--out", type=Path, default=Path("out/runs"))
    parser.add_argument("--record", type=Path, default=Path("out/search.json"), help="what was found, as JSON")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds must be 1 or more, got {args.seeds}")
    if not 0 < args.most_time < math.inf:
        parser.error(f"--most-time must be a positive finite number, got {args.most_time}")
    try:
        args.machine = Machine(args.data_dir, args.download, args.device, args.bf16)
        args.candidates = compared(find(args.recipe).scaled(SCALES[args.scale]).lasting(args.epochs), args.only)
        if args.record.is_dir():
            raise ValueError(f"--record must be a file, and {args.record} is a folder")
        reserve(args.record.parent, ROOM)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    args.error = parser.error
    return args


def compared(recipe: Recipe, patterns: list[str]) -> list[Recipe]:
    """The recipe, and those of its candidates whose method's name matches.

    Raises:
        ValueError: a pattern that nothing matches, or a recipe with a rule or a loss of its own.
    """
    plain, *others = candidates(recipe)
    names = [one.method.name for one in others]
    if plain.method.rules or plain.method.penalty or plain.method.adversarial:
        raise ValueError(f"--recipe must be the row's method without control or penalty, got {recipe.name!r}")
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(f"--only must match one of {', '.join(names)}, got {pattern!r}")
    return [plain, *(one for one in others if any(fnmatch(one.method.name, pattern) for pattern in patterns))]


def trained(args: argparse.Namespace) -> tuple[dict[str, list[float]], str]:
    """Validation accuracies after the last epoch, a seed each, by method; seed by seed, so that a stop leaves as many
    of each. And the commits that they were made at."""
    found: dict[str, list[float]] = {one.method.name: [] for one in args.candidates}
    commits: set[str] = set()
    for seed in range(args.seeds):
        for one in args.candidates:
            results = Run(one, [seed], args.out, args.machine).finish(show=False)
            assert results is not None  # without a deadline every run comes to its end
            found[one.method.name].append(results[0]["epochs"][-1]["test_accuracy"])
            commits.add(str(results[0]["commit"]))
            print(f"seed {seed}  {one.method.name:20}  {found[one.method.name][-1]:.4f}", flush=True)
    return found, ", ".join(sorted(commits))


def summary(args: argparse.Namespace, accuracies: dict[str, list[float]], commits: str) -> dict[str, Any]:
    settings = args.machine.settings
    times = time_methods(args.candidates, images_of(args.candidates[0], args.machine), settings)
    rows = [
        {
            "method": one.method.name,
            "validation_accuracy": statistics.mean(accuracies[one.method.name]),
            "seeds": accuracies[one.method.name],
            "time_over_none": times[one.name],
        }
        for one in args.candidates
    ]
    allowed = [row for row in rows[1:] if row["time_over_none"] <= args.most_time]
    best, cheap = (max(some, key=lambda row: row["validation_accuracy"], default=None) for some in (rows[1:], allowed))
    about = {"machine": described(settings.device), "commit": commits, "bf16": args.bf16, "held_out": HELD_OUT}
    about |= {
        "recipe": args.recipe,
        "scale": args.scale,
        "epochs": args.candidates[0].epochs,
        "most_time": args.most_time,
    }
    return {**about, "rows": rows, "best": best and best["method"], "best_within_time": cheap and cheap["method"]}


def main() -> None:
    args = arguments()
    try:
        found = summary(args, *trained(args))
    except (ValueError, OSError) as error:
        args.error(str(error))
    write_text(args.record, json.dumps(found, indent=1))
    print(f"\n{'method':20}  validation accuracy  step / {found['rows'][0]['method']}'s")
    for row in sorted(found["rows"], key=lambda row: -row["validation_accuracy"]):
        print(f"{row['method']:20}  {row['validation_accuracy']:19.4f}  {row['time_over_none']:.3f}")
    print(f"\nbest: {found['best']}; within {args.most_time:g} of the time: {found['best_within_time']}")
    print(f"Written: {args.record}")


if __name__ == "__main__":
    main()
