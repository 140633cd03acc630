"""The tracked sigma over real training, at the defaults, against float64 SVD.

Short runs on UCI digits here; the full-length runs on MNIST and CIFAR-10 are in ``benchmarks/results/sigma.json``,
made by ``python -m benchmarks.run sigma --data-dir DIR --out benchmarks/results``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import specopt
from benchmarks import sigma, workloads
from specopt.tracker import common
from specopt.tracker.common import COLD_STEPS, STATS, Stat

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")
RECORDED = Path(__file__).parents[2] / "benchmarks" / "results" / "sigma.json"
STEPS = 60


def assert_tracked(result: sigma.Result, most_pairs: float = 1.5) -> None:
    assert result.median <= 1e-3
    assert result.worst <= (3e-2 if "spikes" in result.name else 1e-2)
    assert result.recovered <= 1e-2
    assert result.flat_worst <= 1e-3
    assert result.mean_pairs <= most_pairs


@pytest.mark.parametrize("orthogonal", [False, True], ids=["default", "orthogonal"])
@pytest.mark.parametrize("warmup", [0, 30])
def test_norm_scaling_follows_sigma_of_an_mlp(orthogonal: bool, warmup: int) -> None:
    workload = workloads.mlp(workloads.digits(), width=256, orthogonal=orthogonal)
    assert_tracked(sigma.norm_scaling("MLP", workload, steps=STEPS, warmup=warmup))


def test_norm_scaling_follows_sigma_through_spikes_of_the_learning_rate() -> None:
    workload = workloads.mlp(workloads.digits(), width=256, orthogonal=True)
    assert_tracked(sigma.norm_scaling("spikes", workload, steps=90, spikes=True), most_pairs=2.0)


def test_norm_scaling_follows_sigma_over_the_steps_in_which_it_does_not_look() -> None:
    workload = workloads.mlp(workloads.digits(), width=256, orthogonal=True)
    assert_tracked(sigma.norm_scaling("every 4", workload, steps=140, period=4), most_pairs=2.0)


def test_norm_scaling_follows_sigma_of_a_gpt() -> None:
    assert_tracked(sigma.norm_scaling("GPT", workloads.gpt(width=128), steps=50), most_pairs=1.6)


def test_norm_scaling_follows_sigma_of_a_resnet() -> None:
    assert_tracked(sigma.norm_scaling("ResNet", workloads.resnet(workloads.digits()), steps=STEPS, warmup=30))


@pytest.mark.parametrize("orthogonal", [False, True], ids=["default", "orthogonal"])
@pytest.mark.parametrize("lr", [0.05, 0.1])
def test_snr_applies_the_exact_penalty_over_training(orthogonal: bool, lr: float) -> None:
    workload = workloads.mlp(workloads.digits(), width=256, orthogonal=orthogonal)
    assert_tracked(sigma.snr("SNR", workload, steps=STEPS, lr=lr))


def test_a_single_warm_vector_does_not_pass_these_bounds() -> None:
    workload = workloads.mlp(workloads.digits(), width=256, orthogonal=True)
    result = sigma.norm_scaling("one vector", workload, steps=40, block=1)
    assert result.worst > 3e-2


@pytest.mark.full
@pytest.mark.parametrize("name", sigma.runs(None, 0))
def test_full_length_on_digits(name: str) -> None:
    most = 2.0 if "spikes" in name else 1.6 if "GPT" in name else 1.5
    assert_tracked(sigma.runs(None, 400)[name](name), most)


def test_recorded_full_length_runs_meet_the_same_bounds() -> None:
    recorded = json.loads(RECORDED.read_text())
    results = [sigma.Result(**row) for row in recorded["results"]]
    assert recorded["steps"] == 400
    assert len(results) == len(sigma.runs(None, 0))
    assert any("MNIST" in r.name for r in results) and any("CIFAR-10" in r.name for r in results)
    for result in results:
        assert_tracked(result, 1.6 if "GPT" in result.name or "spikes" in result.name else 1.5)


@pytest.mark.parametrize("lost", [0.1, float("inf")], ids=["cpu", "schedule of a device"])
def test_weight_replaced_behind_the_optimizers_back_is_found_again_within_three_steps(
    lost: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "LOST", lost)
    workload = workloads.mlp(workloads.digits(), width=256)
    optimizer = specopt.NormScaleAdamW(workload.model.parameters(), lr=1e-3)
    weights = list(workload.matrices().values())
    errors = []
    for step in range(COLD_STEPS + 8):
        optimizer.zero_grad()
        workload.loss().backward()
        if step == COLD_STEPS + 4:
            generator = torch.Generator().manual_seed(1)
            for weight in weights:
                weight.data.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5)
        exact = [sigma.spectral_norm(sigma.before_correction(optimizer, w, 1e-3)) for w in weights]
        optimizer.step()
        found = [float(optimizer.state[w][STATS][Stat.SIGMA]) for w in weights]
        errors.append(max(abs(f / e - 1) for f, e in zip(found, exact, strict=True)))
    assert max(errors[COLD_STEPS + 4 + 3 :]) < 1e-2


def test_in_place_write_in_every_step_does_not_bring_the_cold_phase_back() -> None:
    workload = workloads.mlp(workloads.digits(), width=256)
    optimizer = specopt.NormScaleAdamW(workload.model.parameters(), lr=1e-3)
    weights = list(workload.matrices().values())
    most = 0.0
    for step in range(COLD_STEPS + 10):
        optimizer.zero_grad()
        workload.loss().backward()
        with torch.no_grad():
            for weight in weights:
                weight.clamp_(-0.2, 0.2).mul_(0.999)
        optimizer.step()
        if step >= COLD_STEPS:
            most = max(most, *(float(optimizer.state[w][STATS][Stat.PAIRS]) for w in weights))
    assert most <= 2


def test_max_passes_bounds_the_pairs_of_every_step() -> None:
    workload = workloads.mlp(workloads.digits(), width=70)
    optimizer = specopt.NormScaleAdamW(workload.model.parameters(), lr=1e-2, tolerance=1e-9, max_passes=3)
    for _ in range(4):
        optimizer.zero_grad()
        workload.loss().backward()
        optimizer.step()
        pairs = {float(optimizer.state[w][STATS][Stat.PAIRS]) for w in workload.matrices().values()}
        assert pairs <= {0.5, 3.0}
