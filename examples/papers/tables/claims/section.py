"""Claims as markdown: a verdict for each, what it rests on, and what this library's own methods add."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ... import published
from ..markdown import label
from ..results import Row, in_order, largest_first
from . import Verdict, additions, verdicts


def claims_section(table: str, rows: Sequence[Row]) -> str:
    """A verdict for each claim and each size that anything of the table was run at, and what it rests on; then what
    ours adds."""
    run = in_order(table, rows)
    sizes = dict.fromkeys(row.size_in_words for row in largest_first(run))
    by_size = {size: [row for row in run if row.size_in_words == size] for size in sizes}
    found = {size: verdicts(table, there) for size, there in by_size.items()}
    parts = [verdict_table(found or {"nothing run": verdicts(table, [])})]
    parts += [details(f"Comparisons, {size}", some) for size, some in found.items()]
    for size, there in by_size.items():
        parts += [*of_published_code(table, size, there), *of_ours(table, size, there)]
    return "\n\n".join(parts)


def verdict_table(found: Mapping[str, Sequence[Verdict]]) -> str:
    """A column for each size, after that of a published replication where there is one."""
    claims = list(zip(*found.values(), strict=True))
    replicated = any(one[0].claim in published.REPLICATED for one in claims)
    head = ["claim", "", *(["replication"] if replicated else []), *found]
    lines = [
        [
            *(one[0].claim, one[0].text),
            *([published.REPLICATED[one[0].claim]] if replicated else []),
            *(f"**{each.verdict}** ({tally(each)})" for each in one),
        ]
        for one in claims
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
    """In accuracy, by test, and in cost."""
    found = additions(table, rows)
    if not found:
        return []
    better = "\n".join(f"- {each.claim}: **{each.verdict}** ({tally(each)})" for each in found)
    what = "Ours more accurate than every method of the paper"
    return [f"{what}, {size}:\n\n{better}", details("Comparisons", found), *costs(table, size, rows)]


def costs(table: str, size: str, rows: Sequence[Row]) -> list[str]:
    """The time of a step, of all methods of the rows that were timed."""
    timed = [
        f"- {row.name}: " + ", ".join(f"{label(method, table)} {time:.2f}" for method, time in row.times.items())
        for row in rows
        if row.times
    ]
    head = f"Time of a training step over that of the row's first method, {size}:"
    return ["\n".join([head, "", *timed])] if timed else []


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
