"""The claims of the SNR paper (arXiv 1705.10941)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import partial

from ... import published
from ..results import Row, Run
from .testing import (
    SEEDS,
    Comparison,
    Finding,
    Rows,
    Verdict,
    accuracy,
    compare,
    conclude,
    difference,
    final_gap,
    judge,
    permutation_test,
    pooled,
)

OTHERS = tuple(name for name in published.METHODS["snr"] if name != "snr")
LARGE = tuple(f"snr/{row}-b4096" for row in ("vgg-cifar10", "nin-cifar100", "densenet-cifar100", "densenet-stl10"))
SMALL = tuple(row.replace("b4096", "b64") for row in LARGE)
ACCURACY = "test accuracy after the last epoch, SNR's less each other method's"


def snr_beats(rows: Rows, names: Sequence[str]) -> list[Comparison]:
    better = partial(difference, value=accuracy)
    return [compare(rows, row, f"snr over {other}", better, "snr", other) for row in names for other in OTHERS]


def claim_a(rows: Rows, _: str) -> Verdict:
    text = "SNR has the best accuracy of the four at batch 4096, on all four rows"
    return judge("snr (a)", text, ACCURACY, snr_beats(rows, LARGE))


def claim_b(rows: Rows, _: str) -> Verdict:
    text = "SNR has the best accuracy at batch 64 on VGG and on STL-10"
    return judge("snr (b)", text, ACCURACY, snr_beats(rows, (SMALL[0], SMALL[3])))


def claim_c(rows: Rows, _: str) -> Verdict:
    def wider(row: str, snr: Run, other: Run) -> float | None:
        threshold = rows[row].gap_threshold()
        return None if threshold is None else difference(other, snr, lambda run: run.gap(threshold))

    text = "SNR has the smallest gap at batch 4096 on VGG, NIN and CIFAR-100's DenseNet"
    test = "generalization gap above the row's threshold, each other method's less SNR's"
    comparisons = [
        compare(rows, row, f"{other} over snr", partial(wider, row), "snr", other)
        for row in LARGE[:3]
        for other in OTHERS
    ]
    return judge("snr (c)", text, test, comparisons)


def claim_d(rows: Rows, _: str) -> Verdict:
    """A point is a method of the paper in one of its rows, with means over its seeds; methods are exchanged within
    their rows. Runs of one method are too alike to be points of their own."""
    own = [rows[name] for name in (*SMALL, *LARGE) if name in rows]
    usable = [points for row in own if (points := gaps_and_norms(row)) is not None]
    text = "A smaller gap goes with a smaller gradient norm at test inputs"
    test = (
        "Spearman's correlation of training less test accuracy with the gradient norm, both after the last epoch and "
        "means over seeds, over the paper's methods in each of its rows; mean over rows; methods permuted within "
        "rows"
    )
    what = f"correlation, {len(usable)} row(s)"
    if not usable:
        missing = f"no row with three methods of at least {SEEDS} seeds"
        return conclude("snr (d)", text, test, [Finding(what, None, None, missing)])
    mean, p = permutation_test(usable)
    return conclude("snr (d)", text, test, [Finding(what, mean, p)])


def gaps_and_norms(row: Row) -> tuple[list[float], list[float]] | None:
    """Of every method of the paper with enough seeds; None where they are fewer than three."""
    gaps, norms = [], []
    for method in published.METHODS["snr"]:
        runs = row.of(method).values()
        pairs = [(final_gap(run), run.last("gradient_norm")) for run in runs]
        known = [(gap, norm) for gap, norm in pairs if gap is not None and norm is not None]
        if len(known) >= SEEDS:
            gaps.append(statistics.fmean(gap for gap, _ in known))
            norms.append(statistics.fmean(norm for _, norm in known))
    return (gaps, norms) if len(gaps) >= 3 else None


def claim_e(rows: Rows, _: str) -> Verdict:
    text = "Weight decay shrinks all directions, SNR only the first"
    test = (
        "means over layers, after the last epoch, of the logs of sigma_1 and of the rest, sqrt(||W||_F^2 - sigma_1^2): "
        "both lower under weight decay than vanilla; under SNR sigma_1 lower, by more than the rest, and the rest less "
        "lowered than by weight decay; all rows together that were run with these three methods and at least "
        f"{SEEDS} seeds, one row at least"
    )
    usable = [name for name in (*SMALL, *LARGE) if has_seeds(rows, name, ("vanilla", "weight-decay", "snr"))]

    def first(run: Run) -> float | None:
        return directions(run)[0]

    def rest(run: Run) -> float | None:
        return directions(run)[1]

    def over_rest(run: Run) -> float | None:
        sigma, others = directions(run)
        return None if sigma is None or others is None else sigma - others

    asked = (
        ("log sigma_1, vanilla over weight-decay", first, "vanilla", "weight-decay"),
        ("log rest, vanilla over weight-decay", rest, "vanilla", "weight-decay"),
        ("log sigma_1, vanilla over snr", first, "vanilla", "snr"),
        ("log sigma_1/rest, vanilla over snr", over_rest, "vanilla", "snr"),
        ("log rest, snr over weight-decay", rest, "snr", "weight-decay"),
    )
    if not usable:
        lost = f"no row of these methods with at least {SEEDS} seeds"
        return judge("snr (e)", text, test, [Comparison(what, missing=lost) for what, *_ in asked])
    over = ", ".join(name.removeprefix("snr/") for name in usable)
    comparisons = [
        pooled(
            f"{what}, over {over}",
            [compare(rows, row, what, partial(difference, value=value), one, other) for row in usable],
        )
        for what, value, one, other in asked
    ]
    return judge("snr (e)", text, test, comparisons)


def has_seeds(rows: Rows, name: str, methods: Sequence[str]) -> bool:
    """Enough that all methods of the row share, whatever came of them."""
    return name in rows and len(set.intersection(*(set(rows[name].of(method)) for method in methods))) >= SEEDS


def directions(run: Run) -> tuple[float | None, float | None]:
    """The means over layers of ``log sigma_1`` and of ``log sqrt(||W||_F^2 - sigma_1^2)``; a layer of rank one has no
    rest."""
    first, rest = [], []
    for layer in run.layers.values():
        sigma, frobenius = layer["sigma"][-1], layer["frobenius"][-1]
        if sigma is None or frobenius is None or sigma <= 0:
            return None, None
        first.append(math.log(sigma))
        if frobenius > sigma * (1 + 1e-3):
            rest.append(0.5 * math.log(frobenius**2 - sigma**2))
    return (statistics.fmean(first), statistics.fmean(rest)) if first and rest else (None, None)
