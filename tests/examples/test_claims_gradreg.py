"""Verdicts on gradient regularization, of made-up results where the right one is known in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import reproduce
from papers.published.gradreg import SIZES
from papers.tables import claims
from papers.tables.claims import Verdict, gradreg, testing
from papers.tables.claims.section import claims_section
from papers.tables.results import Row
from scipy import stats

from tests.examples.results_samples import made_row

SHAKE = 0.0003
C4 = ("double-back", "spect-reg", "jac-reg", "confidence-penalty")


def row(name: str, accuracies: Mapping[str, float], seeds: int = 5, shake: float = SHAKE) -> Row:
    return made_row(
        f"gradreg/{name}", {method: {"test": value} for method, value in accuracies.items()}, range(seeds), shake=shake
    )


def verdict(rows: Sequence[Row], letter: str) -> Verdict:
    found = claims.verdicts("gradreg", rows)
    return {each.claim: each for each in found}[f"gradreg ({letter})"]


def nets(double_back: float, spect_reg: float, batchnorm: float, dropout: float) -> list[Row]:
    return [
        row("c2-baseline", {"none": 0.965, "double-back": double_back, "spect-reg": spect_reg}),
        row("c2-batchnorm", {"none": batchnorm, "double-back": 0.5}),
        row("c2-dropout", {"none": dropout, "double-back": 0.5}),
    ]


def sizes(*accuracies: float, at: Sequence[int] = SIZES) -> list[Row]:
    """Of ``C4``'s methods, the same at all."""
    return [row(f"c4-{size}", dict(zip(C4, accuracies, strict=True))) for size in at]


def test_penalties_on_the_plain_net_are_compared_with_the_other_nets_alone() -> None:
    assert verdict(nets(0.975, 0.976, 0.968, 0.970), "a").verdict == "held"
    assert verdict(nets(0.975, 0.976, 0.980, 0.970), "a").verdict == "not held"
    assert verdict(nets(0.975, 0.960, 0.968, 0.970), "a").verdict == "not held"
    found = verdict(nets(0.975, 0.976, 0.968, 0.970), "a").findings
    assert len(found) == 4 and found[1].mean == pytest.approx(0.007, abs=0.001)


def test_a_net_that_was_not_run_leaves_the_claim_on_nets_undecided_unless_the_other_contradicts() -> None:
    found = verdict(nets(0.975, 0.976, 0.968, 0.970)[:2], "a")
    assert found.verdict == "undecided" and "gradreg/c2-dropout not run" in str(found.findings[0])
    assert verdict(nets(0.975, 0.976, 0.980, 0.970)[:2], "a").verdict == "not held"


def test_double_back_must_be_ahead_of_every_other_penalty_at_every_size() -> None:
    assert verdict(sizes(0.98, 0.97, 0.97, 0.97), "b").verdict == "held"
    assert verdict(sizes(0.98, 0.97, 0.97, 0.985), "b").verdict == "not held"
    mixed = [*sizes(0.98, 0.97, 0.97, 0.97, at=SIZES[:-1]), *sizes(0.97, 0.98, 0.97, 0.97, at=SIZES[-1:])]
    assert verdict(mixed, "b").verdict == "not held"
    assert len(verdict(mixed, "b").findings) == 3 * 9


@pytest.mark.parametrize("letter", "bcd")
def test_sizes_not_run_are_told_and_leave_a_claim_undecided_where_none_contradicts(letter: str) -> None:
    favourable = {"b": (0.98, 0.97, 0.97, 0.97), "c": (0.9, 0.98, 0.9, 0.97), "d": (0.98, 0.98, 0.96, 0.97)}
    contrary = {"b": (0.96, 0.97, 0.97, 0.97), "c": (0.9, 0.96, 0.9, 0.97), "d": (0.95, 0.95, 0.96, 0.95)}
    found = verdict(sizes(*favourable[letter], at=(500,)), letter)
    assert found.verdict == "undecided" and found.findings[0].sign == 1
    assert any(
        str(each).startswith("gradreg/c4-20000: ") and str(each).endswith(": not run") for each in found.findings
    )
    assert verdict(sizes(*contrary[letter], at=(500,)), letter).verdict == "not held"


def test_the_power_that_the_page_tells_of_claims_of_27_comparisons_is_that_of_their_tests() -> None:
    def held(seeds: int, lead: float) -> float:
        """Where differences over their deviation are ``lead``: the noncentral t beyond the test's quantile."""
        beyond = stats.t.ppf(1 - testing.LEVEL / 2, seeds - 1)
        return float(stats.nct.sf(beyond, seeds - 1, lead * seeds**0.5)) ** 27

    told = " ".join(reproduce.PAGE.read_text(encoding="utf-8").split())
    assert f"10 seeds would find all of them in {held(10, 1):.1%}".replace("%", " % of cases, and 5 in less") in told
    assert held(5, 1) < 1e-9
    assert f"were each 0.3 points, in {held(10, 1.5):.0%} and in {held(5, 1.5):.2%}.".replace("%", " %") in told


def leads(small: float, large: float) -> list[Row]:
    """SpectReg's over the confidence penalty."""
    return [
        row(f"c4-{size}", {"spect-reg": 0.95 + (small if size <= 5000 else large), "confidence-penalty": 0.95})
        for size in SIZES
    ]


@pytest.mark.parametrize(
    ("small", "large", "word"),
    [
        (0.005, -0.004, "held"),
        (0.005, 0.0, "held"),
        (0.005, 0.005, "not held"),
        (-0.005, 0.0, "not held"),
        (0.0, -0.005, "undecided"),
        (0.005, gradreg.LEAD, "undecided"),
    ],
)
def test_spect_reg_leads_at_small_sizes_and_has_no_lead_at_large_ones(small: float, large: float, word: str) -> None:
    assert verdict(leads(small, large), "c").verdict == word


def test_small_and_large_sizes_are_stated_and_those_between_are_not_asked() -> None:
    found = verdict(leads(0.005, 0.0), "c")
    assert (gradreg.SMALL, gradreg.LARGE) == ((500, 1000, 2000), (10_000, 15_000, 20_000))
    assert "500, 1,000 and 2,000" in found.test and "10,000, 15,000 and 20,000" in found.test
    assert len(found.findings) == 6


def test_jac_reg_must_be_behind_every_peer_at_every_size() -> None:
    assert verdict(sizes(0.98, 0.97, 0.96, 0.97), "d").verdict == "held"
    assert verdict(sizes(0.98, 0.95, 0.96, 0.97), "d").verdict == "not held"
    assert verdict(sizes(0.98, 0.96, 0.96, 0.97), "d").verdict == "undecided"


@pytest.mark.parametrize(
    ("spect_reg", "shake", "word"),
    [
        (0.9655, SHAKE, "held"),
        (0.9750, SHAKE, "not held"),
        (0.9550, SHAKE, "not held"),
        (0.9655, 20 * SHAKE, "undecided"),
    ],
)
def test_a_projection_loses_nothing_where_its_difference_lies_within_the_margin(
    spect_reg: float, shake: float, word: str
) -> None:
    methods = {"spect-reg": spect_reg, "jac-reg": 0.965, "frob-reg": 0.966}
    found = verdict([row("c6", methods, shake=shake)], "e")
    assert found.verdict == word and f"{gradreg.MARGIN:g}" in found.test
    assert len(found.findings) == 2


def test_ours_is_compared_with_the_methods_that_the_row_has_in_the_paper() -> None:
    methods = {"none": 0.96, "spect-reg": 0.965, "double-back": 0.966, "snr-adam": 0.975, "cap": 0.95}
    found = claims.additions("gradreg", [row("c2-dropout", methods)])
    assert [(each.claim, each.verdict, len(each.findings)) for each in found] == [
        ("gradreg/c2-dropout snr-adam", "held", 3),
        ("gradreg/c2-dropout cap", "not held", 3),
    ]


def test_ours_of_a_net_and_images_that_two_rows_share_are_judged_in_one() -> None:
    rows = [row("c2-dropout", {"none": 0.96, "cap": 0.97}), row("c6", {"none": 0.96, "spect-reg": 0.965})]
    earlier = replace(rows[1], runs=(*rows[1].runs, *rows[0].of("cap").values()))
    found = claims.additions("gradreg", [rows[0], earlier])
    assert [each.claim for each in found] == ["gradreg/c2-dropout cap"]


def test_the_section_has_the_replications_verdict_beside_ours_and_the_cost_below() -> None:
    methods = {"none": 0.96, "spect-reg": 0.965, "double-back": 0.965, "spectral": 0.975}
    text = claims_section("gradreg", [row("c2-dropout", methods)])
    assert text.startswith("| claim |  | replication | tiny, 4 epochs |\n")
    line = next(line for line in text.splitlines() if line.startswith("| gradreg (a) |"))
    assert "| not held against Batchnorm | **undecided** (0 for, 0 against, 0 open, 4 untested) |" in line
    assert "- gradreg/c2-dropout: none 1.00, SpectReg 1.05, DoubleBack 1.10, Norm Scaling (ours) 1.15" in text
    nothing = claims_section("gradreg", [])
    assert nothing.count("**undecided**") == 5 and "| replication | nothing run |" in nothing


def test_rows_of_ours_come_in_the_tables_order() -> None:
    rows = [row(name, {"none": 0.9, "cap": 0.95}) for name in ("c4-10000", "c4-500", "c2-dropout")]
    heads = [
        line for line in claims_section("gradreg", rows).splitlines() if line.endswith("untested)") and " cap: " in line
    ]
    assert [line.split()[1].rpartition("/")[2] for line in heads] == ["c2-dropout", "c4-500", "c4-10000"]
