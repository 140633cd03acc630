"""Time of steps under ``fully_shard`` on the ranks at hand, with control and without, and of the sums alone.

Optimizers take turns within every round, each with a network of its own. The clock of a rank runs from a barrier until
its step returns. What a step leaves to be summed late travels behind what follows, so it is not in the step's time. The
sums alone are all-reduces of the payloads of a settled step, nothing else going on.
"""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import specopt
from benchmarks import workloads
from benchmarks.comm_bytes import Payload, Rule, frobenius, norm_scale, penalty, sent
from benchmarks.comm_count import by_rows, controlled, mesh_of, weight_of
from benchmarks.timing import Stopwatch, summary
from specopt.tracker.common import STATS, Stat

TOKENS, LENGTH, BATCH = 64, 64, 16
"""Of the text that the network is trained on: how many there are, in a sequence, and sequences on a rank."""


class Peer(NamedTuple):
    """An optimizer; the name of the one without control; what its settled steps in turn send."""

    name: str
    base: str
    make: Callable[[nn.Module], torch.optim.Optimizer]
    rules: tuple[Rule, ...] = ()


PEERS = (
    Peer("AdamW", "AdamW", lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3)),
    Peer("NormScaleAdamW", "AdamW", lambda model: specopt.NormScaleAdamW(model, lr=1e-3), (norm_scale,)),
    Peer(
        "NormScaleAdamW, Frobenius",
        "AdamW",
        lambda model: specopt.NormScaleAdamW(model, lr=1e-3, norm="frobenius"),
        (frobenius,),
    ),
    Peer("SGD", "SGD", lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)),
    Peer(
        "SNRSGD",
        "SGD",
        lambda model: specopt.SNRSGD(model, lr=0.05, momentum=0.9),
        tuple(partial(penalty, right=right) for right in (True, False)),
    ),
)


@dataclass
class Run:
    """One optimizer's training, and its times in seconds."""

    peer: Peer
    model: Any
    optimizer: torch.optim.Optimizer
    payloads: list[list[Payload]]
    """By steps in turn."""
    times: dict[str, list[float]] = field(default_factory=lambda: {"step": [], "train": [], "now": [], "late": []})
    pairs: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, peer: Peer, whole: nn.Module, mesh: Any) -> Run:
        model = copy.deepcopy(whole)
        by_rows(model, mesh)
        optimizer = peer.make(model)
        weights = [weight_of(param) for param in controlled(optimizer)] if peer.rules else []
        return cls(peer, model, optimizer, [sent(weights, rule) for rule in peer.rules])

    def backward(self, text: Tensor) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()).backward()

    def timed(self, watch: Stopwatch, text: Tensor, turn: int) -> None:
        """A round: forward and backward, the step, and what it sends by itself."""
        before = _together(watch, lambda: self.backward(text))
        step = _together(watch, self.optimizer.step)
        self.times["step"].append(step)
        self.times["train"].append(before + step)
        payloads = self.payloads[turn % len(self.payloads)] if self.payloads else []
        for key in ("now", "late"):
            sums = [_buffer(payload, text.device) for payload in payloads if payload.late == (key == "late")]
            self.times[key].append(_together(watch, partial(_summed, sums)) if sums else 0.0)
        stats = [self.optimizer.state[p].get(STATS) for p in self.model.parameters()]
        made = [float(one[Stat.PAIRS]) for one in stats if one is not None and one[Stat.PAIRS] > 0]
        self.pairs += [statistics.fmean(made)] if made else []

    def medians(self) -> dict[str, float]:
        """Where steps differ in turn, the mean of the medians of each sort."""
        count = max(len(self.payloads), 1)
        turns = {key: [times[i::count] for i in range(min(count, len(times)))] for key, times in self.times.items()}
        return {key: statistics.fmean(map(statistics.median, each)) for key, each in turns.items()}


def _together(watch: Stopwatch, work: Callable[[], object]) -> float:
    dist.barrier()
    return watch.wall(work)


def _buffer(payload: Payload, device: torch.device) -> Tensor:
    return torch.zeros(payload.bytes // payload.dtype.itemsize, dtype=payload.dtype, device=device)


def _summed(buffers: Sequence[Tensor]) -> None:
    for buffer in buffers:
        dist.all_reduce(buffer)


def measure(width: int, rounds: int, warm_up: int, device: str) -> list[dict[str, Any]]:
    """On every rank: a row for each optimizer, of medians over the rounds after so many steps with control."""
    warnings.simplefilter("ignore")
    place = torch.device(f"cuda:{dist.get_rank()}" if device == "cuda" else device)
    watch, mesh = Stopwatch(place), mesh_of(False, device)
    whole = workloads.gpt(width=width, tokens=TOKENS, length=LENGTH).model.to(place)
    runs = [Run.of(peer, whole, mesh) for peer in PEERS]
    random = torch.Generator().manual_seed(dist.get_rank())
    for turn in range(-warm_up, rounds):
        text = torch.randint(TOKENS, (BATCH, LENGTH + 1), generator=random).to(place)
        for run in runs:
            if turn >= 0:
                run.timed(watch, text, turn)
            elif run.peer.rules or turn == -1:
                run.backward(text)
                run.optimizer.step()
    return _rows(runs)


def _rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    found = {run.peer.name: run.medians() for run in runs}
    rows = []
    for run in runs:
        mine, base = found[run.peer.name], found[run.peer.base]
        spread = summary(run.times["step"])
        assert spread is not None
        row: dict[str, Any] = {"name": run.peer.name, "base": run.peer.base}
        row |= {"step_ms": 1e3 * mine["step"], "step_ratio": mine["step"] / base["step"], "spread": spread.spread}
        row |= {"train_ms": 1e3 * mine["train"], "train_ratio": mine["train"] / base["train"]}
        if run.payloads:
            row |= {f"{key}_ms": 1e3 * mine[key] for key in ("now", "late") if mine[key]}
            row |= {"now_of_step": 100 * mine["now"] / mine["step"]}
            row |= {"sums_of_train": 100 * (mine["now"] + mine["late"]) / mine["train"]}
            row |= {"pairs": statistics.fmean(run.pairs)} if run.pairs else {}
        rows.append(row)
    return rows


COLUMNS = {
    "name": "optimizer",
    "base": "base",
    "step_ms": "step (ms)",
    "step_ratio": "step / base",
    "spread": "± (%)",
    "train_ms": "training step (ms)",
    "train_ratio": "training step / base",
    "now_ms": "sums now (ms)",
    "late_ms": "late (ms)",
    "now_of_step": "sums now, of the step (%)",
    "sums_of_train": "all sums, of a training step (%)",
    "pairs": "pairs of products",
}
