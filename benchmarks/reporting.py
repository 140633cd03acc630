"""What a benchmark leaves behind: a table, a JSON file, a plot; and the tables of docs/performance.md and
docs/distributed.md.

    python -m benchmarks.reporting          writes the pages' tables anew from benchmarks/results

A report is one dictionary: what it was made with (:func:`about`), ``columns`` (key and head, unit included),
``results`` (a dictionary for each row) and ``notes``. A value that is None was not measured; a key that is absent does
not apply.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from examples.papers.runs.machine import described

Report = dict[str, Any]

RESULTS = Path(__file__).parent / "results"
"""What is recorded."""
OUT = Path("out/bench")
"""Where else the benchmarks write to, unless told."""
PAGES = tuple(Path(__file__).parents[1] / "docs" / f"{name}.md" for name in ("performance", "distributed"))
NOT_MEASURED = "not measured"
PACKAGES = ("torch", "triton", "numpy", "pytorch_optimizer")
BAR, SLOW_BAR, GOAL = "#0072B2", "#999999", "#D55E00"  # Okabe and Ito's
TIME = re.compile(r"_(ms|us)$")


def about(benchmark: str, device: torch.device) -> Report:
    """What was run, when, on what and with which versions."""
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    return {
        "benchmark": benchmark,
        "command": command(),
        "date": date,
        **versions,
        "device": described(str(device)),
        "gpu": device.type == "cuda",
    }


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """For ``type=`` of an option: a number from ``least`` up, to ``most``."""

    def number(text: str) -> int:
        wanted = f"{least} or more" if most is None else f"from {least} to {most}"
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
        return value

    return number


def command() -> str:
    """How the program was called, without where its folders are."""
    words = sys.argv[1:]
    for folder, instead in (("--out", []), ("--data-dir", ["--data-dir", "DIR"])):
        if folder in words:
            at = words.index(folder)
            words[at : at + 2] = instead
    return shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *words])


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# --- tables --------------------------------------------------------------------------------------------------------


def cell(row: Mapping[str, Any], key: str) -> str:
    """Three digits; "-" where the column does not apply to the row."""
    if key not in row:
        return "-"
    value = row[key]
    if value is None:
        return NOT_MEASURED
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:#.3g}".rstrip(".")


def cells(report: Mapping[str, Any], keys: Sequence[str] | None = None) -> list[list[str]]:
    """The heads, then each row."""
    columns = report.get("columns") or {key: key.replace("_", " ") for key in report["results"][0]}
    keys = list(columns) if keys is None else keys
    return [[columns[key] for key in keys], *([cell(row, key) for key in keys] for row in report["results"])]


def text(report: Mapping[str, Any]) -> str:
    """The table for a terminal, what it was made on above it and the notes below."""
    lines = cells(report)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join([name.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]).rstrip() for name, *rest in lines]
    title = f"{report.get('title', report['benchmark'])}; {report['device']}, torch {report['torch']}"
    return "\n".join([title, table[0], "-" * len(table[0]), *table[1:], "", *report.get("notes", ())])


def markdown(report: Mapping[str, Any]) -> str:
    """The table for the page. Times are left out where they were not taken on a GPU: there only ratios compare."""
    head = cells(report)[0]
    keys = list(report.get("columns") or report["results"][0])
    shown = [key for key in keys if report.get("gpu") or not TIME.search(key)]
    head, *rows = cells(report, shown)
    rule = ["---", *["---:"] * (len(head) - 1)]
    table = ["| " + " | ".join(line) + " |" for line in (head, rule, *rows)]
    made = f"{report.get('title', '')}. {report['device']}, torch {report['torch']}, Python {report['python']}"
    date, command = report.get("date", ""), report.get("command", "")
    made = made.removeprefix(". ") + (f"; {date}" if date else "") + (f"; `{command}`" if command else "") + "."
    return "\n".join([made, "", *table, *(f"\n{note}" for note in report.get("notes", ()))])


# --- files ---------------------------------------------------------------------------------------------------------


def write(report: Report, name: str, out: Path) -> Path:
    """``out/name.json``."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


def publish(report: Report, name: str, out: Path, bars: Mapping[str, Any] | None = None) -> None:
    """Prints the table, writes the JSON file and, given the arguments of :func:`plot_bars`, the plot."""
    print(text(report), flush=True)
    print(f"wrote {write(report, name, out)}")
    if bars:
        plot_bars(out / f"{name}.png", **bars)


def plot_bars(
    path: Path,
    *,
    title: str,
    label: str,
    values: Mapping[str, float | None],
    goals: Mapping[str, float] | None = None,
    log: bool = False,
) -> None:
    """Horizontal bars, first on top; a mark where a bar has a goal. What was not measured has no bar, but its name."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullFormatter, StrMethodFormatter
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    figure = Figure(figsize=(9, 1.2 + 0.34 * len(values)), layout="constrained")
    axes = figure.add_subplot()
    names = [name if value is not None else f"{name} ({NOT_MEASURED})" for name, value in values.items()]
    places = range(len(names))
    axes.barh(places, [value or 0.0 for value in values.values()], color=BAR, height=0.6)
    for place, (name, value) in enumerate(values.items()):
        if value is not None:
            axes.annotate(f"{value:.3g}", (value, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
        if goals and name in goals:
            axes.plot([goals[name]] * 2, [place - 0.42, place + 0.42], color=GOAL, linewidth=2)
    if goals:
        axes.plot([], [], color=GOAL, linewidth=2, label="goal")
        axes.legend(loc="lower right", frameon=False)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.margins(x=0.12)  # room for the numbers behind the bars
    if log and any(values.values()):
        low, high = (end(value for value in values.values() if value) for end in (min, max))
        axes.set(xscale="log", xlim=(0.5 * low, high * (2 * high / low) ** 0.12))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(title=title, xlabel=label)
    axes.title.set_fontsize(10)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


# --- the pages -----------------------------------------------------------------------------------------------------

BLOCK = re.compile(r"<!-- table: (?P<name>\w+) \| (?P<command>.*?) -->\n.*?<!-- end -->", re.DOTALL)
"""A table of the page: the JSON file it comes from and the command that makes it."""


def refreshed(page: str, results: Path = RESULTS) -> str:
    """The page with every table as its JSON file has it; "not measured" where there is none."""

    def table(block: re.Match[str]) -> str:
        path = results / f"{block['name']}.json"
        rendered = f"Not measured; made by `{block['command']}`."
        if path.exists():
            rendered = markdown(json.loads(path.read_text()))
        return f"<!-- table: {block['name']} | {block['command']} -->\n{rendered}\n<!-- end -->"

    return BLOCK.sub(table, page)


if __name__ == "__main__":
    argparse.ArgumentParser(
        prog="python -m benchmarks.reporting",
        description=f"writes the tables of {', '.join(page.name for page in PAGES)} anew from {RESULTS.name}/*.json",
    ).parse_args()
    for page in PAGES:
        page.write_text(refreshed(page.read_text()))
