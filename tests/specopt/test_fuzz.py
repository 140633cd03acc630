"""Random parameters and options: no crash, nothing non-finite out of finite input, no silent no-op, and each step what
the judge in float64 makes of it. See :mod:`tests.specopt.judge`."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from specopt.rules import penalty, steering
from tests.specopt.fuzz import Case
from tests.specopt.judge import rounding, run

pytestmark = [
    pytest.mark.filterwarnings("ignore:the first step moves"),
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),  # the interpreter's, of what is not finite
]
CHUNK = 250
QUICK, ALL = 500, 5000
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


def some_cases(seed: int) -> list[Case]:
    """Two to six under one kind of optimizer, without what a last place decides: a direction in a flat spectrum, and
    rounding by chance, which has another chance for every place in a list."""
    pick = random.Random(seed)
    penalty, count = pick.random() < 0.4, pick.randint(2, 6)
    found = (Case.of(each) for each in itertools.count(1000 * seed))
    return [
        replace(case, options={**case.options, "stochastic_rounding": False})
        for case in itertools.islice((c for c in found if c.penalty == penalty and c.weight != "flat"), count)
    ]


def alike(case: Case, mine: Tensor, other: Tensor) -> bool:
    """To rounding: most have the same bits, but a product may depend on where in memory its operands lie."""
    first, second = (weight.detach().double() for weight in (mine, other))
    sound = torch.equal(first.isfinite(), second.isfinite())
    first, second = (weight.where(weight.isfinite(), 0) for weight in (first, second))
    return sound and float((first - second).norm()) <= 8 * rounding(case) * float(second.norm())


@pytest.mark.parametrize("first", chunks(60, 300, 60))
def test_random_cases_in_one_optimizer_take_the_steps_they_take_alone(first: int) -> None:
    for seed in range(first, first + 60):
        cases = some_cases(seed)
        numbers = [torch.Generator().manual_seed(case.seed) for case in cases]
        params = [case.make_weight(each).requires_grad_() for case, each in zip(cases, numbers, strict=True)]
        others = [torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device=p.device) for p in params]
        others = [other.copy_(param.detach()).requires_grad_() for other, param in zip(others, params, strict=True)]
        groups = [{"params": [param], **group_options(case)} for param, case in zip(params, cases, strict=True)]
        together = cases[0].kind(groups)
        alone = [case.make(other) for case, other in zip(cases, others, strict=True)]
        for _ in range(2):
            for case, each, param, other in zip(cases, numbers, params, others, strict=True):
                param.grad = case.make_gradient(each)
                other.grad = None if param.grad is None else param.grad.clone()
            for optimizer in (together, *alone):
                optimizer.step()
        assert all(map(alike, cases, params, others)), cases


def group_options(case: Case) -> dict[str, Any]:
    """A group that is off may have no target of its own."""
    return {name: value for name, value in case.options.items() if name != "target" or case.options["spectral"]}


@pytest.mark.parametrize(("module", "name"), [(steering, "shape_target"), (penalty, "Penalty")])
def test_the_judge_finds_a_rule_that_is_off_by_one_percent(
    module: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(module, name)
    wrong = {
        "shape_target": lambda matrix: 1.01 * right(matrix),
        "Penalty": lambda coefficients, *vectors: right(1.01 * coefficients, *vectors),
    }
    monkeypatch.setattr(module, name, wrong[name])
    with pytest.raises(AssertionError, match=r"\d+ cases"):
        assert_all_pass(Case.of(seed) for seed in range(CHUNK))
