"""Where records go: a CSV file, TensorBoard, or a function of the user's."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from .history import COLUMNS, EVERYTHING, GRADIENT_NORM, Record


class Sink(Protocol):
    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class CsvFile:
    """A line for each matrix and record: step, name, and what is known. A file that a monitor has written before is
    continued.

    Raises:
        OSError: no file can be opened there.
        ValueError: the file that is there is another.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "a+", encoding="utf-8", newline="")  # noqa: SIM115 -- until close()
        self.writer = csv.DictWriter(self.file, COLUMNS, restval="", lineterminator="\n")
        try:
            self._begin()
        except BaseException:
            self.file.close()
            raise

    def _begin(self) -> None:
        self.file.seek(0)
        header = self.file.readline()
        if not header:
            self.writer.writeheader()
            self.file.flush()
        elif header.rstrip("\r\n") != ",".join(COLUMNS):
            raise ValueError(f"to must name a new file, or one that SpectralMonitor wrote, got {str(self.path)!r}")
        elif not header.endswith("\n"):
            self.file.write("\n")
        else:
            self.file.truncate(self.path.read_bytes().rfind(b"\n") + 1)  # a line that was cut off

    def write(self, record: Record) -> None:
        rows = record.rows()
        self.writer.writerows({"step": record.step, "name": name, **row} for name, row in rows.items())
        self.file.flush()

    def close(self) -> None:
        self.file.close()

    def __str__(self) -> str:
        return str(self.path)


class TensorBoard:
    """Scalars ``sigma/layer.weight`` of anything with ``add_scalar(tag, value, step)``, which is left open."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def write(self, record: Record) -> None:
        for name, row in record.rows().items():
            for quantity, value in row.items():
                tag = GRADIENT_NORM if name == EVERYTHING else f"{quantity}/{name}"
                self.writer.add_scalar(tag, value, record.step)

    def close(self) -> None:
        flush = getattr(self.writer, "flush", None)
        if flush is not None:
            flush()

    def __str__(self) -> str:
        return type(self.writer).__name__


class Function:
    """``function(step, {name: {quantity: value}})``."""

    def __init__(self, function: Callable[[int, dict[str, dict[str, float]]], object]) -> None:
        self.function = function

    def write(self, record: Record) -> None:
        self.function(record.step, record.rows())

    def close(self) -> None:
        pass

    def __str__(self) -> str:
        return getattr(self.function, "__qualname__", type(self.function).__name__)


def sinks_of(to: Any) -> list[Sink]:
    """The sinks that ``to=`` asks for: one of those above, or several.

    Raises:
        OSError, ValueError: a file that cannot be written to.
        TypeError: something else.
    """
    several = isinstance(to, Iterable) and not isinstance(to, (str, Mapping)) and not hasattr(to, "add_scalar")
    sinks: list[Sink] = []
    try:
        for one in to if several else [] if to is None else [to]:
            sinks.append(_sink(one))
    except BaseException:
        for sink in sinks:
            sink.close()
        raise
    return sinks


def _sink(to: Any) -> Sink:
    if isinstance(to, (str, os.PathLike)):
        return CsvFile(to)
    if hasattr(to, "add_scalar"):
        return TensorBoard(to)
    if callable(to):
        return Function(to)
    raise TypeError(
        "to must be the path of a CSV file, an object with add_scalar such as SummaryWriter, a function of a step and "
        f"its rows, or several of these, got {type(to).__name__}"
    )
