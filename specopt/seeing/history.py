"""What a monitor has seen: a record for each step it looked at, as arrays over steps and matrices."""

from __future__ import annotations

import csv
import io
import math
import os
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

QUANTITIES = ("sigma", "sigma_after", "target", "residual", "valid", "capped", "pairs", "frobenius", "stable_rank")
"""Of a matrix in one step:

- ``sigma``: σ₁ as the tracker measured it, before the correction; under a penalty that of the weight which the update
  was about to change. Not known under ``norm="frobenius"``.
- ``sigma_after``: the largest singular value after the correction, as far as the step knows it: the largest Ritz value
  on the CPU. The kernels of a GPU resolve the first direction alone, so where another comes to lie above it, this is a
  lower bound there, low by 2 % in a test. Under a penalty it is ``sigma``.
- ``target``: sigma*, or F* under Frobenius scaling; not known under a rule that has none.
- ``residual``: ``‖Wᵀu₁ − σ₁v₁‖ / σ₁`` of the measured triplet.
- ``valid``: 0 where the weight was not finite and so left alone, else 1.
- ``capped``: 1 while a matrix that was all zero at the start is only capped.
- ``pairs``: pairs of products that the tracker made; a lone half product counts a half.
- ``frobenius``, ``stable_rank``: ``‖W‖_F`` after the step and ``(‖W‖_F / sigma_after)²``; with ``weights=True`` alone.

A matrix that had no gradient has what its last step left.
"""
GRADIENT_NORM = "gradient_norm"
EVERYTHING = "(all)"
"""The name that stands for all parameters together."""
COLUMNS = ("step", "name", *QUANTITIES, GRADIENT_NORM)


@dataclass(frozen=True)
class Record:
    """One step: float64 arrays (matrices,) by quantity, nan where a value is not known or does not exist."""

    step: int
    names: tuple[str, ...]
    values: dict[str, Array]
    gradient_norm: float = math.nan
    """``‖∇L‖₂`` over all parameters of the optimizer."""

    def rows(self) -> dict[str, dict[str, float]]:
        """``{name: {quantity: value}}`` without what is nan; the gradient norm under the name ``(all)``."""
        rows: dict[str, dict[str, float]] = {name: {} for name in self.names}
        for quantity, values in self.values.items():
            for name, value in zip(self.names, values.tolist(), strict=True):
                if not math.isnan(value):
                    rows[name][quantity] = value
        if not math.isnan(self.gradient_norm):
            rows[EVERYTHING] = {GRADIENT_NORM: self.gradient_norm}
        return rows


class SpectralHistory:
    """Records in the order of their steps: ``history["sigma"]`` is an array (steps, matrices).

    A record of a step that has been seen before, as after a checkpoint was loaded, takes the place of that one and all
    later ones.

    Args:
        records: in the order in which they were made.
        keep: at most so many, the oldest dropped first; None for all.
    """

    def __init__(self, records: Iterable[Record] = (), keep: int | None = None) -> None:
        self.records: deque[Record] = deque(maxlen=keep)
        for record in records:
            self.append(record)

    def append(self, record: Record) -> None:
        while self.records and self.records[-1].step >= record.step:
            self.records.pop()
        self.records.append(record)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        """(steps,)."""
        return np.array([record.step for record in self.records], np.int64)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all matrices that were ever seen, in the order in which they came."""
        return tuple(dict.fromkeys(name for record in self.records for name in record.names))

    @property
    def gradient_norm(self) -> Array:
        """(steps,); nan where it was not measured."""
        return np.array([record.gradient_norm for record in self.records], np.float64)

    def __getitem__(self, quantity: str) -> Array:
        """(steps, matrices); nan where a value is not known, or the matrix was not there.

        Raises:
            KeyError: no quantity, naming those there are.
        """
        if quantity not in QUANTITIES:
            raise KeyError(f"quantity must be one of {', '.join(QUANTITIES)}, got {quantity!r}")
        place = {name: i for i, name in enumerate(self.names)}
        found = np.full((len(self.records), len(place)), np.nan)
        for row, record in zip(found, self.records, strict=True):
            if quantity in record.values:
                row[[place[name] for name in record.names]] = record.values[quantity]
        return found

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str]) -> SpectralHistory:
        """What a monitor has written, also in several runs one after the other. A last line that was cut off is left
        out.

        Raises:
            ValueError: a file with another header.
        """
        with open(path, encoding="utf-8", newline="") as file:
            text = file.read()
        reader = csv.reader(io.StringIO(text[: text.rfind("\n") + 1 or None], newline=""))
        if next(reader, []) != list(COLUMNS):
            raise ValueError(f"path must be of a file that SpectralMonitor wrote, got {os.fspath(path)!r}")
        lines = [line for line in reader if len(line) == len(COLUMNS)]
        return cls(_record(int(step), list(of_step)) for step, of_step in groupby(lines, key=lambda line: line[0]))


def _record(step: int, lines: list[list[str]]) -> Record:
    cells = {line[1]: [float(cell or "nan") for cell in line[2:]] for line in lines}
    norm = cells.pop(EVERYTHING, [math.nan])[-1]
    table = np.array(list(cells.values()), np.float64).reshape(len(cells), len(COLUMNS) - 2)
    return Record(step, tuple(cells), dict(zip(QUANTITIES, table.T, strict=False)), norm)
