"""The papers' claims, each held, not held or undecided on what was run: see :mod:`.testing` for how."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..results import Row
from . import gradreg, normscale, ours, snr
from .testing import Finding, Rows, Verdict

__all__ = ["CLAIMS", "Finding", "Verdict", "additions", "verdicts"]

CLAIMS: dict[str, tuple[Callable[[Rows, str], Verdict], ...]] = {
    "snr": (snr.claim_a, snr.claim_b, snr.claim_c, snr.claim_d, snr.claim_e),
    "normscale": (
        normscale.claim_a,
        normscale.claim_b,
        normscale.claim_c,
        normscale.claim_d,
        normscale.claim_e,
    ),
    "gradreg": (gradreg.claim_a, gradreg.claim_b, gradreg.claim_c, gradreg.claim_d, gradreg.claim_e),
}
"""Of each paper, in the order of its letters."""


def verdicts(table: str, rows: Iterable[Row], *, published: bool = False) -> list[Verdict]:
    """Of a table's claims.

    Args:
        rows: of one scale and number of epochs; those of other tables are not looked at.
        published: of the methods with the defects of the published code, in place of the stated ones.

    Raises:
        ValueError: rows of more than one size, which are not to be compared.
    """
    by_name = of_one_size(table, rows)
    return [claim(by_name, "-published" if published else "") for claim in CLAIMS[table]]


def additions(table: str, rows: Iterable[Row]) -> list[Verdict]:
    """Whether ours is better than every method of the paper, for each row of one size that has ours.

    Raises:
        ValueError: rows of more than one.
    """
    return ours.against_papers(table, of_one_size(table, rows))


def of_one_size(table: str, rows: Iterable[Row]) -> Rows:
    """The table's, by name."""
    own = [row for row in rows if row.name.startswith(f"{table}/")]
    sizes = sorted({row.size_in_words for row in own})
    if len(sizes) > 1:
        raise ValueError(f"rows must be of one scale and number of epochs, got {'; '.join(sizes)}")
    return {row.name: row for row in own}
