"""How a claim is decided: comparisons, their two-sided tests, and the verdict.

A claim is a set of comparisons. Each is a quantity that the claim says is positive, with a value for each seed: most
are differences of two methods from the same seed, which share data, batches and start. A comparison is decided by
Student's t-test of its mean against 0, two-sided, at 5 %; that of gaps and gradient norms by a permutation test. Where
the claim says instead that a difference is small, it states a margin, and the mean is tested against the nearer end of
``[-margin, margin]``: significantly inside where the mean's 95 % interval lies within the margin, and significantly
outside where it lies wholly beyond. The claim is

- **not held** where one comparison is significantly negative, or outside its margin. One of many suffices, so these are
  tested at 5 % after Holm's correction over the comparisons of the claim;
- **held** where all are significantly positive, or inside their margins, in all rows that the claim names. That needs
  no correction: a claim that is wrong in one comparison is held only if that one errs, however many there are (an
  intersection-union test; Berger, Technometrics 1982);
- **undecided** otherwise, as with fewer than three seeds, rows that were not run, or values that were not finite.
  Values that are alike in all seeds have no spread to test by, and decide nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import stats

from ..results import Row, Run

LEVEL = 0.05
SEEDS = 3
"""Fewer decide nothing."""
PERMUTATIONS = 20_000
NETWORK = ("model", "model_options")
"""What a row's protocol says of its network."""

Values = Sequence[float]
Rows = Mapping[str, Row]


@dataclass(frozen=True)
class Comparison:
    """What a claim says is positive, a value for each seed; or why there is none."""

    what: str
    values: Values = ()
    missing: str = ""
    margin: float | None = None
    """Where the claim says that the mean is no further from 0 than this, in place of positive."""


@dataclass(frozen=True)
class Finding:
    """A comparison and its two-sided p-value, corrected where its mean is against the claim; None where it was not
    tested."""

    what: str
    mean: float | None
    p: float | None
    missing: str = ""
    margin: float | None = None
    corrected: bool = False
    """The p-value is against the claim, and made larger by Holm's correction."""

    @property
    def sign(self) -> int:
        """1 or -1 where significantly for or against the claim, else 0."""
        if self.p is None or self.mean is None or self.p > LEVEL:
            return 0
        return 1 if favourable(self.mean, self.margin) else -1

    def __str__(self) -> str:
        if self.mean is None:
            return f"{self.what}: {self.missing}"
        if self.p is None:
            return f"{self.what}: {self.mean:+.3g}, {self.missing}"
        return f"{self.what}: {self.mean:+.3g}, p {self.p:.2g}{' (Holm)' if self.corrected else ''}"


@dataclass(frozen=True)
class Verdict:
    claim: str
    """Such as ``snr (a)``."""
    text: str
    verdict: str
    """held, not held or undecided."""
    test: str
    """What was compared."""
    findings: tuple[Finding, ...] = field(default=())


def judge(claim: str, text: str, test: str, comparisons: Sequence[Comparison]) -> Verdict:
    return conclude(claim, text, test, findings_of(comparisons))


def conclude(claim: str, text: str, test: str, findings: Sequence[Finding]) -> Verdict:
    if any(each.sign < 0 for each in findings):
        word = "not held"
    else:
        word = "held" if findings and all(each.sign > 0 for each in findings) else "undecided"
    return Verdict(claim, text, word, test, tuple(findings))


def findings_of(comparisons: Sequence[Comparison]) -> list[Finding]:
    """Student's t-tests. Against the claim, p-values are corrected by Holm over the tests that could be made; a
    comparison in favour counts among them as one without any evidence against."""
    found = []
    for each in comparisons:
        mean, p = statistics.fmean(each.values) if each.values else None, t_test(each.values, each.margin)
        missing = each.missing or ("" if p is not None else untested(each.values))
        found.append(Finding(each.what, mean, p, missing, each.margin))
    tested = [i for i, each in enumerate(found) if each.p is not None]
    against = holm([contrary(found[i]) for i in tested])
    for i, p in zip(tested, against, strict=True):
        if contrary(found[i]) < 1:
            found[i] = replace(found[i], p=p, corrected=len(tested) > 1)
    return found


def contrary(finding: Finding) -> float:
    """The p-value of a tested comparison as evidence against the claim: 1 where its mean is in favour."""
    if finding.mean is None or finding.p is None or favourable(finding.mean, finding.margin):
        return 1.0
    return finding.p


def favourable(mean: float, margin: float | None) -> bool:
    """Whether a mean is on the claim's side."""
    return mean > 0 if margin is None else abs(mean) < margin


def t_test(values: Values, margin: float | None = None) -> float | None:
    """The two-sided p-value of a mean of 0, or of the nearer one of ``±margin``; None of fewer than three values, or of
    values without spread."""
    if untested(values):
        return None
    center = 0.0 if margin is None else math.copysign(margin, statistics.fmean(values))
    return float(stats.ttest_1samp(values, center).pvalue)


def untested(values: Values) -> str:
    """Why, or nothing."""
    if len(values) < SEEDS:
        return too_few(values)
    if not all(map(math.isfinite, values)):
        return "not finite"
    spread = max(values) - min(values)
    return "no spread over seeds" if spread <= 1e-9 * max(map(abs, values)) else ""


def too_few(values: Values) -> str:
    return f"{len(values)} of at least {SEEDS} seeds" if len(values) < SEEDS else ""


def holm(p_values: Values) -> list[float]:
    """``max over j <= i of min(1, (m - j) p_j)`` of the sorted p-values, j from 0: Holm (1979)."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[i]))
        corrected[i] = largest
    return corrected


def compare(rows: Rows, row: str, what: str, value: Callable[..., float | None], *methods: str) -> Comparison:
    """``value(run of the first method, run of the second, ...)`` of every seed that all methods have."""
    what = f"{row}: {what}"
    if row not in rows:
        return Comparison(what, missing="not run")
    return paired(what, value, {method: rows[row].of(method) for method in methods})


def compare_across(
    rows: Rows, what: str, value: Callable[..., float | None], one: tuple[str, str], other: tuple[str, str]
) -> Comparison:
    """The same of methods in two rows, each ``(row, method)``, which may differ in their network alone: there the same
    seed is the same training images too."""
    absent = [row for row, _ in (one, other) if row not in rows]
    if absent:
        return Comparison(what, missing=f"{', '.join(absent)} not run")
    protocols = [rows[row].protocol for row, _ in (one, other)]
    differing = [key for key in protocols[0] if key not in NETWORK and protocols[0][key] != protocols[1].get(key)]
    if differing:
        return Comparison(what, missing=f"{one[0]} and {other[0]} were run with different {', '.join(differing)}")
    return paired(what, value, {f"{row}/{method}": rows[row].of(method) for row, method in (one, other)})


def paired(what: str, value: Callable[..., float | None], runs: Mapping[str, Mapping[int, Run]]) -> Comparison:
    """Of every seed that all have.

    Args:
        runs: by what they are of, then by seed, in the order of ``value``'s arguments.
    """
    absent = [name for name, found in runs.items() if not found]
    if absent:
        return Comparison(what, missing=f"{', '.join(absent)} not run")
    seeds = sorted(set.intersection(*map(set, runs.values())))
    values = [value(*(found[seed] for found in runs.values())) for seed in seeds]
    known = [each for each in values if each is not None]
    if len(known) < len(values):
        return Comparison(what, missing=f"no value in {len(values) - len(known)} of {len(values)} seeds")
    return Comparison(what, known)


def pooled(what: str, comparisons: Sequence[Comparison]) -> Comparison:
    """One comparison of the values of several rows, for a claim about all of them. The rows' own differences add to the
    spread, which only makes the test of these rows' mean more careful. Where one lacks values there are none at all:
    those lost might have spoken against the claim."""
    lost = [f"{each.what}: {why}" for each in comparisons if (why := each.missing or too_few(each.values))]
    if lost:
        return Comparison(what, missing="; ".join(lost))
    return Comparison(what, [value for each in comparisons for value in each.values])


def difference(one: Run, other: Run, value: Callable[[Run], float | None]) -> float | None:
    a, b = value(one), value(other)
    return None if a is None or b is None else a - b


def accuracy(run: Run) -> float | None:
    return run.last("test_accuracy")


def final_gap(run: Run) -> float | None:
    train, test = run.last("train_accuracy"), run.last("test_accuracy")
    return None if train is None or test is None else train - test


def permutation_test(rows: Sequence[tuple[Values, Values]]) -> tuple[float, float]:
    """The mean over rows of Spearman's correlation, and its two-sided p-value under ``PERMUTATIONS`` drawn ones."""
    random = np.random.default_rng(0)
    found, drawn = 0.0, np.zeros(PERMUTATIONS)
    for pair in rows:
        one, other = (_standardized(values) for values in pair)
        found += float(one @ other) / len(rows)
        drawn += random.permuted(np.tile(one, (PERMUTATIONS, 1)), axis=1) @ other / len(rows)
    extreme = int((np.abs(drawn) >= abs(found) - 1e-9).sum())
    return found, (1 + extreme) / (1 + PERMUTATIONS)


def _standardized(values: Values) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Ranks with mean 0 and norm 1, or 0 where all values are alike."""
    ranks = stats.rankdata(values)
    centered = ranks - ranks.mean()
    norm = float(np.linalg.norm(centered))
    found: np.ndarray[tuple[int], np.dtype[np.float64]] = centered / norm if norm > 0 else centered
    return found
