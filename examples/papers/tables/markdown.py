"""How methods, numbers and tables are written on a page of results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

NOTHING = "–"
NOT_RUN = "not run"

LABELS = {
    "weight-decay": "weight decay",
    "snr": "SNR",
    "adamw": "AdamW",
    "snr-adamw": "SNR on AdamW (ours)",
    "snr-adam": "SNR on Adam (ours)",
    "cap": "cap (ours)",
    "ours": "cap (ours)",
    "snr/cap": "cap on SGD (ours)",
    "snr/ours": "cap on AdamW (ours)",
    "frobenius": "Frobenius",
    "spect-reg": "SpectReg",
    "double-back": "DoubleBack",
    "jac-reg": "JacReg",
    "frob-reg": "FrobReg",
    "confidence-penalty": "confidence penalty",
    "gradreg/spectral": "Norm Scaling (ours)",
}
"""By method, or by table and method where tables name different ones alike."""


def label(method: str, table: str) -> str:
    stated = method.removesuffix("-published")
    found = LABELS.get(f"{table}/{stated}", LABELS.get(stated, stated))
    return found + (", as published" if stated != method else "")


def over_seeds(values: Sequence[float | None], digits: int) -> str:
    """``0.512 ± 0.004``; how many seeds have a value, where not all have."""
    known = [value for value in values if value is not None]
    if not known:
        return "none" if values else NOTHING
    deviation = statistics.stdev(known) if len(known) > 1 else None
    return spread(statistics.fmean(known), deviation, digits) + counted(known, values)


def percent_over_seeds(values: Sequence[float | None]) -> str:
    """Of fractions: ``97.59 (0.13)``; how many seeds have a value, where not all have."""
    known = [value for value in values if value is not None]
    if not known:
        return "none" if values else NOTHING
    deviation = statistics.stdev(known) if len(known) > 1 else None
    return percent(statistics.fmean(known), deviation) + counted(known, values)


def spread(mean: float, deviation: float | None, digits: int) -> str:
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def percent(mean: float | None, deviation: float | None) -> str:
    """Of fractions: ``97.59 (0.13)``, as the gradient regularization's report has them."""
    if mean is None:
        return NOTHING
    return f"{100 * mean:.2f}" + ("" if deviation is None else f" ({100 * deviation:.2f})")


def counted(known: Sequence[object], values: Sequence[object]) -> str:
    return f" ({len(known)} of {len(values)})" if len(known) < len(values) else ""


def markdown_table(lines: Sequence[Sequence[str]], texts: int = 1) -> str:
    """The first line is the head; so many columns hold text, and all others numbers."""
    head, *rest = lines
    rule = [*["---"] * texts, *["---:"] * (len(head) - texts)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *rest))


def folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"
