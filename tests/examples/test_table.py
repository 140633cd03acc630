"""Markdown of made-up results."""

from __future__ import annotations

from dataclasses import replace

import torch
from papers.data.images import Images
from papers.data.reading import Split
from papers.recipes import find
from papers.runs import member
from papers.tables import table
from papers.tables.claims.section import claims_section
from papers.tables.results import Row, compact, row_of

from tests.examples.results_samples import EPOCHS, LAYERS, TINY, made, made_row, result

VGG = "snr/vgg-cifar10-b4096"
MLP = "normscale/mlp-5x2000"


def lines_of(row: Row) -> dict[str, dict[str, str]]:
    """Cells of the row's table by method and head; "replication" and "here" belong to the head before them."""
    lines = [line.strip("|").split("|") for line in table.row_table(row).splitlines()]
    head, _, *rest = [[cell.strip() for cell in line] for line in lines]
    heads: list[str] = []
    for name in head:
        heads.append(f"{heads[-1].rpartition(':')[0]}: {name}" if name in ("replication", "here") else name)
    return {line[0]: dict(zip(heads, line, strict=True)) for line in rest}


# --- a row ------------------------------------------------------------------------------------------------------------


def test_paper_and_ours_stand_side_by_side_with_mean_and_deviation_over_seeds() -> None:
    row = made(
        VGG,
        ("vanilla", 0, {"test": 0.5, "train": 0.6}),
        ("vanilla", 1, {"test": 0.6, "train": 0.9}),
        ("snr", 0, {"test": 0.7, "train": 0.71}),
        times={"vanilla": 1.0, "snr": 1.0345},
    )
    found = lines_of(row)
    assert found["vanilla"]["test accuracy: paper"] == "0.858"
    assert found["vanilla"]["test accuracy: here"] == "0.550 ± 0.071"
    assert found["SNR"]["test accuracy: here"] == "0.700"
    assert (found["vanilla"]["seeds"], found["SNR"]["seeds"]) == ("2", "1")
    assert (found["vanilla"]["time"], found["SNR"]["time"], found["cap on SGD (ours)"]["time"]) == ("1.00", "1.03", "–")
    assert found["SNR"]["mean σ₁"] == "2.00" and found["SNR"]["deviation of σ₁"].startswith("0.1")


def test_gap_has_one_threshold_below_the_worst_methods_mean_best_accuracy() -> None:
    row = made(VGG, ("vanilla", 0, {"test": 0.5}), ("vanilla", 1, {"test": 0.6}), ("snr", 0, {"test": 0.7}))
    assert row.gap_threshold() == 0.54  # min(0.55, 0.7) - 0.01
    found = lines_of(row)
    assert found["vanilla"]["gap above 0.54: paper"] == "0.092"
    assert found["vanilla"]["gap above 0.54: here"].endswith("(1 of 2)")


def test_gap_threshold_is_rounded_down_and_never_by_a_float_to_the_next_below() -> None:
    for test, threshold in ((0.5, 0.49), (0.509, 0.49), (0.51, 0.5), (0.58, 0.57), (0.29, 0.28)):
        assert made(VGG, ("vanilla", 0, {"test": test})).gap_threshold() == threshold


def test_gap_threshold_is_the_papers_at_full_scale_whatever_the_accuracies() -> None:
    row = row_of([find(f"{VGG}/snr")], [compact(result(f"{VGG}/snr", 0, test=0.2))])
    assert row.gap_threshold() == 0.85
    assert lines_of(row)["SNR"]["gap above 0.85: here"] == "none"


def test_runs_of_published_defects_do_not_set_the_threshold() -> None:
    row = made(MLP, ("none", 0, {"test": 0.5}), ("none-published", 0, {"test": 0.2}))
    assert row.gap_threshold() == 0.49
    assert made(MLP, ("none-published", 0, {"test": 0.2})).gap_threshold() is None


def test_runs_that_did_not_learn_do_not_set_the_threshold() -> None:
    learned = (("vanilla", 0, {"test": 0.5}), ("vanilla", 1, {"test": 0.52}), ("adversarial", 0, {"test": 0.6}))
    assert made(VGG, *learned, ("snr", 0, {"test": 0.2})).gap_threshold() == 0.5  # twice chance, not above it
    lost = made(VGG, *learned, ("snr", 0, {"test": 0.25}))
    assert lost.gap_threshold() == 0.24
    for column in ("train_loss", "test_loss"):
        epochs = {**lost.runs[-1].epochs, column: [4.6, 9.0, None, 4.6, 4.6]}
        assert replace(lost, runs=(*lost.runs[:-1], replace(lost.runs[-1], epochs=epochs))).gap_threshold() == 0.5
    assert made(VGG, ("vanilla", 0, {"test": 0.15})).gap_threshold() is None


def test_methods_of_our_own_do_not_set_the_threshold() -> None:
    assert made(MLP, ("none", 0, {"test": 0.5}), ("ours", 0, {"test": 0.2})).gap_threshold() == 0.49
    assert made(MLP, ("ours", 0, {"test": 0.2})).gap_threshold() is None


def test_notes_tell_how_many_images_are_measured() -> None:
    assert f"of at most {member.GRADIENTS:,} test images" in table.NOTES
    assert f"of at most {member.TRAIN_EVALUATED:,} training images" in table.NOTES


def test_norm_scaling_has_the_papers_losses_and_norms() -> None:
    found = lines_of(made(MLP, ("none", 0, {"sigma": 30.0}), ("spectral", 0, {}), ("spectral-published", 0, {})))
    assert found["none"]["mean σ₁: paper"] == "35.4" and found["none"]["mean σ₁: here"] == "30.00"
    assert found["spectral"]["test loss: paper"] == found["spectral, as published"]["test loss: paper"] == "3.53"
    assert "gap above 0.49" in found["none"]
    assert "none, as published" not in found  # it was not run, and is only a switch


def test_methods_not_run_are_listed_as_not_run() -> None:
    found = lines_of(made(VGG, ("vanilla", 0, {})))
    assert list(found) == [
        "vanilla",
        "weight decay",
        "adversarial",
        "SNR",
        "AdamW",
        "SNR on AdamW (ours)",
        "cap on SGD (ours)",
        "cap on AdamW (ours)",
    ]
    assert found["adversarial"]["seeds"] == "not run" and found["adversarial"]["test accuracy: here"] == "–"
    assert found["adversarial"]["test accuracy: paper"] == "0.87"


def test_values_that_are_not_finite_are_counted_out() -> None:
    lost = result(f"{VGG}/vanilla", 0)
    lost["epochs"][-1]["test_loss"] = None
    lost["layers"][LAYERS[0]]["sigma"][-1] = None
    row = row_of([find(f"{VGG}/vanilla").scaled(TINY)], [compact(lost), compact(result(f"{VGG}/vanilla", 1))])
    found = lines_of(row)["vanilla"]
    assert found["test loss"] == "2.00 (1 of 2)" and found["mean σ₁"] == "2.00 (1 of 2)"


def test_facts_name_seeds_epochs_images_machine_versions_and_commit() -> None:
    text = table.facts(made(VGG, ("vanilla", 0, {}), ("vanilla", 3, {})))
    for part in ("seeds 0, 3", f"{EPOCHS} epochs of batches of 256", "256 training and 128 test images of cifar10"):
        assert part in text
    assert "vgg16 (scale 1)" in text and text.endswith("CPU, 1 threads; torch 2.9.0; commit abc1234.")
    noisy = table.facts(made(f"{VGG.replace('4096', '64')}-noise20", ("snr", 0, {})))
    assert "20% of the training labels wrong" in noisy


def test_facts_of_a_balanced_row_tell_the_images_that_its_runs_were_trained_on() -> None:
    split = Split(torch.zeros(400, 1, 16, 16, dtype=torch.uint8), torch.arange(400) % 10)
    mnist = Images("mnist", 10, split.x, split.y, split.x, split.y, (0.1,), (0.3,))
    for name, count in (("gradreg/c6/none", 250), ("gradreg/c4-500/none", 256)):
        assert len(member.chosen(find(name).scaled(TINY), mnist, 0).train_x) == count
        row = made(name.removesuffix("/none"), ("none", 0, {}))
        assert f"; {count} training and 128 test images of mnist; lenet5" in table.facts(row)


# --- a table ----------------------------------------------------------------------------------------------------------


def test_rows_come_in_the_tables_order_and_those_not_run_with_their_reasons() -> None:
    rows = [made_row(VGG, {"snr": {}}), made_row(VGG.replace("4096", "64"), {"snr": {}}), made_row(MLP, {"none": {}})]
    text = table.table_section("snr", rows, reasons={"snr/densenet-stl10-b64": "no stl10_binary"})
    assert text.index("### `snr/vgg-cifar10-b64`, tiny, 4") < text.index("### `snr/vgg-cifar10-b4096`, tiny, 4")
    assert "normscale" not in text
    both = table.table_section("snr", [rows[0], replace(rows[0], scale="full")])
    assert both.index(f"`{VGG}`, full, 4 epochs") < both.index(f"`{VGG}`, tiny, 4 epochs")
    absent = text.partition("Not run:\n\n")[2].splitlines()
    assert len(absent) == 16 - 2 and "- `snr/densenet-stl10-b64`: no stl10_binary" in absent


def test_a_recorded_row_that_no_recipe_is_of_is_left_out() -> None:
    text = table.table_section("snr", [replace(made_row(VGG, {"snr": {}}), name="snr/vgg-cifar10-b9")])
    assert text.startswith("Not run:") and "b9" not in text


def test_a_table_of_nothing_lists_all_rows_as_not_run() -> None:
    text = table.table_section("normscale", [])
    assert text.startswith("Not run:") and text.count("- `normscale/") == 4


def test_every_line_of_a_table_has_as_many_cells() -> None:
    for name, methods in ((VGG, ("vanilla", "snr")), (MLP, ("none", "ours"))):
        lines = table.row_table(made_row(name, {method: {} for method in methods})).splitlines()
        assert len({line.count("|") for line in lines}) == 1 and len(lines) > 4


def test_claims_have_a_verdict_for_each_scale_and_their_comparisons_below() -> None:
    four = {name: {"test": 0.7 if name == "snr" else 0.4} for name in ("vanilla", "weight-decay", "adversarial", "snr")}
    cpu = made_row(VGG, four, scale=replace(TINY, name="cpu"))
    text = claims_section("snr", [made_row(VGG, four, range(1)), cpu])
    line = next(line for line in text.splitlines() if line.startswith("| snr (a) |"))
    assert line.count("**undecided**") == 2
    assert "(0 for, 0 against, 0 open, 12 untested)" in line and "(3 for, 0 against, 0 open, 9 untested)" in line
    assert text.count("<details>") == text.count("</details>") == 2
    assert f"- {VGG}: snr over vanilla: +0.3" in text
    assert "- snr/nin-cifar100-b4096: snr over vanilla: not run" in text


def test_what_ours_adds_stands_below_the_claims_where_it_was_run() -> None:
    four = {name: {"test": 0.4} for name in ("vanilla", "weight-decay", "adversarial", "snr")}
    assert "Ours more accurate" not in claims_section("snr", [made_row(VGG, four)])
    text = claims_section("snr", [made_row(VGG, {**four, "cap": {"test": 0.6}})])
    assert f"- {VGG} cap: **held** (4 for, 0 against, 0 open, 0 untested)" in text
    assert f"- {VGG}: cap over weight-decay: +0." in text


def test_claims_of_nothing_run_are_undecided() -> None:
    text = claims_section("normscale", [])
    assert text.count("**undecided**") == 5 and "nothing run" in text


def test_verdicts_on_published_defects_are_shown_where_they_were_run() -> None:
    stated = {"none": {}, "spectral": {}}
    assert "published code" not in claims_section("normscale", [made_row(MLP, stated)])
    text = claims_section("normscale", [made_row(MLP, {**stated, "none-published": {}})])
    assert "With the defects of the published code, tiny, 4 epochs: normscale (a): undecided;" in text
