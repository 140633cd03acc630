"""How well a tracked cap of rank r holds over real training, beside the exact one of the same updated weights by SVD.

python -m benchmarks.run caps --data-dir DIR       MLP 5 x 512 on MNIST in its publisher's format
python -m benchmarks.run caps --steps 40           a try on UCI digits, which scikit-learn ships
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import specopt
from benchmarks import reporting, workloads
from benchmarks.sigma import before_correction
from specopt.tracker.common import COLD_STEPS, STATS, Stat

RATE = 1e-3


@dataclass
class Result:
    """σ₁/σ* after a step, over all layers and the steps looked at; ``over`` is ours less exact."""

    rank: str
    samples: int
    exact_median: float
    exact_worst: float
    median: float
    worst: float
    over_median: float
    over_worst: float
    pairs: float
    """Mean over the tracked matrices after the cold phase; 0 with "full", which follows none."""

    def line(self) -> str:
        ours = f"{self.median:8.4f} {self.worst:8.4f}"
        exact = f"{self.exact_median:8.4f} {self.exact_worst:8.4f}"
        return f"{self.rank:>6} {exact} {ours} {self.over_median:8.4f} {self.over_worst:8.4f} {self.pairs:6.2f}"


HEADER = f"{'rank':>6} {'exact':>8} {'worst':>8} {'ours':>8} {'worst':>8} {'over':>8} {'worst':>8} {'pairs':>6}"
COLUMNS = {
    "rank": "rank",
    "exact_median": "exact: median",
    "exact_worst": "worst",
    "median": "tracked: median",
    "worst": "worst ",
    "over_median": "difference: median",
    "over_worst": "worst  ",
    "pairs": "pairs of products",
}


def capped(rank: int | str, steps: int, data: workloads.Data, width: int, every: int) -> Result:
    """AdamW under a cap, from scaled orthogonal weights; each step is judged from the state that it began in."""
    workload = workloads.mlp(data, width=width, orthogonal=True)
    optimizer = specopt.NormScaleAdamW(workload.model.parameters(), lr=RATE, mode="cap", rank=rank)
    weights = list(workload.matrices().values())
    exact: list[float] = []
    ours: list[float] = []
    pairs: list[float] = []
    for t in range(steps):
        optimizer.zero_grad()
        workload.loss().backward()
        look = t < 8 or t % every == 0
        exact += [exact_cap(before_correction(optimizer, weight, RATE), rank) for weight in weights] if look else []
        optimizer.step()
        ours += [float(relative(weight)[0]) for weight in weights] if look else []
        found = [float(optimizer.state[weight][STATS][Stat.PAIRS]) for weight in weights]
        pairs += [count for count in found if count >= 1] if t >= COLD_STEPS else []
    over = [mine - other for mine, other in zip(ours, exact, strict=True)]
    mean_pairs = statistics.mean(pairs) if pairs else 0.0
    columns = [statistics.median(exact), max(exact), statistics.median(ours), max(ours)]
    columns += [statistics.median(over), max(over), mean_pairs]
    return Result(str(rank), len(over), *columns)


def relative(weight: Tensor) -> Tensor:
    """Singular values over ``σ* = sqrt(out/in)``, in float64."""
    return torch.linalg.svdvals(weight.detach().double()) / math.sqrt(weight.shape[0] / weight.shape[1])


def exact_cap(weight: Tensor, rank: int | str) -> float:
    """σ₁/σ* once the first ``rank`` singular values are cut to σ*."""
    values = relative(weight)
    first = min(float(values[0]), 1.0)
    return first if rank == "full" or int(rank) >= len(values) else max(first, float(values[int(rank)]))


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("caps", help="how well a cap holds", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data-dir", type=Path, help="holds MNIST/raw; UCI digits if absent")
    parser.add_argument("--steps", type=reporting.whole(1), default=200)
    parser.add_argument(
        "--every", type=reporting.whole(1), default=4, help="look at every so many-th step, and the first 8"
    )
    parser.add_argument("--width", type=reporting.whole(1), default=512)
    parser.add_argument("--rank", nargs="+", default=["1", "8", "16", "full"])
    parser.add_argument("--out", type=Path, default=reporting.OUT, help="folder of JSON file and plot")
    parser.set_defaults(main=main)


def main(arguments: argparse.Namespace) -> None:
    data = workloads.mnist(arguments.data_dir) if arguments.data_dir else workloads.digits()
    print(HEADER, flush=True)
    results: list[Result] = []
    for text in arguments.rank:
        rank = text if text == "full" else int(text)
        results.append(capped(rank, arguments.steps, data, arguments.width, arguments.every))
        print(results[-1].line(), flush=True)
    report = reporting.about("caps", torch.device("cpu"))
    name = "MNIST" if arguments.data_dir else "digits"
    report |= {"title": f"Caps of rank r: σ₁/σ* after a step, MLP 5 x {arguments.width}, {name}"}
    report |= {"steps": arguments.steps, "columns": COLUMNS, "results": [asdict(result) for result in results]}
    reporting.publish(
        report,
        "caps",
        arguments.out,
        {
            "title": "worst σ₁/σ* after a cap of rank r, less 1",
            "label": "worst σ₁/σ* − 1",
            "values": {f"rank {result.rank}": max(result.worst - 1, 1e-8) for result in results},
            "log": True,
        },
    )
