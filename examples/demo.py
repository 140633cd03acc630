"""Five optimizers on a small part of the UCI digits: what each does to the spectral norms and to the accuracy.

Plain SGD and SNRSGD, plain AdamW and NormScaleAdamW (spectral and Frobenius) train the same network from the same
scaled orthogonal start on the same batches. Methods of one base share its learning rate, and all share the schedule
(cosine to zero) and the epochs; nothing was tuned per method. 200 images to train on and 1,597 to test on, so that the
gap between the two accuracies shows. Prints a table, and writes demo.png and demo.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from demo_figure import draw
from demo_training import METHODS, Curve, Method, train_all
from tqdm import tqdm


class Result(NamedTuple):
    """A line of the table: means over the seeds, after the last epoch."""

    method: str
    train_accuracy: float
    test_accuracy: float
    test_range: tuple[float, float]
    gap: float
    largest_sigma: float
    its_target: float | None
    norm_over_target: float | None
    step_ms: float
    time_over_base: float


def summarize(method: Method, curves: Sequence[Curve], base: Sequence[Curve]) -> Result:
    train = statistics.mean(curve.train[-1] for curve in curves)
    tests = [curve.test[-1] for curve in curves]
    sigmas = [statistics.mean(layer) for layer in zip(*(curve.sigmas[-1] for curve in curves), strict=True)]
    largest = max(range(len(sigmas)), key=sigmas.__getitem__)
    targets, ratios = curves[0].targets, [c.norm_over_target for c in curves if c.norm_over_target is not None]
    ours, plain = (statistics.median(t for curve in some for t in curve.step_ms) for some in (curves, base))
    return Result(
        method=method.name,
        train_accuracy=train,
        test_accuracy=statistics.mean(tests),
        test_range=(min(tests), max(tests)),
        gap=train - statistics.mean(tests),
        largest_sigma=sigmas[largest],
        its_target=targets[largest] if targets and "frobenius" not in method.name else None,
        norm_over_target=statistics.mean(ratios) if ratios else None,
        step_ms=ours,
        time_over_base=ours / plain,
    )


def cells(r: Result) -> tuple[str, ...]:
    low, high = r.test_range
    target = "-" if r.its_target is None else f"{r.its_target:.2f}"
    ratio = "-" if r.norm_over_target is None else f"{r.norm_over_target:.3f}"
    accuracies = (f"{r.train_accuracy:.3f}", f"{r.test_accuracy:.3f}", f"({low:.3f}-{high:.3f})", f"{r.gap:.3f}")
    return (r.method, *accuracies, f"{r.largest_sigma:.2f}", target, ratio, f"{r.time_over_base:.2f}")


def table(results: Sequence[Result], seeds: int) -> str:
    head = ("method", "train", "test", "(range)", "gap", "max sigma", "target", "norm/target", "time/base")
    rows = [head, *map(cells, results)]
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = []
    for name, *values in rows:
        lines.append("  ".join([name.ljust(first), *(v.rjust(w) for v, w in zip(values, others, strict=True))]))
    notes = f"""
Means over {seeds} seed(s) after the last epoch. train, test (and its range over the seeds), gap: accuracies, and their
difference. max sigma: the largest spectral norm over the layers, beside its target. norm/target: the largest over the
layers, of the norm that is set, spectral or Frobenius.
time/base: a training step's time over that of the base optimizer, medians over epochs that took turns."""
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], notes])


def writable_folder(path: Path) -> Path:
    """Makes the folder and tries to write there.

    Raises:
        OSError: where that fails.
    """
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
        return path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for demo.png and demo.json")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3, help="how many: 0, 1, ...")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args()
    for name in ("epochs", "seeds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be 1 or more, got {getattr(args, name)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; use auto or cpu")
    try:
        writable_folder(args.out)
    except OSError as error:
        parser.error(f"--out {args.out}: cannot write there ({error.strerror})")
    return args


def main() -> None:
    args = arguments()
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # more gain nothing at this size, and their sums round otherwise
    with tqdm(total=args.seeds * args.epochs * len(METHODS), unit="epoch") as bar:
        by_seed = [train_all(seed, args.epochs, device, bar) for seed in range(args.seeds)]
    curves = {method.name: [seed[i] for seed in by_seed] for i, method in enumerate(METHODS)}
    results = [summarize(method, curves[method.name], curves[method.base]) for method in METHODS]
    plain_curves = {name: [asdict(curve) for curve in some] for name, some in curves.items()}
    written = {
        "settings": {"device": device.type, "epochs": args.epochs, "seeds": args.seeds},
        "results": [result._asdict() for result in results],
        "curves": plain_curves,
    }
    (args.out / "demo.json").write_text(json.dumps(written, indent=1))
    draw(plain_curves, args.out / "demo.png")
    print(table(results, args.seeds))
    print(f"\nWritten: {args.out / 'demo.png'}, {args.out / 'demo.json'}")


if __name__ == "__main__":
    main()
