"""How claims are decided: comparisons, their tests, and verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from papers.tables.claims import testing
from papers.tables.claims.testing import (
    Comparison,
    Finding,
    findings_of,
    holm,
    judge,
    permutation_test,
    pooled,
    untested,
)
from papers.tables.results import Row
from scipy import stats

from tests.examples.results_samples import made_row


def test_a_clear_difference_is_held_and_its_opposite_not_held() -> None:
    for sign, word in ((1, "held"), (-1, "not held")):
        found = judge("x (a)", "", "", [Comparison("a", [sign * value for value in (1.0, 1.1, 0.9)])])
        assert found.verdict == word
        assert found.findings[0].p is not None and found.findings[0].p < 0.05


def test_one_contrary_comparison_is_enough_for_not_held_and_one_open_one_for_undecided() -> None:
    clear, contrary, open_ = [1.0, 1.1, 0.9], [-1.0, -1.1, -0.9], [1.0, -1.0, 0.5]
    words = [
        judge("x (a)", "", "", [Comparison(str(i), values) for i, values in enumerate(some)]).verdict
        for some in ((clear, clear), (clear, contrary), (clear, open_), (contrary, open_))
    ]
    assert words == ["held", "not held", "undecided", "not held"]


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ([], "0 of at least 3 seeds"),
        ([1.0, 1.1], "2 of at least 3 seeds"),
        ([1.0, 1.0, 1.0], "no spread over seeds"),
        ([0.0, 0.0, 0.0], "no spread over seeds"),
        ([1.0, float("inf"), 2.0], "not finite"),
    ],
)
def test_too_few_or_unusable_seeds_decide_nothing_and_say_why(values: list[float], why: str) -> None:
    assert untested(values) == why
    found = judge("x (a)", "", "", [Comparison("a", values)])
    assert found.verdict == "undecided" and why in str(found.findings[0])


def test_no_comparison_at_all_is_undecided() -> None:
    assert judge("x (a)", "", "", []).verdict == "undecided"


def test_holm_is_the_step_down_of_bonferroni() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_p_values_that_holm_corrected_are_told_from_the_others() -> None:
    told = [str(each) for each in findings_of([Comparison("a", [1.0, 1.1, 0.9]), Comparison("b", [-1.0, 1.1, -2.0])])]
    assert ["(Holm)" in text for text in told] == [False, True]
    assert "(Holm)" not in str(findings_of([Comparison("b", [-1.0, 1.1, -2.0])])[0])  # the only one


def p_of(found: Sequence[Finding]) -> list[float]:
    return [each.p for each in found if each.p is not None]


def test_comparisons_against_a_claim_are_corrected_and_those_for_it_are_not() -> None:
    for_it, against = Comparison("a", [1.0, 1.1, 0.9]), Comparison("b", [-1.0, -1.4, -0.9])
    (p_for,), (p_against,) = p_of(findings_of([for_it])), p_of(findings_of([against]))
    assert p_of(findings_of([for_it, for_it, for_it])) == [p_for] * 3
    assert p_of(findings_of([against, against])) == pytest.approx([2 * p_against] * 2)
    assert p_of(findings_of([against, for_it, for_it])) == pytest.approx([3 * p_against, p_for, p_for])


def test_comparisons_that_cannot_be_made_do_not_count_for_the_correction() -> None:
    against = Comparison("a", [-1.0, -1.1, -0.9])
    assert findings_of([against, Comparison("b", missing="not run")])[0].p == findings_of([against])[0].p


def test_a_claim_of_many_comparisons_is_held_where_each_alone_would_be() -> None:
    barely = Comparison("a", [1.0, 2.0, 2.4])
    assert [judge("x (a)", "", "", [barely] * count).verdict for count in (1, 27)] == ["held"] * 2
    contrary = Comparison("b", [-1.0, -2.0, -2.4])
    assert [judge("x (a)", "", "", [contrary] * count).verdict for count in (1, 27)] == ["not held", "undecided"]


def test_noise_gives_a_verdict_on_a_claim_of_many_comparisons_as_seldom_as_its_level_says() -> None:
    random = np.random.default_rng(2)
    noise = [[Comparison(str(i), random.standard_normal(5).tolist()) for i in range(6)] for _ in range(120)]
    words = [judge("x (a)", "", "", comparisons).verdict for comparisons in noise]
    assert words.count("held") == 0 and 1 <= words.count("not held") <= 10
    one_wrong = [[some[0], Comparison("b", [1.0, 1.1, 0.9])] for some in noise]
    assert 1 <= [judge("x (a)", "", "", comparisons).verdict for comparisons in one_wrong].count("held") <= 10


def test_t_test_of_noise_is_false_at_its_level() -> None:
    random = np.random.default_rng(1)
    false = sum(findings_of([Comparison("a", random.standard_normal(5).tolist())])[0].sign != 0 for _ in range(1000))
    assert 30 <= false <= 75


def test_permutations_find_order_and_its_reverse_and_nothing_in_one_small_row() -> None:
    six = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    correlation, p = permutation_test([(six, six)])
    assert correlation == pytest.approx(1) and p < 0.01
    correlation, p = permutation_test([(six, six[::-1])] * 2)
    assert correlation == pytest.approx(-1) and p < 0.001
    correlation, p = permutation_test([(six[:4], six[:4])])
    assert p == pytest.approx(2 / 24, abs=0.01)
    assert permutation_test([([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])]) == (0.0, 1.0)


def test_pooled_rows_are_one_comparison_of_all_their_values() -> None:
    found = pooled("x", [Comparison("a", [1.0, 2.0, 3.0]), Comparison("b", [4.0, 5.0, 6.0])])
    assert (found.what, found.values, found.missing) == ("x", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "")


def test_a_row_that_lacks_values_is_passed_on_by_its_pool() -> None:
    rows = [
        Comparison("a", [1.0, 1.1, 0.9]),
        Comparison("b", [1.0, 1.2]),
        Comparison("c", missing="no value in 1 of 3"),
    ]
    found = pooled("x", rows)
    assert not found.values and found.missing == "b: 2 of at least 3 seeds; c: no value in 1 of 3"
    assert judge("x (a)", "", "", [found]).verdict == "undecided"


@pytest.mark.parametrize(
    ("values", "sign"),
    [
        ([0.0004, -0.0003, 0.0001, 0.0002], 1),
        ([-0.0004, -0.0005, -0.0003, -0.0004], 1),
        ([0.0061, 0.0058, 0.0064, 0.0060], -1),
        ([-0.0061, -0.0058, -0.0064, -0.0060], -1),
        ([0.0030, 0.0020, 0.0028, 0.0019], 0),
        ([-0.0030, -0.0020, -0.0028, -0.0019], 0),
        ([0.0090, -0.0080, 0.0110, -0.0100], 0),
    ],
)
def test_a_difference_is_small_where_its_95_percent_interval_lies_within_the_margin(
    values: list[float], sign: int
) -> None:
    (found,) = findings_of([Comparison("a", values, margin=0.0025)])
    mean = np.mean(values)
    low, high = stats.t.interval(0.95, len(values) - 1, mean, stats.sem(values))
    within, beyond = low > -0.0025 and high < 0.0025, low > 0.0025 or high < -0.0025
    assert found.sign == int(within) - int(beyond) == sign
    assert (
        judge("x (a)", "", "", [Comparison("a", values, margin=0.0025)]).verdict
        == ({1: "held", -1: "not held", 0: "undecided"}[sign])
    )


def test_a_margin_is_corrected_for_where_a_difference_lies_beyond_it_alone() -> None:
    for values, factor in (([0.0004, -0.0003, 0.0001], 1), ([0.0061, 0.0058, 0.0064], 2)):
        one = Comparison("a", values, margin=0.0025)
        (alone,), doubled = p_of(findings_of([one])), p_of(findings_of([one, one]))
        assert doubled == pytest.approx([factor * alone] * 2)


def test_rows_are_compared_across_by_seed_and_only_where_they_differ_in_their_network_alone() -> None:
    one, other = (made_row(f"gradreg/c2-{net}", {"none": {"test": 0.9}}, range(4)) for net in ("baseline", "dropout"))
    other = replace(other, protocol={**other.protocol, "model_options": {"dropout": 0.5}})
    fewer = replace(other, runs=tuple(run for run in other.runs[::-1] if run.seed != 2))

    def compared(there: Row, method: str = "none") -> Comparison:
        rows = {one.name: one, other.name: there}
        return testing.compare_across(
            rows, "x", lambda a, b: float(10 * a.seed + b.seed), (one.name, "none"), (other.name, method)
        )

    assert compared(fewer) == Comparison("x", [0.0, 11.0, 33.0])
    assert compared(other, "cap").missing == "gradreg/c2-dropout/cap not run"
    changed = replace(other, protocol={**other.protocol, "train": 100, "epochs": 7})
    told = "gradreg/c2-baseline and gradreg/c2-dropout were run with different epochs, train"
    assert compared(changed) == Comparison("x", missing=told)
    alone = testing.compare_across({one.name: one}, "x", lambda a, b: 0.0, (one.name, "none"), (other.name, "none"))
    assert alone.missing == "gradreg/c2-dropout not run"
