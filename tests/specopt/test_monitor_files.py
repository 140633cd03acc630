"""What SpectralMonitor writes and reads: CSV, TensorBoard, histories that were cut off and go on."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import specopt
from specopt.seeing import SpectralHistory, snapshot
from specopt.seeing.history import COLUMNS, EVERYTHING, QUANTITIES, Record
from tests.specopt.helpers import train
from tests.specopt.monitored import noted, small

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")


class Writer:
    """What SummaryWriter is asked for."""

    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars[tag, step] = value


def test_several_sinks_get_the_same_values(tmp_path: Path) -> None:
    params = small()
    optimizer = specopt.NormScaleAdamW([(f"layer{i}.weight", p) for i, p in enumerate(params)], lr=1e-3)
    rows, function = noted()
    writer, path = Writer(), tmp_path / "new" / "sigma.csv"
    with specopt.SpectralMonitor(optimizer, 2, [path, writer, function], weights=True, gradients=True) as monitor:
        train(optimizer, params, range(4))
        lines = path.read_text().splitlines()  # before it is closed: a run that is killed leaves them
        assert len(lines) == 1 + 3 * (3 + 1)
    history = SpectralHistory.from_csv(path)
    assert history.steps.tolist() == monitor.history.steps.tolist() == [step for step, _ in rows] == [1, 2, 4]
    assert history.names == monitor.history.names == ("layer0.weight", "layer1.weight", "layer2.weight")
    for name in QUANTITIES:
        np.testing.assert_array_equal(history[name], monitor.history[name])
    np.testing.assert_array_equal(history.gradient_norm, monitor.history.gradient_norm)
    for i, (step, found) in enumerate(rows):
        assert found[EVERYTHING] == {"gradient_norm": history.gradient_norm[i]}
        assert writer.scalars["gradient_norm", step] == history.gradient_norm[i]
        for j, name in enumerate(history.names):
            assert found[name]["sigma"] == writer.scalars[f"sigma/{name}", step] == history["sigma"][i, j]
    assert not any(math.isnan(value) for value in writer.scalars.values())


def test_tensorboard_reads_what_a_summary_writer_was_given(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    params = small()
    optimizer = specopt.NormScaleAdamW(params, lr=1e-3)
    writer = SummaryWriter(str(tmp_path))  # type: ignore[no-untyped-call]
    with specopt.SpectralMonitor(optimizer, every=2, to=writer) as monitor:
        train(optimizer, params, range(4))
    events = EventAccumulator(str(tmp_path)).Reload()
    scalars = events.Scalars("sigma/0.1")
    assert [event.step for event in scalars] == [1, 2, 4]
    assert [event.value for event in scalars] == pytest.approx(monitor.history["sigma"][:, 1].tolist(), rel=1e-6)
    writer.add_scalar("still", 1.0, 1)  # type: ignore[no-untyped-call]
    writer.close()  # type: ignore[no-untyped-call]


def test_file_that_cannot_be_written_is_refused_before_any_step(tmp_path: Path) -> None:
    optimizer = specopt.SNRSGD(small())
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        specopt.SpectralMonitor(optimizer, to=tmp_path / "file" / "sigma.csv")
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        specopt.SpectralMonitor(optimizer, to=str(tmp_path))
    other = tmp_path / "other.csv"
    other.write_text("step,loss\n1,2\n")
    with pytest.raises(
        ValueError, match=r"to must name a new file, or one that SpectralMonitor wrote, got '.*other.csv'"
    ):
        specopt.SpectralMonitor(optimizer, to=[tmp_path / "good.csv", other])
    assert other.read_text() == "step,loss\n1,2\n"
    assert not optimizer._optimizer_step_post_hooks


def test_full_disk_ends_a_file_with_a_warning_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = small()
    optimizer = specopt.SNRSGD(params, lr=0.01)
    rows, function = noted()
    monitor = specopt.SpectralMonitor(optimizer, 1, [tmp_path / "x.csv", function])

    def full(record: Record) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(monitor._sinks[0], "write", full)
    with pytest.warns(UserWarning, match=r"the monitor writes no more to .*x.csv: .*No space left"):
        train(optimizer, params, range(1))
    train(optimizer, params, range(1, 3))
    assert [step for step, _ in rows] == [1, 2, 3] == monitor.history.steps.tolist()
    monitor.close()


def record(step: int, sigma: dict[str, float]) -> Record:
    return Record(step, tuple(sigma), {"sigma": np.array(list(sigma.values()))})


def test_history_aligns_names_and_keeps_the_last() -> None:
    records = [record(1, {"a": 1.0}), record(2, {"b": 2.0, "a": 3.0}), record(3, {"b": 4.0})]
    history = SpectralHistory(records)
    assert history.names == ("a", "b")
    np.testing.assert_array_equal(history["sigma"], [[1, np.nan], [3, 2], [np.nan, 4]])
    assert np.isnan(history["residual"]).all() and history["residual"].shape == (3, 2)
    assert SpectralHistory(records, keep=2).steps.tolist() == [2, 3]
    assert len(SpectralHistory()) == 0 and SpectralHistory()["sigma"].shape == (0, 0)
    with pytest.raises(KeyError, match=r"quantity must be one of sigma, .* got 'norm'"):
        history["norm"]


def test_csv_that_was_cut_off_is_read_and_continued(tmp_path: Path) -> None:
    params = small()
    optimizer = specopt.SNRSGD(params, lr=0.01)
    path = tmp_path / "x.csv"
    with specopt.SpectralMonitor(optimizer, 1, path):
        train(optimizer, params, range(2))
    path.write_text(path.read_text().rstrip("\n").rsplit(",", 6)[0])
    assert SpectralHistory.from_csv(path).names == ("0.0", "0.1", "0.2")
    assert np.isnan(SpectralHistory.from_csv(path)["sigma"][1, 2])
    with specopt.SpectralMonitor(optimizer, 1, path):
        train(optimizer, params, range(2, 3))
    read = SpectralHistory.from_csv(path)
    assert read.steps.tolist() == [1, 2, 3] and np.isfinite(read["sigma"][2]).all()
    (tmp_path / "other.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"path must be of a file that SpectralMonitor wrote, got '.*other.csv'"):
        SpectralHistory.from_csv(tmp_path / "other.csv")


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_number_that_was_cut_off_is_no_number(tmp_path: Path, cut: int) -> None:
    params = small()
    optimizer = specopt.SNRSGD(params, lr=0.01)
    path = tmp_path / "x.csv"
    with specopt.SpectralMonitor(optimizer, 1, path, gradients=True):
        train(optimizer, params, range(2))
    whole = SpectralHistory.from_csv(path)
    path.write_text(path.read_text()[:-cut])
    read = SpectralHistory.from_csv(path)
    assert read.gradient_norm[0] == whole.gradient_norm[0] and np.isnan(read.gradient_norm[1])
    with specopt.SpectralMonitor(optimizer, 1, path, gradients=True):
        train(optimizer, params, range(2, 3))
    read = SpectralHistory.from_csv(path)
    assert np.isnan(read.gradient_norm[1]) and np.isfinite(read.gradient_norm[2])


def test_columns_of_the_file_name_every_quantity_once() -> None:
    assert len(set(COLUMNS)) == len(COLUMNS) == len(QUANTITIES) + 3
    assert set(snapshot.STORED) | {"target", "frobenius", "stable_rank"} == set(QUANTITIES)
