"""Time of a training step with control, over the same step with the base optimizer.

    python -m benchmarks.step_time --width 2000

An MLP (3072 - 4 x width - 100) on random images of batch 128, after the cold phase; the optimizers take turns and the
table gives medians. Ratios compare; the times are of the machine that ran it.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import specopt
from specopt.tracker.common import COLD_STEPS, STATS, Stat

OPTIMIZERS: dict[str, tuple[str, Callable[[Iterable[Tensor]], Optimizer]]] = {
    "SGD": ("SGD", lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)),
    "SNRSGD": ("SGD", lambda p: specopt.SNRSGD(p, lr=0.01, momentum=0.9)),
    "AdamW": ("AdamW", lambda p: torch.optim.AdamW(p, lr=1e-4)),
    "NormScaleAdamW spectral": ("AdamW", lambda p: specopt.NormScaleAdamW(p, lr=1e-4)),
    "NormScaleAdamW frobenius": ("AdamW", lambda p: specopt.NormScaleAdamW(p, lr=1e-4, norm="frobenius")),
}


class Run:
    def __init__(self, width: int, make: Callable[[Iterable[Tensor]], Optimizer], device: torch.device) -> None:
        torch.manual_seed(0)
        sizes = [3072, width, width, width, width, 100]
        layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.model = specopt.init.scaled_orthogonal_(nn.Sequential(*layers[:-1])).to(device)
        self.optimizer = make(self.model.parameters())
        self.images = torch.randn(128, 3072, device=device)
        self.labels = torch.randint(100, (128,), device=device)

    def step(self) -> float:
        """Seconds."""
        _finish(self.images.device)
        start = time.perf_counter()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()
        _finish(self.images.device)
        return time.perf_counter() - start

    def pairs(self) -> float:
        stats = [state[STATS] for state in self.optimizer.state.values() if STATS in state]
        return statistics.fmean(float(s[Stat.PAIRS]) for s in stats) if stats else 0.0


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", message="the first step moves")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs = {name: Run(arguments.width, make, device) for name, (_, make) in OPTIMIZERS.items()}
    for run in runs.values():
        for _ in range(COLD_STEPS + 2):
            run.step()
    times: dict[str, list[float]] = {name: [] for name in runs}
    pairs: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            times[name].append(run.step())
            pairs[name].append(run.pairs())
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {arguments.threads} threads"
    print(f"MLP 5 x {arguments.width}, batch 128, float32, {where}, torch {torch.__version__}")
    print(f"{'':26} {'ms a step':>10} {'over base':>10} {'mean pairs':>11}")
    for name, (base, _) in OPTIMIZERS.items():
        median = statistics.median(times[name])
        ratio = median / statistics.median(times[base])
        print(f"{name:26} {1e3 * median:10.1f} {ratio:10.2f} {statistics.fmean(pairs[name]):11.2f}")


if __name__ == "__main__":
    main()
