"""Results as markdown: for each row paper and ours side by side, for each claim its verdict."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import published
from .claims import Verdict, additions, verdicts
from .member import GRADIENTS, TRAIN_EVALUATED
from .published import Cell
from .recipe import SCALES
from .recipes import rows as recipes_of
from .results import Row, Run

NOTHING = "–"
NOT_RUN = "not run"

LABELS = {
    "weight-decay": "weight decay",
    "snr": "SNR",
    "snr-adamw": "SNR on AdamW (ours)",
    "cap": "cap (ours)",
    "ours": "cap (ours)",
    "frobenius": "Frobenius",
}


@dataclass(frozen=True)
class Measure:
    """A column or two: what the paper has, where it has any of the row, and what was found here."""

    head: str
    here: Callable[[Run], float | None]
    paper: Callable[[Cell], float | None]
    digits: int = 3
    """Behind the point."""


def measures(row: Row) -> list[Measure]:
    threshold = row.gap_threshold()
    head = f"gap above {NOTHING if threshold is None else f'{threshold:g}'}"
    return [
        Measure("test accuracy", lambda run: run.last("test_accuracy"), lambda cell: cell.accuracy),
        Measure("test loss", lambda run: run.last("test_loss"), lambda cell: cell.loss, 2),
        Measure(head, lambda run: None if threshold is None else run.gap(threshold), lambda cell: cell.gap),
        Measure("mean σ₁", lambda run: run.last("sigma_mean"), lambda cell: cell.sigma, 2),
        Measure("deviation of σ₁", late_deviation, lambda cell: cell.sigma_deviation, 2),
        Measure("stable rank", lambda run: over_layers(run, "stable_rank"), lambda cell: None, 1),
        Measure("rank", lambda run: over_layers(run, "rank"), lambda cell: None, 0),
        Measure("gradient norm", lambda run: run.last("gradient_norm"), lambda cell: None),
    ]


NOTES = f"""\
Mean ± standard deviation over seeds. Test accuracy, test loss and gradient norm (the mean l2 norm of a test loss'
gradient by its normalized input, of at most {GRADIENTS:,} test images) are those after the last epoch. Gap: the least
training less test accuracy, the former of at most {TRAIN_EVALUATED:,} training images, over epochs whose test accuracy
is above the threshold. That is the paper's at full scale and length; else one for all methods of the row, the least
over the paper's methods of the mean best test accuracy, less 0.01, rounded down to 0.01, of runs that learned: their
losses stayed finite, and their test accuracy came above twice that of chance. Mean σ₁, stable rank and rank: over
layers, after the last epoch; deviation of σ₁: over layers, the mean of the last half of the epochs. Time: of training
steps over that of the first method's, methods taken in turn, the median over turns; a turn is as many steps as the
longest interval at which one of the methods does something, one at least."""


def late_deviation(run: Run) -> float | None:
    values = run.trained("sigma_deviation")
    late = [value for value in values[len(values) // 2 :] if value is not None]
    return statistics.fmean(late) if late else None


def over_layers(run: Run, name: str) -> float | None:
    """The mean after the last epoch."""
    values = [layer[name][-1] for layer in run.layers.values()]
    return None if not values or None in values else statistics.fmean(values)


# --- a row ------------------------------------------------------------------------------------------------------------


def row_section(row: Row, figures: Sequence[tuple[str, str]] = ()) -> str:
    """Of one row at one scale.

    Args:
        figures: what each shows, and its address.
    """
    pictures = [f"![{what}]({address})" for what, address in figures]
    return "\n\n".join([f"### `{row.name}`, {row.size_in_words}", row_table(row), facts(row), *pictures])


def row_table(row: Row) -> str:
    """A line for each method, those not run among them."""
    asked = measures(row)
    methods = [*dict.fromkeys([*stated_methods(row.name), *row.methods])]
    cells = {method: published.cell(row.name, method) for method in methods}
    with_paper = [any(cell is not None and each.paper(cell) is not None for cell in cells.values()) for each in asked]
    head = ["method", "seeds"]
    for each, has_paper in zip(asked, with_paper, strict=True):
        head += [f"{each.head}: paper", "here"] if has_paper else [each.head]
    lines = [[*head, "time"]]
    for method in methods:
        runs, cell = list(row.of(method).values()), cells[method]
        line = [label(method), str(len(runs)) if runs else NOT_RUN]
        for each, has_paper in zip(asked, with_paper, strict=True):
            line += [of_paper(each, cell)] if has_paper else []
            line += [over_seeds([each.here(run) for run in runs], each.digits)]
        time = row.times.get(method)
        lines.append([*line, NOTHING if time is None else f"{time:.2f}"])
    return markdown_table(lines)


def stated_methods(row: str) -> list[str]:
    """Of the row's recipes, but those with the defects of published code, which are shown where they were run."""
    recipes = recipes_of(row.partition("/")[0]).get(row, ())
    return [recipe.method.name for recipe in recipes if not recipe.published]


def label(method: str) -> str:
    stated = method.removesuffix("-published")
    return LABELS.get(stated, stated) + (", as published" if stated != method else "")


def of_paper(measure: Measure, cell: Cell | None) -> str:
    value = None if cell is None else measure.paper(cell)
    return NOTHING if value is None else f"{value:g}"


def over_seeds(values: Sequence[float | None], digits: int) -> str:
    """``0.512 ± 0.004``; how many seeds have a value, where not all have."""
    known = [value for value in values if value is not None]
    if not known:
        return "none" if values else NOTHING
    text = f"{statistics.fmean(known):.{digits}f}"
    if len(known) > 1:
        text += f" ± {statistics.stdev(known):.{digits}f}"
    return text + (f" ({len(known)} of {len(values)})" if len(known) < len(values) else "")


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = lines
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rest))


def facts(row: Row) -> str:
    """Seeds, schedule, images, network, hardware, versions and commit."""
    protocol, about = row.protocol, [run.about for run in row.runs]
    options = ", ".join(f"{name} {value:g}" for name, value in protocol["model_options"].items())
    parts = [
        f"seeds {', '.join(map(str, row.seeds))}",
        f"{protocol['epochs']} epochs of batches of {protocol['batch']}",
        f"{images(protocol['train'], 'training')} and {images(protocol['test'], 'test')} images of {protocol['data']}",
        f"{protocol['model']}{f' ({options})' if options else ''}",
    ]
    if protocol["label_noise"]:
        parts.append(f"{protocol['label_noise']:.0%} of the training labels wrong")
    parts += [distinct(one.get("machine") for one in about), f"torch {distinct(one.get('torch') for one in about)}"]
    if any((one.get("settings") or {}).get("bf16") for one in about):
        parts.append("forward passes in bfloat16")
    return f"{'; '.join(parts)}; commit {distinct(one.get('commit') for one in about)}."


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
    figures: Callable[[Row], Sequence[tuple[str, str]]] = lambda row: (),
) -> str:
    """All rows of a table that were run, then those that were not.

    Args:
        rows: in any order, at any scales.
        reasons: by row, why it was not run.
        figures: of a row, as :func:`row_section` takes them.
    """
    order = list(recipes_of(table))
    run = [row for row in largest_first(rows) if row.runs and row.name in order]
    run.sort(key=lambda row: order.index(row.name))
    sections = [row_section(row, figures(row)) for row in run]
    if run:
        sections.append(NOTES)
    absent = [name for name in order if name not in {row.name for row in run}]
    if absent:
        sections.append("Not run:\n\n" + "\n".join(not_run(name, (reasons or {}).get(name)) for name in absent))
    return "\n\n".join(sections)


def largest_first(rows: Iterable[Row]) -> list[Row]:
    """By scale; of one scale, its own number of epochs before others, and those from the longest on."""
    scales = list(SCALES)
    return sorted(rows, key=lambda row: (scales.index(row.scale), row.size != row.scale, -int(row.protocol["epochs"])))


def not_run(name: str, reason: str | None) -> str:
    return f"- `{name}`" + (f": {reason}" if reason else "")


# --- claims -----------------------------------------------------------------------------------------------------------


def claims_section(table: str, rows: Sequence[Row]) -> str:
    """A verdict for each claim and each size that anything of the table was run at, and what it rests on; then what
    ours adds."""
    run = [row for row in largest_first(rows) if row.runs and row.name.startswith(f"{table}/")]
    sizes = dict.fromkeys(row.size_in_words for row in run)
    by_size = {size: [row for row in run if row.size_in_words == size] for size in sizes}
    found = {size: verdicts(table, there) for size, there in by_size.items()}
    parts = [verdict_table(found or {"nothing run": verdicts(table, [])})]
    parts += [details(f"Comparisons, {size}", some) for size, some in found.items()]
    for size, there in by_size.items():
        parts += [*of_published_code(table, size, there), *of_ours(table, size, there)]
    return "\n\n".join(parts)


def verdict_table(found: Mapping[str, Sequence[Verdict]]) -> str:
    """A column for each size."""
    head = ["claim", "", *found]
    lines = [
        [one[0].claim, one[0].text, *(f"**{each.verdict}** ({tally(each)})" for each in one)]
        for one in zip(*found.values(), strict=True)
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


def of_published_code(table: str, size: str, rows: Sequence[Row]) -> list[str]:
    """The claims on runs with the defects of the published code, where there are any."""
    if not any(run.method.endswith("-published") for row in rows for run in row.runs):
        return []
    found = verdicts(table, rows, published=True)
    words = "; ".join(f"{each.claim}: {each.verdict}" for each in found)
    return [f"With the defects of the published code, {size}: {words}.", details("Comparisons", found)]


def of_ours(table: str, size: str, rows: Sequence[Row]) -> list[str]:
    found = additions(table, rows)
    if not found:
        return []
    better = "\n".join(f"- {each.claim}: **{each.verdict}** ({tally(each)})" for each in found)
    what = "Ours more accurate than every method of the paper"
    return [f"{what}, {size}:\n\n{better}", details("Comparisons", found)]


def tally(verdict: Verdict) -> str:
    """How the comparisons came out."""
    signs = [finding.sign for finding in verdict.findings]
    untested = sum(finding.p is None for finding in verdict.findings)
    return f"{signs.count(1)} for, {signs.count(-1)} against, {signs.count(0) - untested} open, {untested} untested"


def details(title: str, found: Iterable[Verdict]) -> str:
    lines = [f"<details><summary>{title}</summary>\n"]
    for each in found:
        lines += [f"{each.claim}: {each.test}.\n", *(f"- {finding}" for finding in each.findings), ""]
    return "\n".join([*lines, "</details>"])
