"""Varga, Csiszárik and Zombori, gradient regularization, by a replication report that sets its own figures beside the
paper's: LeNet-5 on subsets of MNIST, means and standard deviations over ten runs.

C2 asks for the net, with 200 training images a class; C4 for the size of the training set; C6 for how much of the
Jacobian is penalized, again with 200 a class. Of C4 there are the replication's figures alone. Neither C4 nor C6 has
any of training without a penalty, which is run for comparison.
"""

from __future__ import annotations

from .cell import Cell

SOURCE = "Varga, Csiszárik and Zombori, gradient regularization, in a replication report"
METHODS = ("none", "spect-reg", "double-back", "jac-reg", "frob-reg", "confidence-penalty")
C2_METHODS = ("none", "spect-reg", "double-back")
C4_METHODS = ("none", "double-back", "spect-reg", "jac-reg", "confidence-penalty")
C6_METHODS = ("none", "spect-reg", "jac-reg", "frob-reg")
SIZES = (500, 1000, 2000, 3000, 4000, 5000, 10_000, 15_000, 20_000)
"""Training images in C4."""
WIDE, WIDE_SIZES = "wide-", (500, 2000, 10_000)
"""In front of a row's name: the same on a wider network, of which the report has nothing; of C4 at these sizes."""

_C2 = {
    "baseline": "96.99 (.15) 96.77 (.31) | 97.59 (.13) 96.61 (.67) | 97.56 (.24) 96.32 (.72)",
    "batchnorm": "96.89 (.23) 97.13 (.16) | 96.94 (.27) 97.20 (.14) | 96.89 (.22) 97.30 (.23)",
    "dropout": "97.29 (.19) 91.90 (.28) | 97.65 (.14) 91.65 (.64) | 97.98 (.12) 91.30 (.35)",
}
"""By net, for each of ``C2_METHODS``: percent of the paper and of the replication, with deviations."""

_C4 = (
    "94.17 (.41) 94.06 (.38) 93.83 (.41) 94.05 (.41)",
    "95.54 (.22) 95.46 (.34) 95.36 (.35) 95.58 (.31)",
    "96.56 (.18) 96.46 (.24) 96.60 (.14) 96.60 (.14)",
    "97.11 (.22) 96.97 (.29) 96.98 (.20) 97.05 (.18)",
    "97.30 (.17) 97.36 (.19) 97.31 (.23) 97.33 (.30)",
    "97.46 (.13) 97.46 (.15) 97.57 (.19) 97.55 (.15)",
    "98.00 (.18) 97.94 (.12) 98.02 (.16) 97.95 (.17)",
    "98.10 (.17) 98.09 (.10) 98.06 (.15) 98.07 (.11)",
    "98.22 (.17) 98.29 (.14) 98.23 (.22) 98.26 (.15)",
)
"""By size, for each of ``C4_METHODS`` but none: percent of the replication."""

_C4_LAMBDAS = (
    (50, 0.03, 0.3, 0.01),
    (50, 0.03, 0.03, 0.01),
    (50, 0.03, 1, 0.01),
    (20, 0.03, 1, 0.01),
    (20, 0.03, 1, 0.01),
    (20, 0.003, 1, 0.1),
    (5, 0.01, 1, 0.1),
    (2, 0.01, 1, 0.01),
    (2, 0.001, 0.3, 0.03),
)

_C6 = "97.79 (.12) 96.48 (.19) | 97.63 (.15) 96.58 (.22) | 97.76 (.13) 96.62 (.22)"
"""For each of ``C6_METHODS`` but none: percent of the paper and of the replication."""


def _fractions(text: str) -> list[float]:
    """Of percentages: ``96.99 (.15)`` is a mean and a deviation."""
    return [round(float(part) / 100, 6) for part in text.replace("(", "").replace(")", "").split()]


def _both(methods: tuple[str, ...], text: str) -> dict[str, Cell]:
    return {name: Cell(*_fractions(part)) for name, part in zip(methods, text.split("|"), strict=True)}


def _replicated(methods: tuple[str, ...], text: str) -> dict[str, Cell]:
    found = _fractions(text)
    pairs = zip(found[::2], found[1::2], strict=True)
    return {
        name: Cell(replication=mean, replication_std=deviation)
        for name, (mean, deviation) in zip(methods, pairs, strict=True)
    }


CELLS = {
    **{f"gradreg/c2-{net}": _both(C2_METHODS, text) for net, text in _C2.items()},
    **{f"gradreg/c4-{size}": _replicated(C4_METHODS[1:], text) for size, text in zip(SIZES, _C4, strict=True)},
    "gradreg/c6": _both(C6_METHODS[1:], _C6),
}
"""By row and method."""

_METHODS_OF_ROWS = {
    row: C2_METHODS if "/c2-" in row else C4_METHODS if "/c4-" in row else C6_METHODS for row in CELLS
}  # fmt: skip

_LAMBDAS: dict[str, dict[str, float]] = {
    "gradreg/c2-baseline": {"spect-reg": 0.01, "double-back": 50},
    "gradreg/c2-batchnorm": {"spect-reg": 0.001, "double-back": 0.001},
    "gradreg/c2-dropout": {"spect-reg": 0.01, "double-back": 50},
    **{
        f"gradreg/c4-{size}": dict(zip(C4_METHODS[1:], found, strict=True))
        for size, found in zip(SIZES, _C4_LAMBDAS, strict=True)
    },
    "gradreg/c6": {"spect-reg": 0.03, "jac-reg": 1, "frob-reg": 0.03},
}

_WIDE = {
    row: f"gradreg/{WIDE}{name}"
    for row in CELLS
    if not (name := row.removeprefix("gradreg/")).startswith("c4-") or int(name.removeprefix("c4-")) in WIDE_SIZES
}

METHODS_OF_ROWS = _METHODS_OF_ROWS | {wide: _METHODS_OF_ROWS[row] for row, wide in _WIDE.items()}

LAMBDAS = _LAMBDAS | {wide: _LAMBDAS[row] for row, wide in _WIDE.items()}
"""The weights of the penalties that the report found best, by row and method; the same on the wider network. Those of
the confidence penalty are for its sum over a batch of 50, all others for means over the batch."""

REPLICATED = {
    "gradreg (a)": "not held against Batchnorm",
    "gradreg (b)": "not held",
    "gradreg (c)": "not held",
    "gradreg (d)": "held for most sizes",
    "gradreg (e)": "held",
}
"""The replication's own verdicts, by claim."""
