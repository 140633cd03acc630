"""A report: rows, as a table to read and as dictionaries, CSV and JSON to go on with."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from ..columns import in_columns
from .naming import distinct, shortened

NAME_WIDTH = 40

PathOrFile = str | os.PathLike[str] | TextIO


@dataclass(frozen=True)
class SpectralRow:
    """One matrix. Norms are those of the matrix view."""

    name: str
    """The parameter's, and which of its matrices where it holds several: ``in_proj_weight[0]``."""
    shape: tuple[int, ...]
    """``(out, in, *kernel)``, whatever order the parameter has."""
    sigma: float
    """Its largest singular value now, measured afresh."""
    target: float | None
    """sigma*, or F* under Frobenius scaling; None where the rule has none (a penalty), or before the first step."""
    residual: float
    """``‖Wᵀu₁ − σ₁v₁‖ / σ₁`` of that measurement."""
    stable_rank: float
    """``(‖W‖_F / σ₁)²``; nan for a zero matrix."""
    frobenius: float
    finite: bool
    """False where the weight holds a non-finite entry and is left alone."""
    capped: bool
    """True while a matrix that was all zero at the start is only capped."""
    spectrum: tuple[float, ...] = ()
    """The leading singular values, ``sigma`` first; fewer where the matrix has no more."""


class SpectralReport(list[SpectralRow]):
    """The rows of :func:`specopt.spectral_report`: a list, and a table when printed.

    ``SpectralReport(sorted(report, key=...))`` prints a selection of rows.
    """

    def table(self, name_width: int = NAME_WIDTH) -> str:
        """A line for each matrix; names cut to ``name_width`` characters."""
        if not self:
            return "no matrix is controlled"
        most = max(len(row.spectrum) for row in self)
        lower = {0: [], 1: [], 2: ["σ2/σ1"]}.get(most, [f"σ2..σ{most} / σ1"])
        head = ["name", "shape", "sigma", "target", "residual", "stable rank", "Frobenius", *lower, ""]
        names = shortened([row.name for row in self], name_width)
        rows = [head, *(_cells(name, row, len(lower)) for name, row in zip(names, self, strict=True))]
        return in_columns(rows, left=(0, 1, *range(7, len(head))))

    def __str__(self) -> str:
        return self.table()

    def to_dicts(self) -> list[dict[str, Any]]:
        """A dictionary of each row's fields."""
        return [asdict(row) for row in self]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The rows' fields by name; where two groups use one name, the later is ``name (2)``."""
        rows = self.to_dicts()
        for row in rows:
            del row["name"]
        return dict(zip(distinct([row.name for row in self]), rows, strict=True))

    def to_csv(self, path_or_file: PathOrFile) -> None:
        """A header and a line for each matrix. The shape is written ``64x3x3x3``, the spectrum in columns ``sigma_1``
        and on; a cell is empty where there is no value, and ``nan`` or ``inf`` where that is the value."""
        columns = [f"sigma_{i + 1}" for i in range(max((len(row.spectrum) for row in self), default=0))]
        fields = [name for name in SpectralRow.__dataclass_fields__ if name != "spectrum"]
        with _opened(path_or_file) as file:
            writer = csv.DictWriter(file, [*fields, *columns], restval="", lineterminator="\n")
            writer.writeheader()
            for row in self.to_dicts():
                row["shape"] = "x".join(map(str, row["shape"]))
                spectrum = row.pop("spectrum")
                writer.writerow({**row, **dict(zip(columns, spectrum, strict=False))})

    def to_json(self, path_or_file: PathOrFile, *, indent: int | None = 2) -> None:
        """A list of the rows' fields, as JSON that every parser takes: ``null`` for what is absent, nan or infinite."""
        with _opened(path_or_file) as file:
            json.dump(_finite(self.to_dicts()), file, indent=indent, allow_nan=False, ensure_ascii=False)
            file.write("\n")


def _cells(name: str, row: SpectralRow, lower: int) -> list[str]:
    ratios = [f"{value / row.sigma:.2f}" if 0 < row.sigma < math.inf else "-" for value in row.spectrum[1:]]
    notes = ([] if row.finite else ["not finite"]) + (["capped"] if row.capped else [])
    return [
        name,
        "x".join(map(str, row.shape)),
        _number(row.sigma, 4),
        "-" if row.target is None else _number(row.target, 4),
        "-" if math.isnan(row.residual) else f"{row.residual:.1e}",
        _number(row.stable_rank, 1),
        _number(row.frobenius, 3),
        *([" ".join(ratios)] * lower),
        ", ".join(notes),
    ]


def _number(value: float, decimals: int) -> str:
    """With as many decimals in every line, so that points stand under points, while that shows the number."""
    if math.isnan(value):
        return "-"
    return f"{value:.{decimals}f}" if value == 0 or 1e-2 <= abs(value) < 1e5 else f"{value:.3e}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _opened(path_or_file: PathOrFile) -> Iterator[TextIO]:
    if isinstance(path_or_file, (str, os.PathLike)):
        with open(path_or_file, "w", encoding="utf-8", newline="") as file:
            yield file
    elif hasattr(path_or_file, "write"):
        yield path_or_file
    else:
        raise TypeError(f"path_or_file must be a path or a text file, got {type(path_or_file).__name__}")
