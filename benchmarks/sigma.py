"""How exact the tracked sigma is over real training: against float64 SVD, and how many pairs of products it took.

    python -m benchmarks.run sigma --data-dir DIR      full length, on MNIST and CIFAR-10 in their publishers' formats
    python -m benchmarks.run sigma --steps 60          a try on UCI digits, which scikit-learn ships
    python -m benchmarks.run sigma --block 8 16 32 --passes 1 2        the same runs at several settings

The defaults go into sigma.json, other settings into sigma_settings.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import specopt
from benchmarks import reporting, workloads
from benchmarks.workloads import Workload
from specopt.tracker.common import COLD_STEPS, STATS, Stat

BLOCK, DEFAULT = 32, "default"


@dataclass
class Result:
    """Errors are relative; ``recovered`` is the worst outside the first three steps from a spike on."""

    name: str
    steps: int
    samples: int
    median: float
    worst: float
    recovered: float
    pairs: float
    flat_worst: float = 0.0
    """SNR only: worst ``1 − uᵀWv/σ₁`` where the gap is under 1 %."""
    tracked: float = 1.0
    """The share of matrices that ``pairs`` is the mean of; the others are exact and make half a pair."""
    block: int = BLOCK
    passes: str = DEFAULT
    """``max_passes``."""
    step_ms: float = 0.0
    """Median of ``optimizer.step()`` after the cold phase."""
    cost: float = 1.0
    """``step_ms`` over that of the first setting, which ran before it and not in turns with it."""

    @property
    def mean_pairs(self) -> float:
        """Over all matrices."""
        return (self.tracked * self.pairs if self.tracked else 0.0) + (1 - self.tracked) * 0.5

    def line(self) -> str:
        flat = f"{self.flat_worst:9.1e}" if self.flat_worst else " " * 9
        return (
            f"{self.name:44} {self.median:8.1e} {self.worst:8.1e} {self.recovered:9.1e} {flat} {self.mean_pairs:6.2f}"
        )


HEADER = f"{'workload':44} {'median':>8} {'worst':>8} {'recovered':>9} {'flat':>9} {'pairs':>6}"
SPIKE_EVERY, SPIKE = 40, 30


def schedule(steps: int, warmup: int, spikes: bool) -> Iterator[tuple[int, float, int]]:
    """(step, factor of the learning rate, steps since the last spike)."""
    for t in range(steps):
        since = t % SPIKE_EVERY if spikes and t >= SPIKE_EVERY else SPIKE_EVERY
        yield t, (SPIKE if since == 0 else min(1.0, t / warmup) if warmup else 1.0), since


def sampled(t: int, since: int, every: int) -> bool:
    return t < 10 or t % every == 0 or since < 5


def spectral_norm(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.detach().double().flatten(1), 2))


def before_correction(optimizer: specopt.NormScaleAdamW, weight: Tensor, lr: float) -> Tensor:
    """What plain AdamW makes of the weight in this step."""
    assert weight.grad is not None
    copy = weight.detach().clone().requires_grad_()
    copy.grad = weight.grad.clone()
    plain = torch.optim.AdamW([copy], lr=lr)
    state = {k: v for k, v in optimizer.state[weight].items() if not k.startswith("spectral")}
    if state:
        plain.state[copy] = {k: v.clone() for k, v in state.items()}
    plain.step()
    return copy


def norm_scaling(
    name: str,
    workload: Workload,
    *,
    steps: int,
    lr: float = 1e-3,
    warmup: int = 0,
    spikes: bool = False,
    every: int = 10,
    period: int = 1,
    **options: Any,
) -> Result:
    """Of the steps in which sigma is looked at: the first of each ``period``."""
    optimizer = specopt.NormScaleAdamW(workload.model.parameters(), lr=lr, every=period, **options)
    weights = list(workload.matrices().values())
    errors: list[tuple[int, float]] = []
    pairs: list[float] = []
    times: list[float] = []
    for t, factor, since in schedule(steps, warmup, spikes):
        optimizer.param_groups[0]["lr"] = lr * factor
        optimizer.zero_grad()
        workload.loss().backward()
        look = t % period == 0 and (period > 1 or sampled(t, since, every))
        exact = [spectral_norm(before_correction(optimizer, w, lr * factor)) for w in weights] if look else []
        times += _timed(optimizer, t)
        stats = [optimizer.state[w][STATS] for w in weights]
        errors += [(since, abs(float(s[Stat.SIGMA]) / e - 1)) for s, e in zip(stats, exact, strict=False)]
        tracked = [float(s[Stat.PAIRS]) for s in stats if s[Stat.PAIRS] >= 1]  # an exact matrix takes a half
        pairs += tracked if t >= COLD_STEPS * period and t % period == 0 else []
    result = _result(name, steps, errors, pairs, times)
    exact_ones = [float(optimizer.state[w][STATS][Stat.PAIRS]) < 1 for w in weights]
    result.tracked = 1 - sum(exact_ones) / len(exact_ones)
    return result


def snr(
    name: str,
    workload: Workload,
    *,
    steps: int,
    lr: float,
    snr_lambda: float = 0.01,
    every: int = 10,
    **options: Any,
) -> Result:
    """The applied penalty, read from the momentum buffer, against ``λ σ₁ u₁v₁ᵀ`` from SVD; relative to the gradient."""
    optimizer = specopt.SNRSGD(workload.model.parameters(), lr=lr, momentum=0.9, snr_lambda=snr_lambda, **options)
    weights = list(workload.matrices().values())
    errors: list[tuple[int, float]] = []
    pairs: list[float] = []
    times: list[float] = []
    flat = 0.0
    for t, _, since in schedule(steps, 0, False):
        optimizer.zero_grad()
        workload.loss().backward()
        look = weights if sampled(t, since, every) else []
        before = [(w.detach().double().flatten(1), _buffer(optimizer, w)) for w in look]
        times += _timed(optimizer, t)
        for w, (matrix, buffer) in zip(look, before, strict=True):
            assert w.grad is not None
            gradient = w.grad.double().flatten(1)
            penalty = _buffer(optimizer, w) - 0.9 * buffer - gradient
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            if (s[0] - s[1]) / s[0] >= 0.01:
                wrong = (penalty - snr_lambda * s[0] * torch.outer(u[:, 0], vh[0])).norm()
                errors.append((since, float(wrong / (gradient + penalty).norm())))
            else:
                flat = max(flat, abs(1 - float((penalty * matrix).sum() / penalty.norm() / s[0])))
        pairs += [float(optimizer.state[w][STATS][Stat.PAIRS]) for w in weights] if t >= COLD_STEPS else []
    result = _result(name, steps, errors, pairs, times)
    result.flat_worst = flat
    return result


def _buffer(optimizer: specopt.SNRSGD, weight: Tensor) -> Tensor:
    buffer = optimizer.state[weight].get("momentum_buffer")
    return torch.zeros(1, dtype=torch.float64) if buffer is None else buffer.double().flatten(1)


def _timed(optimizer: torch.optim.Optimizer, t: int) -> list[float]:
    """Steps; the time in milliseconds, but not in the cold phase."""
    start = time.perf_counter()
    optimizer.step()
    return [1e3 * (time.perf_counter() - start)] if t >= COLD_STEPS else []


def _result(name: str, steps: int, errors: list[tuple[int, float]], pairs: list[float], times: list[float]) -> Result:
    values = [error for _, error in errors]
    calm = [error for since, error in errors if since >= 3]
    mean_pairs = statistics.fmean(pairs) if pairs else float("nan")
    result = Result(name, steps, len(values), statistics.median(values), max(values), max(calm), mean_pairs)
    result.step_ms = statistics.median(times) if times else float("nan")
    return result


def runs(folder: Path | None, steps: int) -> dict[str, Callable[[str], Result]]:
    small = workloads.digits()
    dense = workloads.mnist(folder) if folder else small
    images = workloads.cifar10(folder) if folder else small
    where, pictures = ("MNIST", "CIFAR-10") if folder else ("digits", "digits")
    found: dict[str, Callable[[str], Result]] = {}
    for orthogonal in (False, True):
        init = "orthogonal" if orthogonal else "default"
        build = partial(workloads.mlp, dense, orthogonal=orthogonal)
        for warmup in (0, 100):
            key = f"norm scaling, MLP 5x512 {where}, {init}" + (", warm-up" if warmup else "")
            found[key] = partial(_built, norm_scaling, build, steps=steps, warmup=warmup)
    build = partial(workloads.mlp, dense, orthogonal=True)
    found[f"norm scaling, MLP 5x512 {where}, lr x30 spikes"] = partial(
        _built, norm_scaling, build, steps=steps, spikes=True
    )
    found[f"norm scaling, MLP 5x512 {where}, every 8"] = partial(_built, norm_scaling, build, steps=steps, period=8)
    found["norm scaling, GPT width 256, Markov tokens"] = partial(_built, norm_scaling, workloads.gpt, steps=steps)
    build = partial(workloads.resnet, images)
    found[f"norm scaling, ResNet {pictures}, warm-up"] = partial(_built, norm_scaling, build, steps=steps, warmup=100)
    for lr in (0.05, 0.1):
        for orthogonal in (False, True):
            key = f"SNR, MLP 5x512 {where}, {'orthogonal' if orthogonal else 'default'}, lr {lr}"
            build = partial(workloads.mlp, dense, orthogonal=orthogonal)
            found[key] = partial(_built, snr, build, steps=steps, lr=lr)
    return found


def _built(measure: Callable[..., Result], build: Callable[[], Workload], name: str, **options: Any) -> Result:
    return measure(name, build(), **options)


COLUMNS = {
    "name": "workload",
    "block": "block",
    "passes": "max_passes",
    "median": "error: median",
    "worst": "worst",
    "recovered": "after spikes",
    "flat_worst": "flat",
    "pairs": "pairs of products",
    "step_ms": "step (ms)",
    "cost": "step / first setting",
}
NOTES = [
    "Errors of sigma (SNR: of the penalty, over the gradient) are relative, against float64 SVD. After spikes: the "
    "worst outside the first three steps from a spike on. Flat: 1 - uᵀWv/σ₁ where the gap is under 1 %. Pairs: mean "
    "over the tracked matrices after the cold phase."
]


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("sigma", help="how exact the tracked sigma is", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data-dir", type=Path, help="holds MNIST/raw and cifar-10-batches-bin; UCI digits if absent")
    parser.add_argument("--steps", type=reporting.whole(2), default=400)
    parser.add_argument("--only", default="", help="run only workloads whose name contains this")
    parser.add_argument("--block", type=reporting.whole(1, 64), nargs="+", default=[BLOCK])
    parser.add_argument(
        "--passes", type=reporting.whole(0), nargs="+", default=[0], help="max_passes; 0 is the default"
    )
    parser.add_argument("--out", type=Path, default=reporting.OUT, help="folder of JSON file and plot")
    parser.set_defaults(main=main)


def main(arguments: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore", message="the first step moves")
    settings = [(block, passes) for block in arguments.block for passes in arguments.passes]
    print(HEADER, flush=True)
    results = []
    for name, run in runs(arguments.data_dir, arguments.steps).items():
        if arguments.only not in name:
            continue
        first = None
        for block, passes in settings:
            result = run(name, block=block, max_passes=passes or None)
            result.block, result.passes = block, str(passes or DEFAULT)
            first = first or result
            result.cost = result.step_ms / first.step_ms
            results.append(result)
            print(result.line(), flush=True)
    if not results:
        raise SystemExit(f"sigma: no workload's name contains {arguments.only!r}")
    rows = [asdict(result) for result in results]
    report = reporting.about("sigma", torch.device("cpu")) | {"title": "Accuracy of the tracked sigma"}
    report |= {"steps": arguments.steps, "columns": COLUMNS, "notes": NOTES, "results": rows}
    labels = [f"{r.name}, k {r.block}, {r.passes}" for r in results]
    reporting.publish(
        report,
        "sigma" if settings == [(BLOCK, 0)] else "sigma_settings",
        arguments.out,
        {
            "title": "median error of the tracked sigma over training",
            "label": "relative error",
            "values": {label: result.median for label, result in zip(labels, results, strict=True)},
            "log": True,
        },
    )
