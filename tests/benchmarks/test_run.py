"""The benchmarks run on a CPU at tiny sizes. Their figures mean nothing here; what is not measured is said to be so."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import kernel_bandwidth, models, peers, probe, reporting, run, sigma, step, timing, workloads
from tests.examples import formats

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "FLUSHED", 1 << 16)


class GpuLike(timing.Stopwatch):
    """Takes the ways of a GPU on the CPU, once each."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.gpu = True

    def wait(self) -> None:
        pass

    def on_device(self, work: timing.Work) -> float:
        return self.wall(work)

    def launches(self, work: timing.Work) -> int:
        work()
        return 5


def once(measure: Any, work: timing.Work, **options: int) -> timing.Summary:
    return timing.Summary(measure(work), 0.0)


# --- step ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stepped(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("step")
    words = ["step", "--width", "72", "--rounds", "2", "--slow-rounds", "1", "--threads", "1", "--device", "cpu"]
    run.main([*words, "--out", str(folder)])
    return json.loads((folder / "step_mlp_cpu.json").read_text()), folder


def by_name(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report["results"]}


def test_step_has_a_row_for_every_optimizer_and_a_plot(stepped: tuple[dict[str, Any], Path]) -> None:
    report, folder = stepped
    assert list(by_name(report)) == [peer.name for peer in peers.PEERS]
    assert (folder / "step_mlp_cpu.png").read_bytes().startswith(b"\x89PNG")
    assert {"python", "torch", "triton", "numpy", "device", "date", "command", "settings"} <= set(report)
    assert "--out" not in report["command"]


def test_step_compares_within_a_family_and_says_what_was_expected(stepped: tuple[dict[str, Any], Path]) -> None:
    rows = by_name(stepped[0])
    for peer in peers.PEERS:
        row = rows[peer.name]
        assert row["base"] == f"{peer.family} for-loop"
        if row.get("note") == "not installed":
            continue
        for key in ("step", "train"):
            assert row[f"{key}_ratio"] == pytest.approx(row[f"{key}_ms"] / rows[row["base"]][f"{key}_ms"])
    ours = rows["NormScaleAdamW spectral"]
    assert ours["step_difference"] == pytest.approx(ours["step_ratio"] - ours["step_expected"])
    assert ours["pairs"] >= 0.5
    assert "pairs" not in rows["AdamW for-loop"]


def test_step_without_a_gpu_measures_neither_host_time_nor_launches(stepped: tuple[dict[str, Any], Path]) -> None:
    report = stepped[0]
    assert any("not measured (no GPU)" in note for note in report["notes"])
    assert not any({"host_ms", "launches"} & set(row) for row in report["results"])


def test_step_on_a_gpu_has_host_time_launches_and_goals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "Stopwatch", GpuLike)
    load = models.Workload("tiny", lambda: models.mlp(72, 2, 80, 70), (4, 80), 70)
    report = step.measure("mlp", load, CPU, rounds=1, slow_rounds=0, peers=step.chosen("SNRSGD", True, 0))
    row = by_name(report)["SNRSGD"]
    assert row["base"] == "SGD fused"
    assert row["launches"] == 5
    assert row["train_goal"] == 1.03
    assert row["step_goal"] > 1
    for key in ("step", "train", "host"):
        assert row[f"{key}_ratio"] > 0
    assert {"host_ms", "launches", "launches_goal", "step_goal"} <= set(report["columns"])


def test_a_package_that_is_not_installed_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "version", lambda name: "not installed")
    chosen = step.chosen("Scion", False, 1)
    load = models.Workload("tiny", lambda: models.mlp(8, 2, 6, 3), (4, 6), 3)
    report = step.measure("mlp", load, CPU, rounds=1, slow_rounds=1, peers=chosen)
    row = by_name(report)["Scion (pytorch_optimizer)"]
    assert row["note"] == "not installed"
    assert row["step_ms"] is None
    assert "not measured" in reporting.text(report)


def test_weights_only_leaves_out_what_works_in_the_loss() -> None:
    load = models.Workload("tiny", lambda: models.mlp(8, 2, 6, 3), None)
    report = step.measure("resnet50", load, CPU, rounds=1, slow_rounds=1, peers=step.chosen("SGD", False, 0))
    rows = by_name(report)
    assert rows["SGD + torch spectral_norm on layers"]["step_ms"] is None
    assert rows["SNRSGD"]["step_ratio"] > 0
    assert "train_ms" not in report["columns"]


def test_the_data_of_the_workloads_is_what_was_written_scaled(tmp_path: Path) -> None:
    formats.write_mnist(tmp_path / "MNIST" / "raw")
    formats.write_cifar10(tmp_path / "cifar-10-batches-bin")
    rows, labels = workloads.mnist(tmp_path)
    assert torch.equal(rows, torch.from_numpy(formats.noise(40, 784, seed=40)).float() / 255)
    assert labels.tolist() == formats.marks(40, 10).tolist()
    images, labels = workloads.cifar10(tmp_path)
    assert images.shape == (60, 3, 32, 32)
    torch.testing.assert_close(images[12:24], torch.from_numpy(formats.noise(12, 3, 32, 32, seed=1)) / 255 - 0.5)
    assert labels.tolist() == 5 * formats.marks(12, 10).tolist()
    pixels, labels = workloads.digits()
    assert (pixels.shape, pixels.dtype, pixels.min(), pixels.max()) == ((1797, 64), torch.float32, 0, 1)
    assert len(labels) == 1797


def test_workloads_have_the_parameters_of_their_networks() -> None:
    with torch.device("meta"):
        assert len(list(models.resnet50().parameters())) == 161
    counts = {}
    for name in models.WORKLOADS:
        matrices, counts[name] = models.shapes(models.workload(name).build)
        assert len(matrices) == {"mlp": 5, "mlp7x4000": 7, "resnet50": 54, "gpt2-xl": 192}[name]
    assert counts == {"mlp": 18_352_100, "mlp7x4000": 92_712_100, "resnet50": 25_557_032, "gpt2-xl": 1_557_611_200}


def test_resnet50_runs() -> None:
    assert models.resnet50()(torch.zeros(2, 3, 32, 32)).shape == (2, 1000)


def test_expected_ratios_are_those_of_the_bytes() -> None:
    found = {peer.ours: peer for peer in peers.PEERS if peer.ours}
    square = [(4000, 4000)]
    assert step.expected_ratio(found["snr"], square, 16_000_000, small=False) == 1
    assert step.expected_ratio(found["spectral"], square, 16_000_000, small=False) == pytest.approx(36 / 28)
    assert 36 / 28 < step.expected_ratio(found["spectral"], square, 16_000_000) < 1.31
    assert step.expected_ratio(found["spectral"], square, 32_000_000, small=False) == pytest.approx(32 / 28)


def test_goals_are_those_of_the_size() -> None:
    spectral = next(peer for peer in peers.PEERS if peer.ours == "spectral")
    assert step.goals(spectral, "mlp", 18_352_100, False, 1.29, 1.0) == {"train_goal": 1.12}
    assert step.goals(spectral, "gpt2-xl", 10**9, True, 1.29, 1.0) == {"step_goal": 1.35, "launches_goal": 6}
    small = step.goals(spectral, "resnet50", 25_557_032, True, 1.29, 100e-6)
    assert small["step_goal"] == pytest.approx(1.59)
    assert step.goals(peers.PEERS[0], "mlp", 18_352_100, False, 1.0, 1.0) == {}


# --- peers: they do what they are said to --------------------------------------------------------------------------


def layer() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8))


def test_svd_penalty_has_the_gradient_of_half_lambda_sigma_squared() -> None:
    model = layer()
    training = peers.svd_penalty(model)
    assert training.penalty is not None
    training.penalty().backward()
    u, s, vh = torch.linalg.svd(model[0].weight.detach())
    torch.testing.assert_close(model[0].weight.grad, peers.LAMBDA * s[0] * torch.outer(u[:, 0], vh[0]))


@pytest.mark.parametrize("build", [peers.published_snr, peers.power_penalty])
def test_power_iterations_come_to_the_same_penalty(build: Any) -> None:
    model = layer()
    with torch.no_grad():
        model[0].weight += torch.outer(torch.randn(8), torch.randn(12))  # a clear gap
    training = build(model)
    for _ in range(30):
        model[0].weight.grad = torch.zeros(8, 12)
        if training.before:
            training.before()
    if training.penalty:
        training.penalty().backward()
    u, s, vh = torch.linalg.svd(model[0].weight.detach())
    exact = peers.LAMBDA * s[0] * torch.outer(u[:, 0], vh[0])
    torch.testing.assert_close(model[0].weight.grad, exact, rtol=1e-3, atol=1e-5)


def test_published_norm_scaling_sets_the_first_singular_value() -> None:
    model = layer()
    before = torch.linalg.svdvals(model[0].weight)
    training = peers.published_norm_scaling(model)
    assert training.after is not None
    training.after()
    after = torch.linalg.svdvals(model[0].weight)
    expected = torch.cat([before[1:], torch.tensor([(8 / 12) ** 0.5])]).sort(descending=True).values
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-4)


# --- the others ----------------------------------------------------------------------------------------------------


def test_kernels_without_a_gpu_are_not_measured_and_the_reference_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_bandwidth, "COPIED", 1 << 16)
    report = kernel_bandwidth.measure(CPU, {"40 x 70": [(40, 70)]}, 8)
    rows = report["results"]
    reference = [row for row in rows if row["note"] == "torch reference"]
    assert {row["name"] for row in reference} >= {"product W V", "Frobenius norms", "scaling"}
    assert all(row["of_copy"] > 0 for row in reference)
    rest = [row for row in rows if row not in reference]
    assert len(rest) == len(kernel_bandwidth.PASSES) + len(kernel_bandwidth.SOLVES) + 2
    assert all(row["measured_us"] is None and row["note"] == "not measured: no GPU" for row in rest)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU the benchmark itself runs")
def test_kernels_on_a_gpu_stand_beside_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECOPT_BACKEND", "triton")
    lists = {"66 x 70": [(66, 70)]}
    for module in (kernel_bandwidth, probe):
        monkeypatch.setattr(module, "Stopwatch", GpuLike)
        monkeypatch.setattr(module, "repeated", once)
    monkeypatch.setattr(kernel_bandwidth, "COPIED", 1 << 16)
    bandwidths = kernel_bandwidth.measure(CPU, lists, 8)["results"]
    probed = probe.probe(CPU, lists, [8], False)["results"]
    for rows in (bandwidths, probed):
        assert {row["name"] for row in rows} >= {name for name, *_ in kernel_bandwidth.PASSES}
        assert all(row["measured_us"] > 0 for row in rows)
        streams = [row for row in rows if "bytes_mb" in row]
        assert streams
        assert all(math.isclose(r["measured_us"] - r["expected_us"], r["difference_us"]) for r in streams)


def test_sigma_runs_at_several_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    build = partial(workloads.mlp, workloads.digits(), width=72)
    tiny = {
        "norm scaling": partial(sigma._built, sigma.norm_scaling, build, steps=22),
        "SNR": partial(sigma._built, sigma.snr, build, steps=22, lr=0.05),
    }
    monkeypatch.setattr(sigma, "runs", lambda folder, steps: tiny)
    run.main(["sigma", "--block", "8", "16", "--passes", "0", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "sigma_settings.json").read_text())
    settings = [("norm scaling", 8), ("norm scaling", 16), ("SNR", 8), ("SNR", 16)]
    assert [(row["name"], row["block"]) for row in report["results"]] == settings
    assert {row["passes"] for row in report["results"]} == {"default"}
    assert all(row["cost"] > 0 and math.isfinite(row["median"]) for row in report["results"])
    assert not (tmp_path / "sigma.json").exists()


def test_traffic_begins_anew_under_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []

    def execute(program: str, words: list[str]) -> None:
        called.append(words)
        raise SystemExit

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(os, "execv", execute)
    with pytest.raises(SystemExit):
        run.main(["traffic", "--scale", "0.5"])
    assert called == [[sys.executable, "-m", "benchmarks.run", "traffic", "--scale", "0.5"]]


@pytest.mark.parametrize("words", [[], ["speed"]])
def test_run_refuses_what_it_does_not_know(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run.main(words)
    assert "step,traffic,kernels,sigma" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["step", "--rounds", "0"], "--rounds: must be 1 or more, got '0'"),
        (["step", "--width", "x"], "--width: must be 1 or more, got 'x'"),
        (["step", "--only", "nope"], "no optimizer's name contains 'nope'"),
        (["sigma", "--steps", "1"], "--steps: must be 2 or more, got '1'"),
        (["sigma", "--data-dir", "/nowhere"], "--data-dir /nowhere: no folder is there"),
        (["kernels", "--block", "65"], "--block: must be from 1 to 64, got '65'"),
        (["comm", "--only", "measured", "--width", "7"], "--width must be a multiple of 4"),
        (["caps", "--every", "0"], "--every: must be 1 or more, got '0'"),
        (["operators", "--repeats", "0"], "--repeats: must be 1 or more, got '0'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_numbers_that_make_no_sense_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    with pytest.raises(SystemExit) as ended:
        run.main(words)
    assert message in f"{ended.value} {capsys.readouterr().err}"


def test_probe_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch sees no GPU"):
        probe.main([])
    with pytest.raises(SystemExit, match="torch sees no GPU"):
        step.pick("cuda")
    arguments = argparse.Namespace(threads=1, device="cpu", workload="gpt2-xl", width=8)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    with pytest.raises(SystemExit, match="takes a GPU"):
        step.main(arguments)


def test_probe_makes_every_launch_in_a_dry_run(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.probe", "--dry-run", "--block", "8", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "probe_dry_run.json").read_text())
    rows = report["results"]
    names = {row["name"] for row in rows}
    assert names >= {name for name, *_ in kernel_bandwidth.PASSES}
    assert names >= {f"solve: {name}" for name, *_ in kernel_bandwidth.SOLVES}
    assert names >= {"empty launch", "torch.mm W V", "torch AdamW(fused=True)", "Frobenius norms"}
    assert all(row["measured_us"] is None for row in rows)


# --- reporting -----------------------------------------------------------------------------------------------------

REPORT: dict[str, Any] = {
    "benchmark": "step",
    "title": "Two",
    "device": "some CPU",
    "gpu": False,
    "torch": "2",
    "python": "3",
    "columns": {"name": "optimizer", "step_ms": "step (ms)", "ratio": "ratio"},
    "results": [{"name": "a", "step_ms": 1.0, "ratio": 1.0}, {"name": "b", "step_ms": None}],
}


def test_a_cell_is_a_figure_or_says_why_there_is_none() -> None:
    row = {"none": None, "whole": 12, "ratio": 1.1, "large": 1234.5, "small": 1.234e-5, "word": "x"}
    texts = {key: reporting.cell(row, key) for key in (*row, "absent")}
    assert texts == {
        "none": "not measured",
        "whole": "12",
        "ratio": "1.10",
        "large": "1234",
        "small": "1.23e-05",
        "word": "x",
        "absent": "-",
    }


def test_times_are_on_the_page_only_where_they_are_of_a_gpu() -> None:
    assert "| a | 1.00 |" in reporting.markdown(REPORT)
    assert "ms" not in reporting.markdown(REPORT)
    assert "| a | 1.00 | 1.00 |\n| b | not measured | - |" in reporting.markdown(REPORT | {"gpu": True})
    assert "step (ms)" in reporting.text(REPORT)


def test_page_is_refreshed_from_what_there_is(tmp_path: Path) -> None:
    page = "x\n<!-- table: one | make one -->\nold\n<!-- end -->\ny\n<!-- table: two | make two -->\n<!-- end -->\n"
    reporting.write(REPORT, "one", tmp_path)
    fresh = reporting.refreshed(page, tmp_path)
    assert "old" not in fresh
    assert "| b | - |" in fresh
    assert "Not measured; made by `make two`." in fresh
    assert reporting.refreshed(fresh, tmp_path) == fresh


def test_tables_of_the_pages_are_those_of_the_recorded_results() -> None:
    pages = [page.read_text() for page in reporting.PAGES]
    assert [reporting.refreshed(page) for page in pages] == pages
    named = {block["name"] for page in pages for block in reporting.BLOCK.finditer(page)}
    assert {path.stem for path in reporting.RESULTS.glob("*.json")} <= named


def test_what_was_recorded_has_no_folder_of_the_machine_in_it() -> None:
    for path in reporting.RESULTS.glob("*.json"):
        assert str(Path.home()) not in path.read_text()
        assert " /" not in json.loads(path.read_text()).get("command", "")


def test_caps_are_recorded_beside_exact_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.main(["caps", "--steps", "24", "--width", "80", "--rank", "1", "4", "full", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "caps.json").read_text())
    rows = {row["rank"]: row for row in report["results"]}
    assert set(rows) == {"1", "4", "full"}
    assert rows["full"]["worst"] <= 1 + 1e-5 < rows["4"]["worst"] < rows["1"]["worst"]
    assert all(abs(row["over_worst"]) <= 0.03 for row in rows.values())
    assert "rank" in capsys.readouterr().out
    assert (tmp_path / "caps.png").stat().st_size > 0


def test_the_cost_of_operators_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    run.main(["operators", "--batch", "2", "--warm-up", "1", "--repeats", "1"])
    printed = capsys.readouterr().out
    assert "cap, conv=operator" in printed and "AdamW                1.00" in printed
