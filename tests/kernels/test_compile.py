"""Every kernel compiles for the GPUs the package is meant for, keeps in registers, and loads 16 bytes at a time."""

from __future__ import annotations

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
def measured(request) -> compiled.Usage:
    return compiled.usage_of(request.session, test_it_compiles_without_spilling, "tests.kernels.compiled")


@pytest.mark.parametrize(("target", "name"), COMBINATIONS)
def test_it_compiles_without_spilling(target, name, measured):
    usage = compiled.without_spilling(measured, target, name)
    promised = name.split(" ", 2)[-1] if name.startswith(("product", "rank_update")) else name
    if target != "gfx942" and any(f" {layout}" in f" {promised}" for layout in ("fp32 rows", "fp32 columns")):
        assert usage["wide"] > 0, usage
