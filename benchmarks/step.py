"""Time of `optimizer.step()` and of a whole training step, beside torch's own optimizers and other ways to this end.

    python -m benchmarks.run step --workload mlp            MLP 3072 - 4 x 2000 - 100, batch 128, on two threads
    python -m benchmarks.run step --workload resnet50       weights only; on a GPU the whole step too

The optimizers of one base take turns, each on its own copy of one start, after the cold phase of ours; medians, and the
distance of the quartiles in per cent. Beside what was measured stands what is expected: the bytes that the step moves
over the base's, as if memory were all that counts.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import specopt
from specopt.tracker.common import COLD_STEPS, STATS, Stat

from . import reporting
from .models import WORKLOADS, Workload, shapes, workload
from .peers import LAMBDA, PEERS, Peer, base_of
from .timing import Stopwatch, Summary, summary
from .traffic import budget

BYTES = {"SGD": 20, "AdamW": 28}
"""Per float32 parameter: SGD reads p, g and the buffer and writes p and the buffer; AdamW one more of each."""
FROBENIUS = 40
"""AdamW's 28; then the weight is read for its norm, and read and written."""
BUDGETS = {"snr": "SNRSGD", "spectral": "NormScaleAdamW"}
LAUNCHES = {"snr": 4, "spectral": 6}
"""At most, in a warm step."""
IN_A_ROW = 4
"""Training steps between two waits on a GPU: the host runs ahead, as it does in training."""
BLOCK = 32
"""Columns of a product at the defaults."""

COLUMNS = {
    "name": "optimizer",
    "base": "base",
    "step_ms": "step (ms)",
    "step_spread": "± (%)",
    "step_ratio": "step / base",
    "step_expected": "expected",
    "step_difference": "difference",
    "step_goal": "goal",
    "train_ms": "training step (ms)",
    "train_spread": "± (%)",
    "train_ratio": "training step / base",
    "train_expected": "expected",
    "train_difference": "difference",
    "train_goal": "goal",
    "host_ms": "host (ms)",
    "host_ratio": "host / base",
    "launches": "launches",
    "launches_goal": "goal (at most)",
    "pairs": "pairs of products",
    "note": "",
}


class Run:
    """One optimizer on its own copy of the start."""

    def __init__(self, peer: Peer, start: nn.Module, inputs: Tensor | None, labels: Tensor | None) -> None:
        self.peer, self.inputs, self.labels = peer, inputs, labels
        self.model = copy.deepcopy(start)
        self.training = peer.build(self.model)
        self.times: dict[str, list[float]] = {"step": [], "train": [], "host": []}
        self.pairs: list[float] = []
        self.launches: int | None = None

    def backward(self) -> None:
        assert self.inputs is not None and self.labels is not None
        self.training.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(self.inputs), self.labels)
        if self.training.penalty:
            loss = loss + self.training.penalty()
        loss.backward()

    def measure(self, watch: Stopwatch, gradients: Sequence[Tensor]) -> None:
        step = self.training.step
        if self.inputs is None:
            self._take(gradients)
            self.times["step"].append(watch.on_device(step))
        elif watch.gpu:
            count = 1 if self.peer.slow else IN_A_ROW
            self.times["train"].append(watch.wall(lambda: self._train(count)) / count)
            self.times["step"].append(watch.on_device(step))
        else:
            before = watch.wall(self.backward)
            self.times["step"].append(watch.wall(step))
            self.times["train"].append(before + self.times["step"][-1])
        host = watch.on_host(step) if watch.gpu else None
        self.times["host"] += [] if host is None else [host]
        stats = [state[STATS] for state in self.training.optimizer.state.values() if STATS in state]
        if stats and self.peer.ours in LAUNCHES:
            self.pairs.append(torch.stack(stats)[:, Stat.PAIRS].mean().item())

    def _train(self, count: int) -> None:
        for _ in range(count):
            self.backward()
            self.training.step()

    def warm_up(self, watch: Stopwatch, gradients: Sequence[Tensor]) -> None:
        """Past the cold phase, where there is one."""
        for _ in range(COLD_STEPS + 2 if self.peer.ours else 1 if self.peer.slow else 3):
            if self.inputs is None:
                self._take(gradients)
            else:
                self.backward()
            self.training.step()
        self.launches = None if self.peer.slow else watch.launches(self.training.step)

    def _take(self, gradients: Sequence[Tensor]) -> None:
        for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
            parameter.grad = gradient


def expected_ratio(peer: Peer, matrices: Sequence[tuple[int, int]], parameters: int, *, small: bool = True) -> float:
    """Bytes that memory has to move in a warm step without a conditional pair, over the base's; with or without the
    small arrays."""
    base = BYTES[peer.family]
    controlled = sum(m * n for m, n in matrices)
    if peer.ours == "frobenius":
        ours = FROBENIUS * controlled
    elif peer.ours:
        goal = budget(matrices, BLOCK, BUDGETS[peer.ours])
        ours = goal.total if small else goal.streams
    else:
        ours = base * controlled
    return (base * (parameters - controlled) + ours) / (base * parameters)


def goals(peer: Peer, name: str, parameters: int, gpu: bool, streams: float, base_step: float) -> dict[str, float]:
    """Ratios to reach. Small networks on a GPU: the ratio of bytes (``streams``) plus 30 µs."""
    if peer.ours not in LAUNCHES:
        return {}
    snr = peer.ours == "snr"
    if not gpu:
        return {"train_goal": 1.10 if snr else 1.12} if name == "mlp" and parameters >= 18e6 else {}
    large = name == "mlp7x4000" or parameters >= 100e6
    step = (1.10 if snr else 1.35) if large else streams + 30e-6 / base_step
    train = {} if name == "gpt2-xl" else {"train_goal": 1.03}
    return {"step_goal": step, "launches_goal": LAUNCHES[peer.ours], **train}


def measure_family(
    peers: Sequence[Peer], load: Workload, watch: Stopwatch, rounds: int, slow_rounds: int
) -> tuple[list[Run], dict[str, str]]:
    """The runs, and for each peer that was left out why."""
    device = watch.device
    torch.manual_seed(0)
    with device:
        start = specopt.init.scaled_orthogonal_(load.build())
        inputs = torch.randn(load.inputs) if load.inputs else None
        labels = torch.randint(load.classes, load.inputs[:1]) if load.inputs else None
        gradients = [] if load.inputs else [torch.randn_like(p) for p in start.parameters()]
    runs, missing = [], {}
    for peer in peers:
        if load.only and peer.name not in load.only:
            missing[peer.name] = "left out for memory"
        elif load.inputs is None and peer.in_loss:
            missing[peer.name] = "its work is in the loss"
        elif peer.package and reporting.version(peer.package) == "not installed":
            missing[peer.name] = "not installed"
        else:
            runs.append(Run(peer, start, inputs, labels))
    for run in runs:
        run.warm_up(watch, gradients)
    for i in range(rounds):
        for gradient in gradients:
            gradient.normal_(0, 1e-3)
        for run in runs if i % 2 == 0 else runs[::-1]:
            if i < slow_rounds or not run.peer.slow:
                run.measure(watch, gradients)
    return runs, missing


def rows_of(
    peers: Sequence[Peer], runs: Sequence[Run], missing: dict[str, str], name: str, load: Workload, gpu: bool
) -> list[dict[str, Any]]:
    matrices, parameters = shapes(load.build)
    found = {run.peer.name: run for run in runs}
    taken = {n: {key: summary(times) for key, times in run.times.items()} for n, run in found.items()}
    rows = []
    for peer in peers:
        base = base_of(peer.family, gpu)
        row: dict[str, Any] = {"name": peer.name, "base": base}
        rows.append(row)
        if peer.name in missing:
            row |= {"step_ms": None, "step_ratio": None, "note": missing[peer.name]}
            row |= {"train_ms": None, "train_ratio": None} if load.inputs else {}
            continue
        row |= _ratios(taken[peer.name], taken[base])
        if peer.ours or peer.name == base:
            row |= _expected(row, expected_ratio(peer, matrices, parameters), taken[base])
        step = taken[base]["step"]
        assert step is not None
        streams = expected_ratio(peer, matrices, parameters, small=False)
        row |= goals(peer, name, parameters, gpu, streams, step.median)
        run = found[peer.name]
        row |= {"launches": run.launches} if gpu else {}
        row |= {"pairs": statistics.fmean(run.pairs)} if run.pairs else {}
        row |= {"note": f"rounds: {len(run.times['step'])}"} if peer.slow else {}
    return rows


def _ratios(taken: dict[str, Summary | None], base: dict[str, Summary | None]) -> dict[str, float]:
    row = {}
    for key, found in taken.items():
        over = base[key]
        if found and over:
            row |= {f"{key}_ms": 1e3 * found.median, f"{key}_ratio": found.median / over.median}
            row |= {f"{key}_spread": found.spread}
    return row


def _expected(row: dict[str, Any], bytes_ratio: float, base: dict[str, Summary | None]) -> dict[str, float]:
    """The step's ratio is that of the bytes; a whole step is longer by what the optimizer's step then is."""
    found = {"step_expected": bytes_ratio, "step_difference": row["step_ratio"] - bytes_ratio}
    step, train = base["step"], base["train"]
    if step and train:
        whole = 1 + (bytes_ratio - 1) * step.median / train.median
        found |= {"train_expected": whole, "train_difference": row["train_ratio"] - whole}
    return found


def measure(
    name: str,
    load: Workload,
    device: torch.device,
    *,
    rounds: int,
    slow_rounds: int,
    peers: Sequence[Peer] = PEERS,
) -> reporting.Report:
    watch = Stopwatch(device)
    rows: list[dict[str, Any]] = []
    for family in dict.fromkeys(peer.family for peer in peers):
        members = [peer for peer in peers if peer.family == family]
        runs, missing = measure_family(members, load, watch, rounds, slow_rounds)
        rows += rows_of(members, runs, missing, name, load, watch.gpu)
        del runs
    matrices, parameters = shapes(load.build)
    notes = [
        f"{parameters / 1e6:.1f} M parameters, {len(matrices)} matrices; {rounds} rounds, λ = {LAMBDA:g}, else the "
        "defaults. ± is the distance of the quartiles, per cent of the median. Expected: the bytes of the step over "
        "the base's."
    ]
    if not watch.gpu:
        notes.append("Host time of a step and launches: not measured (no GPU).")
    if load.inputs is None:
        notes.append("Gradients are fresh noise in every round. Whole training step: not measured.")
    columns = {key: head for key, head in COLUMNS.items() if any(key in row for row in rows)}
    report = reporting.about("step", device)
    settings = {"workload": name, "rounds": rounds, "slow_rounds": slow_rounds, "threads": torch.get_num_threads()}
    return report | {"title": load.title, "settings": settings, "columns": columns, "notes": notes, "results": rows}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("step", help="time of a step and of a training step", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--workload", choices=WORKLOADS, default="mlp")
    parser.add_argument("--width", type=reporting.whole(1), default=2000, help="of the MLP")
    parser.add_argument("--rounds", type=reporting.whole(1), default=20)
    parser.add_argument(
        "--slow-rounds", type=reporting.whole(0), default=3, help="of what takes seconds a step; 0 leaves it out"
    )
    parser.add_argument("--only", default="", help="run only optimizers whose name contains this, and their base")
    parser.add_argument("--threads", type=reporting.whole(1), default=2, help="of a CPU")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, default=reporting.OUT, help="folder of JSON file and plot")
    parser.set_defaults(main=main)


def chosen(only: str, gpu: bool, slow_rounds: int) -> list[Peer]:
    found = [peer for peer in PEERS if only in peer.name and (slow_rounds > 0 or not peer.slow)]
    if not found:
        raise SystemExit(f"step: no optimizer's name contains {only!r}")
    bases = {base_of(peer.family, gpu) for peer in found}
    return [peer for peer in PEERS if peer in found or peer.name in bases]


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", message="the first step moves")
    device = pick(arguments.device)
    gpu = device.type == "cuda"
    load = workload(arguments.workload, arguments.width, images=gpu)
    if load.gpu_only and not gpu:
        raise SystemExit(f"step: {load.title} takes a GPU, and torch sees none here: not measured")
    peers = chosen(arguments.only, gpu, arguments.slow_rounds)
    options: dict[str, int] = {"rounds": arguments.rounds, "slow_rounds": arguments.slow_rounds}
    report = measure(arguments.workload, load, device, peers=peers, **options)
    name = f"step_{arguments.workload.replace('-', '_')}_{'gpu' if gpu else 'cpu'}"
    whole = load.inputs is not None
    key = "train" if whole else "step"
    rows = report["results"]
    reporting.publish(
        report,
        name,
        arguments.out,
        {
            "title": f"{load.title}\n{report['device']}",
            "label": f"median {'training step' if whole else 'optimizer.step()'} over the base's (ratio)",
            "values": {row["name"]: row.get(f"{key}_ratio") for row in rows},
            "goals": {row["name"]: row[f"{key}_goal"] for row in rows if f"{key}_goal" in row},
            "log": True,
        },
    )


def pick(device: str) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here; use auto or cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
