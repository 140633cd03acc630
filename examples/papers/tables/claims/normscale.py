"""The claims of Norm Scaling (blog post and authors' code, December 2023).

``suffix`` is that of the methods: ``""`` for the stated ones, ``"-published"`` for those of the published code.
"""

from __future__ import annotations

import math
import statistics
from functools import partial

from ... import published
from ..results import Run
from .testing import Rows, Verdict, accuracy, compare, difference, final_gap, judge

BY_FAR = 2.0
"""As a factor between two norms."""
TEN_POINTS = 0.095
"""Ten percentage points when rounded, as in the paper: 0.3625 against 0.2662."""
FALLS = 0.10
"""A test loss that stays at most so much above what it was at the least before "keeps falling"."""
MLPS = ("normscale/mlp-5x2000", "normscale/mlp-7x4000")
RESNETS = ("normscale/resnet34", "normscale/resnet50")


def log_ratios(one: Run, other: Run, name: str) -> list[float] | None:
    """Of a measure after each epoch; None where one is not finite."""
    pairs = list(zip(one.trained(name), other.trained(name), strict=True))
    if any(a is None or b is None or a <= 0 or b <= 0 for a, b in pairs):
        return None
    return [math.log(a / b) for a, b in pairs if a is not None and b is not None]


def least_log_ratio(one: Run, other: Run) -> float | None:
    ratios = log_ratios(one, other, "sigma_mean")
    return min(ratios) if ratios else None


def final_log_ratio_beyond(one: Run, other: Run, factor: float) -> float | None:
    ratios = log_ratios(one, other, "sigma_mean")
    return ratios[-1] - math.log(factor) if ratios else None


def claim_a(rows: Rows, suffix: str) -> Verdict:
    none, frobenius, spectral = (f"{name}{suffix}" for name in published.METHODS["normscale"])
    text = "Both scalings keep spectral norms lower than none at every epoch, the spectral one by far the most"
    test = (
        "the least over epochs of the log ratio of mean spectral norms over layers; and by far: Frobenius over "
        f"spectral by more than a factor of {BY_FAR:g} after the last epoch"
    )
    far = partial(final_log_ratio_beyond, factor=BY_FAR)
    comparisons = []
    for row in (*MLPS, *RESNETS):
        comparisons += [
            compare(rows, row, "none over frobenius", least_log_ratio, none, frobenius),
            compare(rows, row, "none over spectral", least_log_ratio, none, spectral),
            compare(rows, row, "frobenius over spectral", least_log_ratio, frobenius, spectral),
            compare(rows, row, f"frobenius over {BY_FAR:g} times spectral, at the end", far, frobenius, spectral),
        ]
    return judge("normscale (a)", text, test, comparisons)


def rise(run: Run) -> float | None:
    """The log of the mean test loss of the last quarter of the epochs over the least before it; None where the former
    was not finite, or nothing was before."""
    losses, late = run.trained("test_loss"), run.late("test_loss", 1 / 4)
    before = [loss for loss in losses[: len(losses) - len(late)] if loss]
    if not before or not all(late):
        return None
    return math.log(statistics.fmean(loss for loss in late if loss) / min(before))


def claim_b(rows: Rows, suffix: str) -> Verdict:
    none, spectral = f"none{suffix}", f"spectral{suffix}"
    text = (
        "Spectral scaling makes the training of MLPs stable (training and test curves stay together, the test loss "
        "keeps falling), that of ResNets not"
    )
    test = (
        "MLPs: training less test accuracy after the last epoch, none's less spectral's; and the mean "
        f"test loss of the last quarter of the epochs, in logs less than {FALLS:.0%} above the least before it. "
        "ResNets: more than that"
    )

    def falls(run: Run) -> float | None:
        found = rise(run)
        return None if found is None else math.log1p(FALLS) - found

    def rises(run: Run) -> float | None:
        found = falls(run)
        return None if found is None else -found

    apart = partial(difference, value=final_gap)
    comparisons = []
    for row in MLPS:
        comparisons += [
            compare(rows, row, "gap, none over spectral", apart, none, spectral),
            compare(rows, row, "spectral's test loss keeps falling", falls, spectral),
        ]
    comparisons += [compare(rows, row, "spectral's test loss rises", rises, spectral) for row in RESNETS]
    return judge("normscale (b)", text, test, comparisons)


def claim_c(rows: Rows, suffix: str) -> Verdict:
    better = partial(difference, value=accuracy)
    comparisons = [
        compare(rows, row, f"frobenius over {other}", better, f"frobenius{suffix}", f"{other}{suffix}")
        for row in RESNETS
        for other in ("none", "spectral")
    ]
    test = "test accuracy after the last epoch, Frobenius' less each other method's"
    return judge("normscale (c)", "On ResNets Frobenius scaling is best", test, comparisons)


def claim_d(rows: Rows, suffix: str) -> Verdict:
    def by_ten(spectral: Run, other: Run) -> float | None:
        found = difference(spectral, other, accuracy)
        return None if found is None else found - TEN_POINTS

    comparisons = [
        compare(rows, MLPS[1], f"spectral over {other}, beyond the points", by_ten, f"spectral{suffix}", other + suffix)
        for other in ("none", "frobenius")
    ]
    text = "On the larger MLP spectral scaling is best by ten points"
    test = f"test accuracy after the last epoch, spectral's less each other method's less {TEN_POINTS:g} (ten, rounded)"
    return judge("normscale (d)", text, test, comparisons)


def uneven(run: Run) -> float | None:
    """The standard deviation of spectral norms over layers, as the source has it, in the mean of the last half of the
    epochs. (Not over their mean: the targets of an MLP have 0.37 of that themselves, more than weights without control
    come to.)"""
    late = run.late("sigma_deviation", 1 / 2)
    return None if None in late else statistics.fmean(value for value in late if value is not None)


def claim_e(rows: Rows, suffix: str) -> Verdict:
    alike = partial(difference, value=uneven)
    comparisons = [
        compare(rows, row, f"none over {method}", alike, f"none{suffix}", f"{method}{suffix}")
        for row in (*MLPS, *RESNETS)
        for method in ("frobenius", "spectral")
    ]
    test = "the deviation of spectral norms over layers in the last half of the epochs, none's less each"
    return judge("normscale (e)", "Norms become alike across layers", test, comparisons)
