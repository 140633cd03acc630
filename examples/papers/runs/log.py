"""What a run has measured, epoch by epoch, and the files that hold it."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from specopt import SpectralHistory
from specopt.seeing.history import Record

from .checkpoint import write_text

LAYER_VALUES = ("sigma", "stable_rank", "frobenius", "rank")


@dataclass
class Log:
    """Plain lists, which a checkpoint holds and JSON writes. Times are apart: all else is the same in two runs."""

    epochs: list[dict[str, float]] = field(default_factory=list)
    """A row before training, and one after each epoch."""
    layers: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Of each weight matrix, a value for each row of ``epochs``."""
    targets: dict[str, float] = field(default_factory=dict)
    step_ms: list[float] = field(default_factory=list)
    """Milliseconds a training step, the mean of each epoch; of seeds that are trained at once, each one's share."""

    def add(self, row: Mapping[str, float], layers: Mapping[str, Mapping[str, float]]) -> None:
        self.epochs.append(dict(row))
        for name, values in layers.items():
            kept = self.layers.setdefault(name, {quantity: [] for quantity in LAYER_VALUES})
            for quantity in LAYER_VALUES:
                kept[quantity].append(values[quantity])

    def as_dict(self) -> dict[str, Any]:
        """Without times; what is not finite becomes None."""
        layers = {name: values | {"target": self.targets.get(name)} for name, values in self.layers.items()}
        found: dict[str, Any] = finite({"epochs": self.epochs, "layers": layers})
        return found

    def state(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "layers": self.layers, "targets": self.targets, "step_ms": self.step_ms}

    def write(self, folder: Path) -> None:
        """log.csv (a line an epoch), layers.csv (a line an epoch and matrix), log.json (both) and times.csv."""
        write_text(folder / "log.csv", table_of(self.epochs))
        rows = [
            {"epoch": self.epochs[i]["epoch"], "layer": name} | {key: values[key][i] for key in LAYER_VALUES}
            for i in range(len(self.epochs))
            for name, values in self.layers.items()
        ]
        write_text(folder / "layers.csv", table_of(rows))
        write_text(folder / "log.json", json.dumps(self.as_dict(), indent=1, allow_nan=False))
        write_text(folder / "times.csv", table_of([{"epoch": i, "step_ms": t} for i, t in enumerate(self.step_ms, 1)]))

    def median_step(self) -> float | None:
        return statistics.median(self.step_ms) if self.step_ms else None

    def history(self) -> SpectralHistory:
        """For :mod:`specopt.plots`, with epochs as steps."""
        names = tuple(self.layers)
        return SpectralHistory(Record(int(row["epoch"]), names, self._record(i)) for i, row in enumerate(self.epochs))

    def _record(self, i: int) -> dict[str, Any]:
        layers = self.layers.values()
        sigma, stable = (np.array([one[key][i] for one in layers], np.float64) for key in ("sigma", "stable_rank"))
        target = np.array([self.targets.get(name, math.nan) for name in self.layers])
        return {"sigma": sigma, "sigma_after": sigma, "stable_rank": stable, "target": target}


def finite(tree: Any) -> Any:
    """The same with None in place of numbers that JSON does not know."""
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else None
    if isinstance(tree, Mapping):
        return {key: finite(branch) for key, branch in tree.items()}
    return [finite(branch) for branch in tree] if isinstance(tree, list | tuple) else tree


def table_of(rows: list[dict[str, Any]]) -> str:
    """Comma-separated, numbers in full."""
    if not rows:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
