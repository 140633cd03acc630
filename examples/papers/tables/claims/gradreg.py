"""The claims of gradient regularization (Varga, Csiszárik and Zombori), all of test accuracy after the last epoch.

The same seed is the same training images in all rows of one size, so that claim (a) pairs runs of different networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from ...published.gradreg import C4_METHODS, SIZES
from ..results import Run
from .testing import Comparison, Rows, Verdict, accuracy, compare, compare_across, difference, judge

SMALL = tuple(size for size in SIZES if size <= 2000)
"""Up to 200 images a class, as in C2 and C6."""
LARGE = tuple(size for size in SIZES if size >= 10_000)
"""1,000 images a class and more."""
LEAD = 0.001
"""A lead below this is not called one where a claim says that there is none: ten of 10,000 test images, about half of
the deviation over runs that the report has at the large sizes."""
MARGIN = 0.0025
"""A smaller difference is called small: 25 of 10,000 test images. The report calls its own small, which are up to
0.0016."""
PEERS = C4_METHODS[1:]
"""What the report compares in C4."""

PAIR = ("spect-reg", "confidence-penalty")
"""Of claim (c)."""

better = partial(difference, value=accuracy)


def claim_a(rows: Rows, _: str) -> Verdict:
    comparisons = [
        compare_across(
            rows,
            f"{method} on the Baseline net over the {net} net alone",
            better,
            ("gradreg/c2-baseline", method),
            (f"gradreg/c2-{net.lower()}", "none"),
        )
        for method in ("double-back", "spect-reg")
        for net in ("Dropout", "Batchnorm")
    ]
    text = "DoubleBack and SpectReg each beat Dropout and Batchnorm alone (C2)"
    test = "test accuracy of each method on the Baseline net less that of each other net without a penalty"
    return judge("gradreg (a)", text, test, comparisons)


def at_sizes(rows: Rows, sizes: Sequence[int], pairs: Sequence[tuple[str, str]]) -> list[Comparison]:
    """The first method's accuracy less the second's, in C4."""
    return [
        compare(rows, f"gradreg/c4-{size}", f"{one} over {other}", better, one, other)
        for size in sizes
        for one, other in pairs
    ]


def claim_b(rows: Rows, _: str) -> Verdict:
    pairs = [("double-back", other) for other in PEERS if other != "double-back"]
    test = "test accuracy at each size, DoubleBack's less each other penalty's"
    return judge("gradreg (b)", "DoubleBack is best at all sizes (C4)", test, at_sizes(rows, SIZES, pairs))


def claim_c(rows: Rows, _: str) -> Verdict:
    def within_lead(spect_reg: Run, other: Run) -> float | None:
        found = better(spect_reg, other)
        return None if found is None else LEAD - found

    comparisons = at_sizes(rows, SMALL, [PAIR])
    comparisons += [
        compare(rows, f"gradreg/c4-{size}", f"spect-reg not ahead by {LEAD:g}", within_lead, *PAIR) for size in LARGE
    ]
    text = "SpectReg beats the confidence penalty at small sizes and not at large ones (C4)"
    test = (
        f"test accuracy, SpectReg's less the confidence penalty's, at the small sizes {in_words(SMALL)}; at the large "
        f"ones {in_words(LARGE)}, {LEAD:g} less that difference: a smaller lead is not called one. The sizes between "
        "are not asked"
    )
    return judge("gradreg (c)", text, test, comparisons)


def claim_d(rows: Rows, _: str) -> Verdict:
    pairs = [(other, "jac-reg") for other in PEERS if other != "jac-reg"]
    test = "test accuracy at each size, each other penalty's less JacReg's"
    return judge("gradreg (d)", "JacReg is consistently worse than its peers (C4)", test, at_sizes(rows, SIZES, pairs))


def claim_e(rows: Rows, _: str) -> Verdict:
    comparisons = [
        replace(
            compare(rows, "gradreg/c6", f"spect-reg within {MARGIN:g} of {other}", better, "spect-reg", other),
            margin=MARGIN,
        )
        for other in ("frob-reg", "jac-reg")
    ]
    text = "A random projection of the Jacobian loses no accuracy against the whole, differences are small (C6)"
    test = (
        "test accuracy, SpectReg's less that of each whole Jacobian's penalty, against a margin of "
        f"{MARGIN:g} to either side: for the claim where the mean's 95 % interval lies within the margin, against it "
        "where the interval, made wider by Holm's correction, lies wholly beyond"
    )
    return judge("gradreg (e)", text, test, comparisons)


def in_words(sizes: Sequence[int]) -> str:
    *others, last = (f"{size:,}" for size in sizes)
    return f"{', '.join(others)} and {last}"
