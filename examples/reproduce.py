"""Runs a paper's table and sets paper and ours side by side: python examples/reproduce.py normscale --data-dir data

Every run that is missing is made, row by row and seed by seed over all methods of the row; a call that was stopped, by
--budget or otherwise, goes on where it was. OUT/SCALE then holds the runs, TABLE.md and figures. --record keeps what
was found in a folder of small JSON files, and makes no run that they hold, so that seeds can be added elsewhere;
--render alone writes the tables and figures of docs/results.md anew from them.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from papers import published
from papers.recipe import FULL, SCALES
from papers.recipes import TABLES
from papers.runs.machine import Machine
from papers.tables import records, results
from papers.tables.claims.section import claims_section
from papers.tables.grid_figures import draw_grid
from papers.tables.grids import Grid
from papers.tables.kept import Kept
from papers.tables.page import addressed, rendered
from papers.tables.planning import Plan, planned
from papers.tables.reproducing import TOO_LATE, TOOLS, Outcome, Reproduction, Tools
from papers.tables.row_figures import draw_row
from papers.tables.standing import standing_section
from papers.tables.table import table_section

RECORDED = Path(__file__).parent / "results"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "results.md"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("table", nargs="?", choices=TABLES, metavar="TABLE", help=" or ".join(TABLES))
    made.add_argument("--rows", nargs="+", default=["*"], metavar="PATTERN", help="such as 'vgg-*-b64'")
    made.add_argument("--methods", nargs="+", default=[], metavar="PATTERN", help="all but '*-published' by default")
    made.add_argument("--seeds", type=int, default=3, help="how many: 0, 1, ...")
    made.add_argument("--budget", type=float, metavar="MINUTES", help="stop, to go on later, after so many")
    made.add_argument("--scale", choices=SCALES, default=FULL.name)
    made.add_argument("--epochs", type=int, help="in place of the scale's, for all methods; schedules shrink with them")
    made.add_argument("--together", type=int, default=1, help="seeds trained at once, by stacked networks")
    made.add_argument("--bf16", action="store_true", help="forward passes under autocast to bfloat16")
    made.add_argument("--channels-last", action="store_true")
    made.add_argument("--data-dir", type=Path, help="folder of the data sets, as their publishers' archives unpack")
    made.add_argument("--download", action="store_true", help="get a data set that is not there")
    made.add_argument("--device", default="auto", help="auto, cpu or cuda")
    made.add_argument("--out", type=Path, default=Path("out/papers"))
    made.add_argument(
        "--record",
        type=Path,
        nargs="?",
        const=RECORDED,
        metavar="FOLDER",
        help="keep results, in examples/results, and run none that are kept",
    )
    made.add_argument("--render", action="store_true", help="write docs/results.md anew from what is recorded")
    return made


def checked(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Plan]:
    """Arguments that make sense, and what they ask for; all else ends the program before anything is run."""
    made = parser()
    args = made.parse_args(argv)
    for name, least in (("seeds", 1), ("together", 1), ("epochs", 1), ("budget", 0)):
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:
            made.error(f"--{name} must be {least} or more, got {value}")
    if args.table is None:
        if not args.render:
            made.error(f"TABLE must be one of {', '.join(TABLES)}, where --render is not given")
        if args.rows != ["*"] or args.methods:
            made.error(f"--rows and --methods are of a TABLE, one of {', '.join(TABLES)}")
        folder = args.record or RECORDED
        if not any(folder.glob("*.json")):
            made.error(f"--record {folder}: no folder with recorded results to be rendered")
        return args, {}
    try:
        plan = planned(args.table, rows=args.rows, methods=args.methods, scale=SCALES[args.scale], epochs=args.epochs)
        kept = kept_of(args)
        if args.record is not None:
            writable(args.record, "--record")
        writable(args.out, "--out")
        kept.check(plan, args.seeds)
    except ValueError as error:
        made.error(str(error))
    return args, plan


def kept_of(args: argparse.Namespace) -> Kept:
    machine = Machine(
        args.data_dir, args.download, args.device, args.bf16, channels_last=args.channels_last, together=args.together
    )
    return Kept(folder_of(args), machine, args.record)


def writable(folder: Path, option: str) -> None:
    """
    Raises:
        ValueError: the folder cannot be made, or not be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{option} {folder}: cannot write there ({error.strerror})") from None


def folder_of(args: argparse.Namespace) -> Path:
    """Runs of one scale, number of epochs and precision: such that may stand in one table."""
    name = args.scale + (f"-{args.epochs}-epochs" if args.epochs else "") + ("-bf16" if args.bf16 else "")
    folder: Path = args.out / name
    return folder


def report(args: argparse.Namespace, rows: Sequence[results.Row], outcome: Outcome) -> str:
    """The table's page in the folder of its runs, with figures beside it."""
    folder = folder_of(args)

    def figures(row: results.Row) -> list[tuple[str, str]]:
        return addressed(draw_row(row, folder / "figures"), folder)

    def grid_figures(grid: Grid, there: Sequence[results.Row]) -> list[tuple[str, str]]:
        return addressed(draw_grid(grid, there, folder / "figures"), folder)

    unfinished = [f"- `{row}`: {why}" for row, why in outcome.reasons.items() if row in {one.name for one in rows}]
    parts = [
        f"# {published.SOURCES[args.table]}",
        table_section(args.table, rows, reasons=outcome.reasons, figures=figures, grid_figures=grid_figures),
        *(["Not finished:\n\n" + "\n".join(unfinished)] if unfinished else []),
        "## Claims",
        claims_section(args.table, rows),
        "## Cost and accuracy",
        standing_section([args.table], rows),
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None, tools: Tools = TOOLS) -> None:
    args, plan = checked(argv)
    failed = reproduce(args, plan, tools) if plan else []
    if args.render:
        page = rendered(PAGE.read_text(encoding="utf-8"), args.record or RECORDED, PAGE.parent)
        PAGE.write_text(page, encoding="utf-8")
        print(f"Written: {os.path.relpath(PAGE)}")
    if failed:
        raise SystemExit(f"reproduce.py: error: not finished, as told above: {', '.join(failed)}")


def reproduce(args: argparse.Namespace, plan: Plan, tools: Tools) -> list[str]:
    """Returns rows that something else than the budget has kept from being finished."""
    deadline = math.inf if args.budget is None else time.monotonic() + 60 * args.budget
    kept = kept_of(args)
    try:
        outcome = Reproduction(kept, args.seeds, deadline, tools).run(plan)
    except BaseException:  # an interrupt too leaves what is finished
        keep(args, plan, kept, Outcome())
        raise
    keep(args, plan, kept, outcome)
    if outcome.stopped:
        print("The budget is spent; the same command goes on.")
    return [row for row, why in outcome.reasons.items() if why != TOO_LATE]


def keep(args: argparse.Namespace, plan: Plan, kept: Kept, outcome: Outcome) -> None:
    """Records all rows of which there is any, and writes the report; what cannot be kept is told at the end."""
    rows, lost = kept.rows(plan, args.seeds), []
    for row in rows if args.record is not None else ():
        try:
            print(f"Recorded: {records.record(args.record, row)}")
        except (ValueError, OSError) as error:
            lost.append(str(error))
    try:
        print(f"Written: {write_report(args, rows, outcome)}")
    except OSError as error:
        lost.append(str(error))
    if lost:
        raise SystemExit("\n".join(f"reproduce.py: error: {error}" for error in lost))


def write_report(args: argparse.Namespace, rows: Sequence[results.Row], outcome: Outcome) -> Path:
    path = folder_of(args) / f"{args.table}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report(args, rows, outcome), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
