"""The pass kernel compiled for every target: no spills, registers, load widths."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import triton.language as tl

from specopt.kernels.passes import device as passes
from specopt.kernels.passes import tiling
from specopt.kernels.solves import kinds as solving

from . import compiled
from .pass_bucket import (
    ADAMW,
    CORRECT,
    LEFT,
    NONE,
    NOTHING,
    RIGHT,
    SGD,
    TURNING,
)

TURN, RITZ, BASIS = solving.TURN.value, solving.RITZ.value, solving.BASIS.value
OFF = {"found_inf": None, "grad_scale": None}


def pass_variants() -> Iterator[tuple[str, compiled.Variant]]:
    """What a launch of the pass kernel may be, by name: update, side, KP, dtype, then options."""
    kinds = {
        "none turning": (NONE, TURNING, {"CONDITIONAL": True}),
        "sgd turning": (SGD, TURNING, {}),
        "sgd left": (SGD, LEFT, {}),
        "adamw left": (ADAMW, LEFT, {}),
        "adamw turning": (ADAMW, TURNING, {}),
        "correct right": (CORRECT, RIGHT, {}),
    }
    for kp, (name, dtype), (kind, constants) in itertools.product((16, 32, 64), compiled.DTYPES.items(), kinds.items()):
        yield f"{kind} {kp} {name}", pass_variant(kp, dtype, *constants)
    solves = {"turn": (TURNING, TURN), "ritz": (LEFT, RITZ), "basis": (RIGHT, BASIS)}
    for kp, kx, (solve, (side, then)) in itertools.product((16, 32, 64), (0, 16), solves.items()):
        constants = {"CONDITIONAL": True, "THEN": then, "KX": kx}  # of a pair that is made where it is called for
        yield f"none then {solve} {kp} {kx}", pass_variant(kp, tl.float32, NONE, side, constants)
    for kp in (16, 32, 64):
        scaled = {"found_inf": 0, "grad_scale": 0}  # both pointers are given
        yield f"sgd turning {kp} fp32 scaled", pass_variant(kp, tl.float32, SGD, TURNING, {}, scaled)
        for kind, update in (("sgd", SGD), ("adamw", ADAMW), ("correct", CORRECT)):
            yield f"{kind} nothing {kp} fp32", pass_variant(kp, tl.float32, update, NOTHING, {})
        yield f"adamw left {kp} fp32 scaled", pass_variant(kp, tl.float32, ADAMW, LEFT, {}, scaled)
        yield f"adamw left {kp} fp32 amsgrad", pass_variant(kp, tl.float32, ADAMW, LEFT, {"AMSGRAD": True})
        for (name, dtype), (kind, (update, side, _)) in itertools.product(compiled.DTYPES.items(), kinds.items()):
            if name != "fp32" and update != NONE:
                constants = {"STOCHASTIC": True}
                yield f"{kind} {kp} {name} stochastic", pass_variant(kp, dtype, update, side, constants)


def pass_variant(kp, dtype, update, side, constants, pointers=None) -> compiled.Variant:
    tile = tiling.tile_of(kp, dtype.primitive_bitwidth // 8, update, side, "STOCHASTIC" in constants)
    given = pointers or {}
    return compiled.Variant(
        passes.pass_kernel,
        {
            **{name: value for name, value in OFF.items() if name not in given},
            **{"DTYPE": dtype, "UPDATE": update, "SIDE": side, "THEN": 0, "KP": kp, "KX": 0, "CONDITIONAL": False},
            **{"AMSGRAD": False, "STOCHASTIC": False, "STRIP": tiling.STRIP},
            **{"INNER": tile.inner, "LOOSE": tile.loose, "STAGES": tile.stages},
            **constants,
        },
        tile.warps,
        tiling.most_registers(kp, update, side, "STOCHASTIC" in constants, constants.get("THEN", 0)),
    )


CORE = [
    ("sm_90", kind)
    for kind in ("none turning", "sgd turning", "sgd left", "adamw left", "adamw turning", "correct right")
] + [
    ("gfx942", "sgd turning"),
    ("gfx942", "adamw left"),
]
COMPILED = [
    pytest.param(
        target,
        name,
        id=f"{target}-{name}",
        marks=() if (target, name.removesuffix(" 32 fp32")) in CORE else pytest.mark.full,
    )
    for target in compiled.TARGETS
    for name, _ in pass_variants()
]


@pytest.fixture(scope="session")
def pass_usage(request) -> compiled.Usage:
    return compiled.usage_of(request.session, test_passes_compile_without_spilling, "tests.kernels.test_pass_compile")


@pytest.mark.parametrize(("target", "name"), COMPILED)
def test_passes_compile_without_spilling(target, name, pass_usage):
    but = compiled.waiting(target, name) if " then " in name else 0
    usage = compiled.without_spilling(pass_usage, target, name, but)
    if target == "gfx942":
        assert usage["drained"] == usage["tickets"] >= (" then " in name), usage
    else:
        arrays = {"none": 1, "sgd": 3, "adamw": 4, "correct": 1}.get(name.split()[0], 1)
        ways = 1 if "nothing" in name else 2  # along rows and across
        assert usage["wide"] >= arrays * ways, usage
        if name.endswith(" 32 fp32"):
            assert usage["registers"] <= (128 if tiling.LEAST_INNER == 8 else 160), usage


if __name__ == "__main__":
    compiled.main(pass_variants())
