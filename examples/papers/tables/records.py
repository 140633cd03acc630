"""Results in files, as --record keeps them: a file holds one row at one scale and number of epochs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..recipe import completed
from ..runs.checkpoint import write_text
from .results import OWN, Row, Run


def path_of(folder: Path, row: Row) -> Path:
    return folder / f"{row.name.replace('/', '-')}-{row.size}.json"


def read(path: Path) -> Row:
    """
    Raises:
        ValueError: a file that does not hold a row.
    """
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        protocol = {key: value for key, value in completed(plain["protocol"]).items() if key not in OWN}
        runs = tuple(Run(**{**run, "about": run["about"] | known(run["about"])}) for run in plain["runs"])
        return Row(**{**plain, "protocol": protocol, "runs": runs})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} must hold a row's results, as --record writes them, and does not: {error}") from None


def known(about: Mapping[str, Any]) -> dict[str, Any]:
    """Of what a run has of its own, the method as it is written now."""
    return {"method": completed(about)["method"]} if "method" in about else {}


def read_all(folder: Path) -> list[Row]:
    return [read(path) for path in sorted(folder.glob("*.json"))]


def recorded(folder: Path, row: Row, methods: Mapping[str, Mapping[str, Any]]) -> Row | None:
    """What is recorded of the row at this size, which runs of ``row`` may join.

    Args:
        methods: what the recipe of each has of its own (:func:`own_of`).

    Raises:
        ValueError: it is of another protocol, or of other settings of a method.
    """
    path = path_of(folder, row)
    if not path.exists():
        return None
    there = read(path)
    told = [
        f"{key} {there.protocol.get(key)!r} instead of {value!r}"
        for key, value in row.protocol.items()
        if there.protocol.get(key) != value
    ]
    told += [
        f"other settings of {method}"
        for method, own in methods.items()
        if any(run.about.get(key) != value for run in there.of(method).values() for key, value in own.items())
    ]
    if told:
        raise ValueError(f"{path} holds runs with {', '.join(told)}: move it away to record these")
    return there


def record(folder: Path, row: Row) -> Path:
    """Writes the row's file. Runs that it holds already stay, but for those that ``row`` has anew."""
    there = recorded(folder, row, {run.method: {key: run.about[key] for key in OWN} for run in row.runs})
    methods = row.methods
    if there is not None:
        methods = [*there.methods, *methods]  # in the order in which they came
        new = {(run.method, run.seed) for run in row.runs}
        kept = tuple(run for run in there.runs if (run.method, run.seed) not in new)
        row = replace(row, runs=kept + row.runs, times={**there.times, **row.times})
    runs = sorted(row.runs, key=lambda run: (run.seed, methods.index(run.method)))
    times = {method: float(f"{value:.3g}") for method, value in row.times.items()}
    path = path_of(folder, row)
    plain = asdict(replace(row, runs=tuple(runs), times=times))
    write_text(path, in_lines(plain) + "\n")
    return path


def in_lines(plain: Any) -> str:
    """JSON with a list of numbers on one line."""
    text = json.dumps(plain, indent=1, allow_nan=False)
    return re.sub(r"\[[^\[\]{}\"]*\]", lambda found: f"[{' '.join(found[0][1:-1].split())}]", text)
