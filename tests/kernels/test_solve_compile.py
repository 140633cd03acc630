"""The solve kernel compiled for every target: no spills, and wide loads."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from specopt.kernels.solves import device as solves

from . import compiled


def variants(target: str = "sm_90") -> Iterator[tuple[str, compiled.Variant]]:
    """What a launch of the solve kernel may be, by name: kind, KP, KX, dtype. NVIDIA's also take ``maxnreg``."""
    hip = compiled.TARGETS[target].backend == "hip"
    warps = solves.warps(hip)
    for kind in ("ritz", "basis", "turn"):
        for kp in (16, 32, 64):
            for kx in (0, 16, 32, 64):
                for dtype in compiled.DTYPES if kx else ("fp32",):
                    constants = {
                        "KIND": getattr(solves, kind.upper()).value,
                        "KP": kp,
                        "KX": kx,
                        "DTYPE": compiled.DTYPES[dtype],
                    }
                    limit = None if hip else solves.most_registers(constants["KIND"], kp, kx)
                    variant = compiled.Variant(solves.solve_kernel, constants, warps, limit)
                    yield f"solve {kind} {kp} {kx} {dtype}", variant


CORE = {
    "sm_90": ["solve ritz 32 64 fp32", "solve basis 32 0 fp32", "solve turn 16 16 fp32"],
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
    usage = compiled.without_spilling(solve_usage, target, name)
    assert usage.get("wide", 1) > 0, usage


if __name__ == "__main__":
    compiled.main(variants(sys.argv[1]))
