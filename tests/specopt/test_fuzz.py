"""Random parameters and options: no crash, nothing non-finite out of finite input, no silent no-op, and each step what
the judge in float64 makes of it. See :mod:`tests.specopt.fuzz`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from specopt import rules
from tests.specopt.fuzz import Case, run

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")
CHUNK = 250
QUICK, ALL = 1000, 5000
INTERPRETED_CHUNK = 15
INTERPRETED_QUICK, INTERPRETED_ALL = 30, 120


def assert_all_pass(cases: Iterable[Case]) -> None:
    failed = []
    for case in cases:
        try:
            run(case)
        except Exception as error:
            failed.append(f"{type(error).__name__}: {str(error).splitlines()[0]}: {case}")
    assert not failed, f"{len(failed)} cases, of which the first are\n" + "\n".join(failed[:10])


def chunks(quick: int, total: int, size: int) -> list[object]:
    starts = range(0, total, size)
    return [pytest.param(first, marks=() if first < quick else pytest.mark.full) for first in starts]


@pytest.mark.parametrize("first", chunks(QUICK, ALL, CHUNK))
def test_random_cases_are_what_the_judge_makes_of_them(first: int) -> None:
    assert_all_pass(Case.of(seed) for seed in range(first, first + CHUNK))


@pytest.mark.parametrize("first", chunks(INTERPRETED_QUICK, INTERPRETED_ALL, INTERPRETED_CHUNK))
@pytest.mark.usefixtures("triton_backend")
def test_random_cases_on_triton_are_what_the_judge_makes_of_them(first: int) -> None:
    seeds = range(10**6 + first, 10**6 + first + INTERPRETED_CHUNK)
    assert_all_pass(Case.of(seed, interpreted=True) for seed in seeds)


@pytest.mark.parametrize("name", ["shape_target", "Penalty"])
def test_the_judge_finds_a_rule_that_is_off_by_one_percent(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right: Any = getattr(rules, name)
    wrong = {
        "shape_target": lambda matrix: 1.01 * right(matrix),
        "Penalty": lambda coefficients, *vectors: right(1.01 * coefficients, *vectors),
    }
    monkeypatch.setattr(rules, name, wrong[name])
    with pytest.raises(AssertionError, match=r"\d+ cases"):
        assert_all_pass(Case.of(seed) for seed in range(CHUNK))
