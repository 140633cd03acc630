"""What steps of the optimizers move, beside what they may."""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import traffic
from benchmarks.traffic import budget, count_step

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counts in Triton's interpreter")


def test_budget() -> None:
    m, n, k = 4000, 2000, 16
    small = 5 * 4 * k * (m + n)
    assert budget([(m, n)], k, "SNRSGD") == (20 * m * n, small)
    assert budget([(m, n)] * 2, k, "NormScaleAdamW") == (2 * 36 * m * n, 2 * small)
    assert budget([(m, n)], k, "NormScaleAdamW", conditional=True).total == 44 * m * n + small
    assert budget([(10, 4)], k, "SNRSGD").small == 5 * 4 * 4 * 14


def test_workloads() -> None:
    def parameters(workload: str, scale: float = 1.0) -> int:
        return sum(math.prod(shape) for shape in traffic.shapes(workload, scale))

    assert traffic.shapes("mlp") == [(2000, 3072), (2000, 2000), (2000, 2000), (2000, 2000), (100, 2000)]
    assert len(traffic.shapes("resnet50")) == 54
    assert parameters("resnet50") == 25_557_032 - 53_120 - 1000  # all, less batch norms and the last bias
    assert traffic.shapes("resnet50", 0.25)[0] == (32, 3, 7, 7)
    assert parameters("gpt2") == 12 * 1600**2
    for workload in traffic.WORKLOADS:
        assert parameters(workload, 0.1) == pytest.approx(0.1 * parameters(workload), rel=0.06)


@pytest.mark.parametrize("optimizer", sorted(traffic.BYTES))
def test_a_warm_step(optimizer: str) -> None:
    count = count_step("gpt2", optimizer, scale=0.0016, warm=0)
    found = count.traffic
    assert count.parameters == 12 * 64**2
    assert found.memory >= count.parameters * traffic.BYTES[optimizer] / 2
    assert found.accesses >= count.parameters * traffic.BYTES[optimizer]
    lines = found.table().splitlines()
    assert len(lines) <= len(found.rows) + 2
    assert lines[-1].split()[:2] == ["all", str(len(found.rows))]


MOST = {"SNRSGD": 4, "NormScaleAdamW": 6}
"""Launches of a warm step, its conditional pair counted."""


@pytest.mark.parametrize(
    ("workload", "optimizer", "scale"),
    [
        ("mlp", "SNRSGD", 0.1),
        ("mlp", "NormScaleAdamW", 0.1),
        *[pytest.param("mlp", optimizer, 1.0, marks=pytest.mark.full) for optimizer in MOST],
        *[pytest.param(w, optimizer, 0.25, marks=pytest.mark.full) for w in ("resnet50", "gpt2") for optimizer in MOST],
    ],
)
def test_a_warm_step_moves_what_it_may(workload: str, optimizer: str, scale: float) -> None:
    count = count_step(workload, optimizer, scale=scale)
    assert len(count.traffic.launches) == MOST[optimizer], count.traffic.launches
    assert count.traffic.memory <= (1.02 if scale == 1 else 1.03) * count.goal.total
    assert count.traffic.accesses <= 1.15 * count.goal.total


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    traffic.add_parser(parser.add_subparsers())
    chosen = ["--workload", "gpt2", "--optimizer", "SNRSGD", "--scale", "0.0016"]
    arguments = parser.parse_args(["traffic", *chosen, "--conditional", "--rows", "--out", str(tmp_path)])
    report: dict[str, Any] = arguments.main(arguments)
    assert json.loads((tmp_path / "traffic.json").read_text()) == json.loads(json.dumps(report))
    (row,), (step,) = report["results"], report["steps"]
    assert step["goal"]["streams"] == 28 * step["parameters"] == 28 * 12 * 64**2
    assert sum(row["read"] + row["written"] for row in step["traffic"]["rows"]) == step["traffic"]["memory"]
    assert row["memory"] * row["parameters"] == pytest.approx(step["traffic"]["memory"])
    assert row.keys() == report["columns"].keys()
    printed = capsys.readouterr().out
    assert "memory / goal" in printed
