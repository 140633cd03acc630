"""Every kernel compiles for the GPUs the package is meant for, keeps in registers, and loads 16 bytes at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import compiled

NAMES = [name for name, _ in compiled.variants()]


def _is_core(target: str, name: str) -> bool:
    """What the default run compiles: the block sizes of the defaults, float32, on a newer GPU of each maker."""
    if any(dtype in name for dtype in ("bf16", "fp16")) or "unaligned" in name:
        return False
    number = name.split()[1] if " " in name else "16"
    return target in ("sm_90", "gfx942") if number in ("1", "16", "32") else target == "sm_90"


COMBINATIONS = [
    pytest.param(target, name, id=f"{target}-{name}", marks=() if _is_core(target, name) else pytest.mark.full)
    for target in compiled.TARGETS
    for name in NAMES
]


@pytest.fixture(scope="session")
def measured(request) -> dict[tuple[str, str], dict[str, int]]:
    """One process a target, for importing Triton and starting it take longer than a small kernel."""
    wanted: dict[str, list[str]] = {}
    for item in request.session.items:
        if getattr(item, "originalname", "") == test_it_compiles_without_spilling.__name__:
            wanted.setdefault(item.callspec.params["target"], []).append(item.callspec.params["name"])
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    results = {}
    for target, names in wanted.items():
        command = [sys.executable, compiled.__file__, target, *names]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        for line in run.stdout.splitlines():
            usage = json.loads(line)
            results[target, usage.pop("name")] = usage
        for name in names:
            results.setdefault((target, name), {"error": run.stderr[-2000:]})
    return results


@pytest.mark.parametrize(("target", "name"), COMBINATIONS)
def test_it_compiles_without_spilling(target, name, measured):
    usage = measured[target, name]
    assert "error" not in usage, usage["error"]
    assert usage["spilled"] == 0, usage
    promised = name.split(" ", 2)[-1] if name.startswith(("product", "rank_update")) else name
    if target != "gfx942" and any(f" {layout}" in f" {promised}" for layout in ("fp32 rows", "fp32 columns")):
        assert usage["wide"] > 0, usage
