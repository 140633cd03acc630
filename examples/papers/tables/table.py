"""Results as markdown: for each row paper and ours side by side, and before them rows that read best in one table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import published
from ..data import CLASSES
from ..published import Cell
from ..recipe import divided
from ..recipes import rows as recipes_of
from ..runs.member import GRADIENTS, TRAIN_EVALUATED
from .grids import GRIDS, NOTES_OF_GRIDS, Grid, grid_table, lending_note, lent
from .markdown import NOT_RUN, NOTHING, folded, label, markdown_table, over_seeds, spread
from .results import Row, Run, in_order, largest_first

Pictures = Sequence[tuple[str, str]]
"""What each figure shows, and its address."""
Told = Callable[[Cell], tuple[float | None, float | None]]
"""A published number, and its standard deviation over runs where that is told too."""

ACCURACY: dict[str, Told] = {
    "paper": lambda cell: (cell.accuracy, cell.accuracy_std),
    "replication": lambda cell: (cell.replication, cell.replication_std),
}


@dataclass(frozen=True)
class Measure:
    """A column of what was found here, and before it columns of what is published, where there is any of the row."""

    head: str
    here: Callable[[Run], float | None]
    told: Mapping[str, Told] = field(default_factory=dict)
    """By who tells it."""
    digits: int = 3
    """Behind the point."""


def measures(row: Row) -> list[Measure]:
    threshold, extra = row.gap_threshold(), extra_digits(row.name)
    gap = f"gap above {NOTHING if threshold is None else f'{threshold:g}'}"

    def gap_here(run: Run) -> float | None:
        return None if threshold is None else run.gap(threshold)

    return [
        Measure("test accuracy", lambda run: run.last("test_accuracy"), ACCURACY, 3 + extra),
        Measure("test loss", lambda run: run.last("test_loss"), {"paper": lambda cell: (cell.loss, None)}, 2 + extra),
        Measure(gap, gap_here, {"paper": lambda cell: (cell.gap, None)}, 3 + extra),
        Measure("mean σ₁", lambda run: run.last("sigma_mean"), {"paper": lambda cell: (cell.sigma, None)}, 2),
        Measure("deviation of σ₁", late_deviation, {"paper": lambda cell: (cell.sigma_deviation, None)}, 2),
        Measure("stable rank", lambda run: over_layers(run, "stable_rank"), digits=1),
        Measure("rank", lambda run: over_layers(run, "rank"), digits=0),
        Measure("gradient norm", lambda run: run.last("gradient_norm")),
    ]


def extra_digits(row: str) -> int:
    """One more of accuracies and losses where deviations over runs are published: where they are that small."""
    cells = published.CELLS.get(row, {}).values()
    return int(any(told(cell)[1] is not None for cell in cells for told in ACCURACY.values()))


NOTES = f"""\
Mean ± standard deviation over seeds. Test accuracy, test loss and gradient norm (the mean l2 norm of a test loss'
gradient by its normalized input, of at most {GRADIENTS:,} test images) are those after the last epoch. Gap: the least
training less test accuracy, the former of at most {TRAIN_EVALUATED:,} training images, over measured epochs (each, or
every n-th) whose test accuracy is above the threshold. That is the paper's at full scale and length; else one for all
methods of the row, the least over the paper's methods of the mean best test accuracy, less 0.01, rounded down to 0.01,
of runs that learned: their losses stayed finite, and their test accuracy came above twice that of chance. Mean σ₁,
stable rank and rank: over layers, after the last epoch; deviation of σ₁: over layers, the mean of the last half of the
epochs. Time: of training steps over that of the first method's, methods taken in turn, the median over turns; a turn is
as many steps as the longest interval at which one of the methods does something, one at least."""


def late_deviation(run: Run) -> float | None:
    late = [value for value in run.late("sigma_deviation", 1 / 2) if value is not None]
    return statistics.fmean(late) if late else None


def over_layers(run: Run, name: str) -> float | None:
    """The mean after the last epoch."""
    values = [layer[name][-1] for layer in run.layers.values()]
    return None if not values or None in values else statistics.fmean(values)


# --- a row ------------------------------------------------------------------------------------------------------------


def row_section(row: Row, figures: Pictures = ()) -> str:
    """Of one row at one scale."""
    return "\n\n".join([f"### `{row.name}`, {row.size_in_words}", row_table(row), facts(row), *pictures(figures)])


def pictures(figures: Pictures) -> list[str]:
    return [f"![{what}]({address})" for what, address in figures]


def row_table(row: Row) -> str:
    """A line for each method, those not run among them."""
    methods = [*dict.fromkeys([*stated_methods(row.name), *row.methods])]
    cells = {method: published.cell(row.name, method) for method in methods}
    asked = [(measure, sources(measure, cells)) for measure in measures(row)]
    head = ["method", "seeds"]
    for measure, known in asked:
        first, *others = [*known, "here"]
        head += [f"{measure.head}: {first}", *others] if known else [measure.head]
    lines = [[*head, "time"]]
    for method in methods:
        runs = list(row.of(method).values())
        line = [label(method, row.table), str(len(runs)) if runs else NOT_RUN]
        for measure, known in asked:
            line += [published_number(measure, source, cells[method]) for source in known]
            line += [over_seeds([measure.here(run) for run in runs], measure.digits)]
        time = row.times.get(method)
        lines.append([*line, NOTHING if time is None else f"{time:.2f}"])
    return markdown_table(lines)


def stated_methods(row: str) -> list[str]:
    """Of the row's recipes, but those with the defects of published code, which are shown where they were run."""
    recipes = recipes_of(row.partition("/")[0]).get(row, ())
    return [recipe.method.name for recipe in recipes if not recipe.published]


def sources(measure: Measure, cells: Mapping[str, Cell | None]) -> list[str]:
    """Those that tell the measure of any method."""
    known = [cell for cell in cells.values() if cell is not None]
    return [source for source, told in measure.told.items() if any(told(cell)[0] is not None for cell in known)]


def published_number(measure: Measure, source: str, cell: Cell | None) -> str:
    value, deviation = (None, None) if cell is None else measure.told[source](cell)
    if value is None:
        return NOTHING
    return f"{value:g}" if deviation is None else spread(value, deviation, measure.digits)


def facts(row: Row) -> str:
    """Seeds, schedule, images, network, hardware, versions and commit."""
    protocol, about = row.protocol, [run.about for run in row.runs]
    train = trained_on(protocol)
    options = ", ".join(f"{name} {value:g}" for name, value in protocol["model_options"].items())
    parts = [
        f"seeds {', '.join(map(str, row.seeds))}",
        f"{protocol['epochs']} epochs of batches of {protocol['batch']}",
        f"{images(train, 'training')} and {images(protocol['test'], 'test')} images of {protocol['data']}",
        f"{protocol['model']}{f' ({options})' if options else ''}",
    ]
    if protocol.get("balanced"):
        parts.append("as many training images of each class")
    if protocol["label_noise"]:
        parts.append(f"{protocol['label_noise']:.0%} of the training labels wrong")
    parts += [distinct(one.get("machine") for one in about), f"torch {distinct(one.get('torch') for one in about)}"]
    settings = [one.get("settings") or {} for one in about]
    if any(one.get("bf16") for one in settings):
        parts.append("forward passes in bfloat16")
    last = sum(bool(one.get("channels_last")) for one in settings)
    if last:
        parts.append("channels last" if last == len(settings) else f"channels last in {last} of {len(settings)} runs")
    return f"{'; '.join(parts)}; commit {distinct(one.get('commit') for one in about)}."


def trained_on(protocol: Mapping[str, Any]) -> int | None:
    """Images, None for all; of a balanced choice as many of the recipe's as the classes divide."""
    count: int | None = protocol["train"]
    if count is None or not protocol.get("balanced"):
        return count
    return divided(count, CLASSES[protocol["data"]])


def images(count: int | None, part: str) -> str:
    return f"all {part}" if count is None else f"{count:,} {part}"


def distinct(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None)) or "not known"


# --- a table ----------------------------------------------------------------------------------------------------------


def table_section(
    table: str,
    rows: Sequence[Row],
    *,
    reasons: Mapping[str, str] | None = None,
    figures: Callable[[Row], Pictures] = lambda row: (),
    grid_figures: Callable[[Grid, Sequence[Row]], Pictures] = lambda grid, rows: (),
) -> str:
    """All rows of a table that were run, then those that were not.

    Args:
        rows: in any order, at any scales.
        reasons: by row, why it was not run.
        figures: of a row.
        grid_figures: of a grid, and those of its rows that were run, of one size.
    """
    run = in_order(table, rows)
    grids = GRIDS.get(table, ())
    sections = [section for grid in grids for section in grid_sections(grid, run, figures, grid_figures)]
    if sections:
        sections.append(NOTES_OF_GRIDS)
    gathered = {name for grid in grids for name in grid.rows}
    sections += [row_section(row, figures(row)) for row in run if row.name not in gathered]
    if run:
        sections.append(NOTES)
    absent = [name for name in recipes_of(table) if name not in {row.name for row in run}]
    if absent:
        sections.append("Not run:\n\n" + "\n".join(not_run(name, (reasons or {}).get(name)) for name in absent))
    return "\n\n".join(sections)


def grid_sections(
    grid: Grid,
    run: Sequence[Row],
    figures: Callable[[Row], Pictures],
    grid_figures: Callable[[Grid, Sequence[Row]], Pictures],
) -> list[str]:
    """For each size that any of its rows was run at; all else that is told of a row is folded up."""
    own = [row for row in run if row.name in grid.rows]
    found = []
    for size in dict.fromkeys(row.size_in_words for row in largest_first(own)):
        there = [row for row in own if row.size_in_words == size]
        full = [lent(grid, row, run) for row in there]
        shown = pictures(grid_figures(grid, there))
        each = "\n\n".join(row_section(row, () if shown else figures(row)) for row in there)
        head = f"### {grid.title}, {size}"
        about = [*lending_note(grid, there, full), *shown]
        found.append("\n\n".join([head, grid_table(grid, full), *about, folded("All measures, row by row", each)]))
    return found


def not_run(name: str, reason: str | None) -> str:
    return f"- `{name}`" + (f": {reason}" if reason else "")
