"""Results in files: what is read back, what joins what is there, and how small they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from papers.recipe import FULL, SCALES
from papers.recipes import find
from papers.tables import records, results, table
from papers.tables.claims.section import claims_section
from papers.tables.results import Row, compact, row_of, thinned

from tests.examples.results_samples import TINY, made, made_row, result

VGG = "snr/vgg-cifar10-b4096"
MLP = "normscale/mlp-5x2000"


def test_a_record_reads_back_as_it_was_written(tmp_path: Path) -> None:
    row = made_row(MLP, {"none": {}, "spectral": {}})
    path = records.record(tmp_path, row)
    assert path.name == "normscale-mlp-5x2000-tiny-4-epochs.json"
    (found,) = records.read_all(tmp_path)
    assert table.row_section(found) == table.row_section(row)
    assert sorted(found.runs, key=str) == sorted(row.runs, key=str)


def test_recording_adds_new_runs_keeps_old_ones_and_replaces_the_same(tmp_path: Path) -> None:
    records.record(tmp_path, made(VGG, ("vanilla", 0, {"test": 0.5}), ("snr", 0, {}), times={"vanilla": 1.0}))
    path = records.record(tmp_path, made(VGG, ("vanilla", 0, {"test": 0.6}), ("vanilla", 1, {}), times={"snr": 1.2}))
    found = records.read(path)
    assert [(run.method, run.seed) for run in found.runs] == [("vanilla", 0), ("snr", 0), ("vanilla", 1)]
    assert found.of("vanilla")[0].last("test_accuracy") == 0.6
    assert found.times == {"vanilla": 1.0, "snr": 1.2}


def test_recording_the_same_again_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    row = made_row(VGG, {"vanilla": {}, "snr": {}})
    before = records.record(tmp_path, row).read_text()
    assert records.record(tmp_path, row).read_text() == before


def test_runs_of_another_protocol_are_not_mixed_in(tmp_path: Path) -> None:
    records.record(tmp_path, made_row(VGG, {"vanilla": {}}))
    larger = made_row(VGG, {"snr": {}}, scale=replace(TINY, train=512))
    with pytest.raises(ValueError, match=r"tiny-4-epochs.json holds runs with .*train 256 instead of 512"):
        records.record(tmp_path, larger)


def test_a_shorter_run_at_full_scale_is_not_called_full_scale_nor_in_its_way(tmp_path: Path) -> None:
    shorter, whole = (made_row(VGG, {"snr": {}}, range(3), replace(FULL, epochs=epochs)) for epochs in (20, 200))
    kept = [records.record(tmp_path, row).name for row in (shorter, whole)]
    assert kept == ["snr-vgg-cifar10-b4096-full-20-epochs.json", "snr-vgg-cifar10-b4096-full.json"]
    rows = records.read_all(tmp_path)
    text = table.table_section("snr", rows)
    assert text.index(f"### `{VGG}`, full scale") < text.index(f"### `{VGG}`, full, 20 epochs")
    assert claims_section("snr", rows).startswith("| claim |  | full scale | full, 20 epochs |")


def test_runs_of_a_method_whose_settings_have_changed_are_not_mixed_in(tmp_path: Path) -> None:
    records.record(tmp_path, made_row(MLP, {"none": {}, "ours": {}}, range(1)))
    row = made_row(MLP, {"ours": {}}, [1])
    changed = {**row.runs[0].about, "method": {**row.runs[0].about["method"], "gain": 3.0}}
    with pytest.raises(ValueError, match="holds runs with other settings of ours: move it away"):
        records.record(tmp_path, replace(row, runs=(replace(row.runs[0], about=changed),)))
    assert len(records.read(records.record(tmp_path, row)).runs) == 3


def test_runs_of_another_device_or_precision_are_not_mixed_in(tmp_path: Path) -> None:
    def row(seed: int, **settings: Any) -> Row:
        found = result(f"{MLP}/none", seed) | {"settings": settings}
        return row_of([find(f"{MLP}/none").scaled(TINY)], [compact(found)])

    records.record(tmp_path, row(0, device="cuda:0", bf16=True))
    for other, told in (
        (row(1, device="cpu", bf16=True), "device 'cuda' instead of 'cpu'"),
        (row(1, device="cuda", bf16=False), "precision 'bfloat16' instead of 'float32'"),
    ):
        with pytest.raises(ValueError, match=f"holds runs with {told}: move it away"):
            records.record(tmp_path, other)
    path = records.record(tmp_path, row(1, device="cuda:1", bf16=True))
    assert len(records.read(path).runs) == 2
    with pytest.raises(ValueError, match="one device and precision, got cpu float32; cuda float32"):
        row_of([find(f"{MLP}/none")], [*row(0, device="cpu").runs, *row(1, device="cuda").runs])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"runs": [{}]}', '{"runs": []}'])
def test_a_file_of_something_else_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json must hold a row's results"):
        records.read_all(tmp_path)


def test_layers_are_kept_at_41_epochs_at_most_the_first_and_last_among_them() -> None:
    assert thinned(5) == [0, 1, 2, 3, 4] and thinned(41) == list(range(41))
    for count in (42, 61, 201, 1001):
        kept = thinned(count)
        assert len(set(kept)) == 41 and kept[0] == 0 and kept[-1] == count - 1 and kept == sorted(kept)
    long = compact(result(f"{MLP}/none", 0, replace(TINY, epochs=200)))
    assert long.layer_epochs == list(range(0, 201, 5))
    assert len(long.layers["head.weight"]["sigma"]) == 41 and len(long.epochs["sigma_mean"]) == 201


def test_a_row_of_200_epochs_is_a_small_file(tmp_path: Path) -> None:
    row = made_row(MLP, {"none": {}, "spectral": {}}, range(3), scale=replace(TINY, epochs=200))
    assert records.record(tmp_path, row).stat().st_size < 16_000 * len(row.runs)


def test_numbers_are_rounded_to_four_digits_and_lists_stand_on_one_line(tmp_path: Path) -> None:
    text = records.record(tmp_path, made_row(VGG, {"snr": {"test": 1 / 3}}, range(1))).read_text()
    assert '"epoch": [0, 1, 2, 3, 4]' in text and "0.33333" not in text


def test_protocol_leaves_out_only_what_methods_differ_in() -> None:
    for scale in SCALES.values():
        one, other = (results.protocol_of(find(f"{MLP}/{name}").scaled(scale)) for name in ("none", "ours"))
        assert one == other and "epochs" in one
