"""Verdicts on made-up results, where the right one is known in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from papers.recipe import SCALES, Scale
from papers.tables import claims, table
from papers.tables.claims import Verdict, snr, testing
from papers.tables.results import Row, Run

from tests.examples.results_samples import TINY, Last, made_row

FOUR = ("vanilla", "weight-decay", "adversarial", "snr")
BEST: Mapping[str, Last] = {name: {"test": 0.7 if name == "snr" else 0.4, "train": 0.75} for name in FOUR}
WORST: Mapping[str, Last] = {name: {"test": 0.3 if name == "snr" else 0.6, "train": 0.75} for name in FOUR}


def verdict(rows: list[Row], letter: str, *, published: bool = False) -> Verdict:
    table = rows[0].name.split("/")[0]
    found = claims.verdicts(table, rows, published=published)
    return {each.claim: each for each in found}[f"{table} ({letter})"]


def rows_of(names: tuple[str, ...], methods: Mapping[str, Last], seeds: int = 4) -> list[Row]:
    return [made_row(name, methods, range(seeds)) for name in names]


@pytest.mark.parametrize(("letter", "names"), [("a", snr.LARGE), ("b", (snr.SMALL[0], snr.SMALL[3]))])
def test_snr_best_in_accuracy_is_held_where_it_is_and_not_where_it_is_not(letter: str, names: tuple[str, ...]) -> None:
    assert verdict(rows_of(names, BEST), letter).verdict == "held"
    assert verdict(rows_of(names, WORST), letter).verdict == "not held"


def test_a_row_not_run_leaves_a_claim_that_names_it_undecided_unless_another_row_contradicts() -> None:
    some = verdict(rows_of(snr.LARGE[:3], BEST), "a")
    assert some.verdict == "undecided"
    assert [str(each) for each in some.findings[9:]] == [
        f"{snr.LARGE[3]}: snr over {other}: not run" for other in FOUR[:3]
    ]
    assert verdict(rows_of(snr.LARGE[:3], WORST), "a").verdict == "not held"


def test_a_method_not_run_is_told() -> None:
    found = verdict(rows_of(snr.LARGE, {name: BEST[name] for name in FOUR if name != "adversarial"}), "a")
    assert found.verdict == "undecided"
    assert f"{snr.LARGE[0]}: snr over adversarial: adversarial not run" in map(str, found.findings)


def test_two_seeds_leave_a_clear_difference_undecided() -> None:
    found = verdict(rows_of(snr.LARGE, BEST, seeds=2), "a")
    assert found.verdict == "undecided" and "2 of at least 3 seeds" in str(found.findings[0])


def test_seeds_are_paired_by_their_number_and_those_that_one_method_lacks_are_left_out() -> None:
    row = made_row(snr.LARGE[0], BEST, range(5))
    fewer = replace(row, runs=tuple(run for run in row.runs if (run.method, run.seed) != ("vanilla", 1)))
    shuffled = replace(fewer, runs=fewer.runs[::-1])
    for one in (fewer, shuffled):
        found = testing.compare({row.name: one}, row.name, "", lambda a, b: float(a.seed - b.seed), "snr", "vanilla")
        assert found.values == [0.0] * 4


def test_smallest_gap_of_snr_is_held_and_not_held() -> None:
    # The gap at the threshold: the least train less test over epochs above it.
    small = {name: {"test": 0.6, "train": 0.61 if name == "snr" else 0.9} for name in FOUR}
    large = {name: {"test": 0.6, "train": 0.9 if name == "snr" else 0.61} for name in FOUR}
    assert verdict(rows_of(snr.LARGE[:3], small), "c").verdict == "held"
    assert verdict(rows_of(snr.LARGE[:3], large), "c").verdict == "not held"


def test_a_method_that_never_comes_above_the_threshold_has_no_gap_to_compare() -> None:
    row = replace(made_row(snr.LARGE[0], BEST), threshold=0.6)
    found = verdict([row], "c")
    assert found.verdict == "undecided" and "no value in 4 of 4 seeds" in str(found.findings[0])


@pytest.mark.parametrize(("sign", "word"), [(1, "held"), (-1, "not held"), (0, "undecided")])
def test_gradient_norm_and_gap_go_together_or_against_each_other(sign: int, word: str) -> None:
    norms = {1: (1.0, 2.0, 3.0, 4.0), -1: (4.0, 3.0, 2.0, 1.0), 0: (2.0, 4.0, 1.0, 3.0)}[sign]
    methods = {name: {"test": 0.5, "train": 0.6 + 0.1 * i, "gradient_norm": norms[i]} for i, name in enumerate(FOUR)}
    assert verdict(rows_of(snr.LARGE[:2], methods), "d").verdict == word


def test_correlation_is_that_of_the_papers_methods_in_the_papers_rows() -> None:
    points: dict[str, Last] = {
        name: {"test": 0.5, "train": 0.6 + 0.1 * i, "gradient_norm": 1.0 + i} for i, name in enumerate(FOUR)
    }
    ours: dict[str, Last] = {"cap": {"test": 0.5, "train": 0.99, "gradient_norm": 0.01}}
    alone = verdict(rows_of(snr.LARGE[:2], points), "d")
    assert verdict(rows_of(snr.LARGE[:2], {**points, **ours}), "d").findings == alone.findings
    others = rows_of(("snr/vgg-cifar10-b512", "snr/vgg-cifar10-b64-noise20"), points)
    assert verdict([*rows_of(snr.LARGE[:2], points), *others], "d").findings == alone.findings
    assert verdict(others, "d").verdict == "undecided"


def test_correlation_needs_three_methods_of_three_seeds() -> None:
    two = {name: BEST[name] for name in FOUR[:2]}
    found = verdict(rows_of(snr.LARGE, two), "d")
    assert found.verdict == "undecided" and "no row with three methods" in str(found.findings[0])


DIRECTIONS: Mapping[str, Last] = {
    "vanilla": {"sigma": 4.0, "rest": 8.0},
    "weight-decay": {"sigma": 2.0, "rest": 4.0},
    "snr": {"sigma": 1.5, "rest": 7.9},
}


def test_directions_of_weight_decay_and_snr() -> None:
    assert verdict(rows_of(snr.SMALL[:1], DIRECTIONS), "e").verdict == "held"
    all_alike = {**DIRECTIONS, "snr": {"sigma": 1.0, "rest": 1.0}}  # which shrinks the rest more than the first
    assert verdict(rows_of(snr.SMALL[:1], all_alike), "e").verdict == "not held"
    assert verdict(rows_of(snr.SMALL[:1], {"vanilla": {}}), "e").verdict == "undecided"


def test_directions_need_three_seeds_in_one_row_not_one_in_each_of_three() -> None:
    assert verdict(rows_of(snr.SMALL[:3], DIRECTIONS, seeds=1), "e").verdict == "undecided"
    apart = made_row(snr.SMALL[0], DIRECTIONS, range(6))
    runs = tuple(run for run in apart.runs if (run.seed < 3) == (run.method == "snr"))
    assert verdict([replace(apart, runs=runs)], "e").verdict == "undecided"
    found = verdict([*rows_of(snr.SMALL[:1], DIRECTIONS), *rows_of(snr.SMALL[1:3], DIRECTIONS, seeds=1)], "e")
    assert found.verdict == "held"
    assert all(finding.what.endswith("over vgg-cifar10-b64") for finding in found.findings)


def test_directions_are_undecided_where_a_run_of_a_row_diverged() -> None:
    rows = rows_of(snr.SMALL[:2], DIRECTIONS)
    layers = {name: {**layer, "sigma": [*layer["sigma"][:-1], None]} for name, layer in rows[1].runs[0].layers.items()}
    lost = replace(rows[1], runs=(replace(rows[1].runs[0], layers=layers), *rows[1].runs[1:]))
    assert rows[1].runs[0].method == "vanilla"
    found = verdict([rows[0], lost], "e")
    assert found.verdict == "undecided"
    assert f"{snr.SMALL[1]}: log sigma_1, vanilla over snr: no value in 1 of 4 seeds" in str(found.findings[2])


ALL_NS = ("normscale/mlp-5x2000", "normscale/mlp-7x4000", "normscale/resnet34", "normscale/resnet50")
NORMS: Mapping[str, Last] = {"none": {"sigma": 30.0}, "frobenius": {"sigma": 8.0}, "spectral": {"sigma": 0.9}}


def test_norms_lower_at_every_epoch_are_held_and_higher_ones_not() -> None:
    assert verdict(rows_of(ALL_NS, NORMS), "a").verdict == "held"
    higher = {**NORMS, "frobenius": {"sigma": 40.0}}
    assert verdict(rows_of(ALL_NS, higher), "a").verdict == "not held"
    not_by_far = {**NORMS, "spectral": {"sigma": 6.0}}
    assert verdict(rows_of(ALL_NS, not_by_far), "a").verdict == "not held"


def test_a_norm_that_is_higher_at_one_epoch_is_enough_for_not_held() -> None:
    def spoiled(row: Row) -> Row:
        runs = []
        for run in row.runs:
            means = list(run.epochs["sigma_mean"])
            if run.method == "spectral":
                means[1] = 50.0 + run.seed
            runs.append(replace(run, epochs={**run.epochs, "sigma_mean": means}))
        return replace(row, runs=tuple(runs))

    assert verdict([spoiled(row) for row in rows_of(ALL_NS, NORMS)], "a").verdict == "not held"


def stable(mlp_train: float, mlp_rise: float, resnet_rise: float) -> list[Row]:
    mlp = {
        "none": {"train": 0.9, "test": 0.5},
        "spectral": {"train": mlp_train, "test": 0.5, "rise": mlp_rise},
    }
    resnet = {"none": {}, "spectral": {"rise": resnet_rise}}
    return [*rows_of(ALL_NS[:2], mlp), *rows_of(ALL_NS[2:], resnet)]


def test_stability_of_mlps_and_not_of_resnets() -> None:
    assert verdict(stable(0.55, 0.03, 0.5), "b").verdict == "held"
    assert verdict(stable(0.99, 0.03, 0.5), "b").verdict == "not held"
    assert verdict(stable(0.55, 0.9, 0.5), "b").verdict == "not held"
    assert verdict(stable(0.55, 0.03, 0.04), "b").verdict == "not held"
    assert verdict(stable(0.55, 0.03, 0.5)[:2], "b").verdict == "undecided"


def test_a_test_loss_that_is_least_at_the_end_of_every_seed_keeps_falling() -> None:
    assert verdict(stable(0.55, -0.3, 0.5), "b").verdict == "held"
    assert verdict(stable(0.55, 0.03, -0.3), "b").verdict == "not held"


def test_rise_is_of_the_mean_of_the_last_quarter_over_the_least_before_it() -> None:
    run = made_row(ALL_NS[0], {"spectral": {}}, [0]).runs[0]

    def risen(*losses: float | None) -> float | None:
        epochs = {"epoch": list(range(len(losses) + 1)), "test_loss": [9.0, *losses]}
        return claims.normscale.rise(replace(run, epochs=epochs))

    assert risen(4.0, 3.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0) == pytest.approx(np.log(7 / 2))
    assert risen(4.0, 3.0, 2.0, 1.0) == pytest.approx(np.log(1 / 2))
    assert risen(4.0, None, 2.0, 1.0) == pytest.approx(np.log(1 / 2))
    assert risen(2.0, 3.0) == pytest.approx(np.log(3 / 2))
    assert risen(3.0) is risen(None, 3.0) is None


def test_late_epochs_are_told_by_their_number_and_not_by_their_place() -> None:
    run = made_row(ALL_NS[0], {"spectral": {}}, [0]).runs[0]

    def measured(*numbers: int) -> Run:
        values = [9.0, *(float(number) for number in numbers)]
        return replace(run, epochs={"epoch": [0, *numbers], "test_loss": values, "sigma_deviation": values})

    every = measured(*range(1, 9))
    assert every.late("test_loss", 1 / 4) == [7.0, 8.0] and every.late("test_loss", 1 / 2) == [5.0, 6.0, 7.0, 8.0]
    assert measured(1, 2, 3, 4, 5).late("test_loss", 1 / 2) == [3.0, 4.0, 5.0]
    assert measured(25, 50, 75, 100).late("test_loss", 1 / 4) == [100.0]
    uneven = measured(1, 2, 3, 4, 10, 60, 100)
    assert uneven.late("test_loss", 1 / 2) == [60.0, 100.0]
    assert claims.normscale.rise(uneven) == pytest.approx(np.log(100))
    assert table.late_deviation(uneven) == 80.0


def test_a_test_loss_that_is_not_finite_at_the_end_is_no_value() -> None:
    rows = stable(0.55, 0.03, 0.5)
    run = rows[0].of("spectral")[0]
    assert testing.compare({rows[0].name: rows[0]}, rows[0].name, "", claims.normscale.rise, "spectral").missing == ""
    lost = replace(run, epochs={**run.epochs, "test_loss": [*run.epochs["test_loss"][:-1], None]})
    assert claims.normscale.rise(lost) is None


def test_frobenius_best_on_resnets() -> None:
    best = {"none": {"test": 0.5}, "frobenius": {"test": 0.6}, "spectral": {"test": 0.5}}
    worst = {"none": {"test": 0.5}, "frobenius": {"test": 0.4}, "spectral": {"test": 0.5}}
    assert verdict(rows_of(ALL_NS, best), "c").verdict == "held"
    assert verdict(rows_of(ALL_NS, worst), "c").verdict == "not held"


@pytest.mark.parametrize(("spectral", "word"), [(0.45, "held"), (0.33, "not held"), (0.25, "not held")])
def test_ten_points_on_the_larger_mlp(spectral: float, word: str) -> None:
    methods = {"none": {"test": 0.24}, "frobenius": {"test": 0.27}, "spectral": {"test": spectral}}
    assert verdict(rows_of(ALL_NS[1:2], methods), "d").verdict == word


def test_norms_alike_across_layers() -> None:
    alike = {"none": {"uneven": 0.8}, "frobenius": {"uneven": 0.3}, "spectral": {"uneven": 0.1}}
    apart = {"none": {"uneven": 0.1}, "frobenius": {"uneven": 0.3}, "spectral": {"uneven": 0.8}}
    assert verdict(rows_of(ALL_NS, alike), "e").verdict == "held"
    assert verdict(rows_of(ALL_NS, apart), "e").verdict == "not held"


def test_published_methods_are_judged_apart_from_the_stated_ones() -> None:
    stated = {"none": {"test": 0.5}, "frobenius": {"test": 0.4}, "spectral": {"test": 0.5}}
    published = {f"{name}-published": last for name, last in stated.items()} | {"frobenius-published": {"test": 0.7}}
    rows = rows_of(ALL_NS, {**stated, **published})
    assert verdict(rows, "c").verdict == "not held"
    assert verdict(rows, "c", published=True).verdict == "held"


def test_ours_is_compared_with_every_method_of_the_paper_in_each_row_that_has_it() -> None:
    papers = {"none": {"test": 0.4}, "frobenius": {"test": 0.5}, "spectral": {"test": 0.3}}
    rows = [
        made_row(ALL_NS[0], {**papers, "ours": {"test": 0.6}}),
        made_row(ALL_NS[1], {**papers, "ours": {"test": 0.45}}),
        made_row(ALL_NS[2], papers),
        made_row(ALL_NS[3], {"none": {"test": 0.4}, "ours": {"test": 0.6}}),
    ]
    found = claims.additions("normscale", rows)
    assert [(each.claim, each.verdict) for each in found] == [
        (f"{ALL_NS[0]} ours", "held"),
        (f"{ALL_NS[1]} ours", "not held"),
        (f"{ALL_NS[3]} ours", "undecided"),
    ]
    assert [each.claim for each in claims.additions("snr", [made_row(snr.LARGE[0], {**BEST, "cap": {}})])] == [
        f"{snr.LARGE[0]} cap"
    ]


@pytest.mark.parametrize("table", claims.CLAIMS)
def test_every_claim_is_undecided_and_says_why_where_nothing_was_run(table: str) -> None:
    found = claims.verdicts(table, [])
    assert [each.claim for each in found] == [f"{table} ({letter})" for letter in "abcde"]
    for each in found:
        assert each.verdict == "undecided" and each.findings
        assert all("no" in str(finding).split(":")[-1] for finding in each.findings)


@pytest.mark.parametrize(
    ("scale", "size"), [(replace(TINY, name="cpu"), "cpu, 4 epochs"), (SCALES["tiny"], "tiny scale")]
)
def test_rows_of_two_scales_or_numbers_of_epochs_are_not_judged_together(scale: Scale, size: str) -> None:
    rows = [made_row(snr.LARGE[0], BEST), made_row(snr.LARGE[0], BEST, scale=scale)]
    told = "; ".join(sorted(["tiny, 4 epochs", size]))
    with pytest.raises(ValueError, match=f"rows must be of one scale and number of epochs, got {told}"):
        claims.verdicts("snr", rows)
