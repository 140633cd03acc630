"""The solve kernel compiled for every target: next to no spills, and wide loads."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from specopt.kernels.solves import device as solves
from specopt.kernels.solves import kinds

from . import compiled


def variants(target: str = "sm_90") -> Iterator[tuple[str, compiled.Variant]]:
    """What a launch of the solve kernel may be, by name: kind, KP, KX, dtype, later stage. NVIDIA's also take
    ``maxnreg``."""
    hip = compiled.TARGETS[target].backend == "hip"
    warps = solves.warps(hip)
    for kind in ("ritz", "basis", "turn"):
        code = getattr(kinds, kind.upper()).value
        for kp in (16, 32, 64):
            for stage in range(1, solves.STAGES[code]):
                constants = {"KIND": code, "STAGE": stage, "KP": kp, "KX": 0, "DTYPE": compiled.DTYPES["fp32"]}
                limit = None if hip else solves.most_registers(code, kp, 0, stage)
                variant = compiled.Variant(solves.solve_kernel, constants, warps, limit)
                yield f"solve {kind} {kp} stage {stage}", variant
            for kx in (0, 16, 32, 64):
                for dtype in compiled.DTYPES if kx else ("fp32",):
                    constants = {
                        "KIND": code,
                        "STAGE": 0,
                        "KP": kp,
                        "KX": kx,
                        "DTYPE": compiled.DTYPES[dtype],
                    }
                    limit = None if hip else solves.most_registers(code, kp, kx, 0)
                    variant = compiled.Variant(solves.solve_kernel, constants, warps, limit)
                    yield f"solve {kind} {kp} {kx} {dtype}", variant


CORE = {
    "sm_90": [
        "solve ritz 32 16 fp32",
        "solve basis 32 0 fp32",
        "solve turn 32 16 fp32",
        "solve turn 32 stage 1",
    ],
    "gfx942": ["solve basis 16 0 fp32", "solve turn 16 0 fp32"],
}
MORE = pytest.mark.full
TOO_LARGE = {("gfx942", "turn 64")}
"""Some registers spill; nothing is wrong but the time it takes."""


def combinations() -> list[Any]:
    found = []
    for target in compiled.TARGETS:
        for name, _ in variants(target):
            if not any(target == where and name.startswith(f"solve {what}") for where, what in TOO_LARGE):
                marks = () if name in CORE.get(target, ()) else MORE
                found.append(pytest.param(target, name, marks=marks))
    return found


@pytest.fixture(scope="session")
def solve_usage(request) -> compiled.Usage:
    return compiled.usage_of(request.session, test_it_compiles_without_spilling, "tests.kernels.test_solve_compile")


@pytest.mark.parametrize(("target", "name"), combinations())
def test_it_compiles_without_spilling(target, name, solve_usage):
    whole = "turn" in name or "ritz" in name  # a next basis has one stage
    usage = compiled.without_spilling(solve_usage, target, name, compiled.waiting(target, name) if whole else 0)
    assert usage.get("wide", 1) > 0, usage
    if target == "gfx942":
        assert usage["drained"] == usage["tickets"] > 0, usage


if __name__ == "__main__":
    compiled.main(variants(sys.argv[1]))
