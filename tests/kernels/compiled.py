"""Compiles the kernels for GPUs that need not be there. Run as a script, in a process without Triton's interpreter:

    python -m tests.kernels.compiled TARGET [NAME...]

prints one JSON object a line: what the kernel named so takes on the target.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from specopt.kernels.blocks import device as blocks
from specopt.kernels.products import device as products
from specopt.kernels.small import ROUNDS, SQUARINGS, SWEEPS, WHOLE
from specopt.kernels.small import device as small
from specopt.kernels.updates import device as updates

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SCALARS = {"shift": "fp32", "threshold": "fp32", **dict.fromkeys(["width", "rank", "flip", "round", "last"], "i32")}
SCALARS.update({f"{name}{t}": "i32" for name in ("height", "width") for t in range(3)})
# others: *fp32
POINTERS = {"table": "*i64", "spans": "*i64", "work": "*i32", "tickets": "*i32", "active": "*u8", "dropped": "*u8"}
DTYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
SHARED = {"cuda": 99 * 1024, "hip": 64 * 1024}
"""Bytes of shared memory that a program may take: on NVIDIA, as on sm_86, sm_89 and sm_120, which have least."""
LAYOUTS = {"rows": (1, True), "columns": (2, True), "unaligned rows": (1, False), "strided": (0, False)}


class Variant(NamedTuple):
    kernel: object
    constants: dict[str, object]
    warps: int
    registers: int | None = None
    """``maxnreg``, on NVIDIA."""


def tickets_in(text: str) -> dict[str, int]:
    """Of AMD's assembly: atomic additions, and those whose barriers stand right behind a wait for all stores."""
    order = re.findall(r"(global_atomic_add) |(s_barrier)|(s_waitcnt vmcnt\(0\))|(?:global|buffer|flat)_(store)", text)
    kinds = ["".join(found) for found in order]
    tickets = drained = 0
    for i, kind in enumerate(kinds):
        if kind == "global_atomic_add":
            before = kinds[:i]
            while before[-1] != "s_barrier":
                before.pop()
            while before[-1] == "s_barrier":
                before.pop()
            tickets, drained = tickets + 1, drained + (before[-1] == "s_waitcnt vmcnt(0)")
    return {"tickets": tickets, "drained": drained}


Usage = dict[tuple[str, str], dict[str, Any]]
"""Of a target and a name: what :func:`measure` tells, or the error."""


def variants() -> Iterator[tuple[str, Variant]]:
    """What the package launches, by name."""
    for k in (16, 32, 64):
        tile = products.TILES[k]
        yield f"sum_chunks {k}", Variant(products.sum_chunks_kernel, {"K": k, "ROWS": tile.rows}, tile.warps)
        gram, mix = blocks.GRAM_TILES[k], blocks.MIX_TILES[k]
        yield f"gram_partials {k}", Variant(blocks.gram_partials_kernel, {"K": k, "ROWS": gram.rows}, gram.warps)
        yield f"gram_sums {k}", Variant(blocks.gram_sums_kernel, {"K": k}, gram.warps)
        dot = blocks.DOT_TILES[k]
        yield f"column_dots {k}", Variant(blocks.column_dot_kernel, {"K": k, "ROWS": dot.rows}, dot.warps)
        for wide in ((k, 0, 0), (k, k, 16), (64, 64, 64)):
            constants = {"K": k, "ROWS": mix.rows, **{f"WIDE{t}": w for t, w in enumerate(wide)}}
            yield f"mix {k} of {wide}", Variant(blocks.mix_kernel, constants, mix.warps)
        constants = {"TINY": small.TINY, "K": k}
        yield f"orthonormalizer {k}", Variant(small.orthonormalizer_kernel, constants, small.WARPS[k])
        for fresh, rounds in dict.fromkeys(small.STAGES[k]):
            constants = {**constants, "FRESH": fresh, "ROUNDS": rounds, "SQUARINGS": SQUARINGS}
            constants["SMALLEST"] = torch.finfo(torch.float32).tiny
            assert rounds <= ROUNDS
            yield f"rotation {k} {fresh}", Variant(small.rotation_kernel, constants, small.WARPS[k])
        if k <= WHOLE:
            constants = {"SWEEPS": SWEEPS, "K": k, "EPS": torch.finfo(torch.float32).eps}
            constants["TINY"] = torch.finfo(torch.float32).tiny
            yield f"jacobi {k}", Variant(small.jacobi_kernel, constants, small.WARPS[k])
        for name, matrix in _layouts():
            constants = {**matrix, "K": k, "ROWS": tile.rows, "COLUMNS": tile.columns}
            for even in (False, True):
                label = f"product {k} {name}{' even' if even else ''}"
                yield label, Variant(products.product_kernel, {**constants, "EVEN": even}, tile.warps)
    yield "residual", Variant(blocks.residual_kernel, {"ROWS": blocks.RESIDUAL_TILE.rows}, blocks.RESIDUAL_TILE.warps)
    yield "norm_sums", Variant(updates.norm_sums_kernel, {}, 4)
    for name, matrix in _layouts():
        tile = updates.TILE
        constants = {**matrix, "ROWS": tile.rows, "COLUMNS": tile.columns}
        yield f"rank_update 1 {name}", Variant(updates.rank_update_kernel, {**constants, "RANK": 1}, tile.warps)
        yield f"scale {name}", Variant(updates.scale_kernel, constants, tile.warps)
        yield f"norm_partials {name}", Variant(updates.norm_partials_kernel, constants, tile.warps)
        tile = updates.DOT_TILE
        for rank in (16, 32, 64):
            constants = {**matrix, "ROWS": tile.rows, "COLUMNS": tile.columns, "RANK": rank}
            yield f"rank_update {rank} {name}", Variant(updates.rank_update_kernel, constants, tile.warps)


def _layouts() -> Iterator[tuple[str, dict[str, object]]]:
    for dtype, kind in DTYPES.items():
        for layout, (unit, aligned) in LAYOUTS.items():
            yield f"{dtype} {layout}", {"DTYPE": kind, "UNIT": unit, "ALIGNED": aligned}


def measure(variant: Variant, target: GPUTarget) -> dict[str, int]:
    """Registers, bytes spilled to memory, bytes of shared memory, on NVIDIA accesses of 16 bytes, and on AMD tickets
    and how many of them are taken behind a barrier to which every wave comes with its stores made."""
    names = variant.kernel.arg_names
    if "HIP" in names:
        variant.constants["HIP"] = target.backend == "hip"
    signature = {n: "constexpr" if n in variant.constants else SCALARS.get(n, POINTERS.get(n, "*fp32")) for n in names}
    if "WIDE1" in variant.constants:  # a term that is absent is passed as None
        absent = [f"small{t}" for t in range(3) if variant.constants[f"WIDE{t}"] == 0]
        signature.update(dict.fromkeys(absent, "constexpr"))
        variant.constants.update(dict.fromkeys(absent))
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    limits = {"maxnreg": variant.registers} if variant.registers and target.backend != "hip" else {}
    compiled = triton.compile(
        ASTSource(variant.kernel, signature, constants, aligned),
        target=target,
        options={"num_warps": variant.warps, "enable_fp_fusion": True, **limits},
    )
    shared = compiled.metadata.shared
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.{w}:\s+(\d+)", text)[1]) for w in ("vgpr_count", "vgpr_spill_count"))
        return {"registers": registers, "spilled": spilled, "shared": shared, **tickets_in(text)}
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK", "LOCAL"))
    wide = re.findall(r"ld\.global\S*\.v4|cp\.async\S* \[[^;]*\], 0x10,", compiled.asm["ptx"])
    return {"registers": registers, "spilled": stack + local, "shared": shared, "wide": len(wide)}


def usage_of(session: pytest.Session, test: Callable[..., None], module: str) -> Usage:
    """What the kernels take that a parametrized test asks for in this session. ``module`` is run as a script in one
    process a target, for importing Triton and starting it take longer than a small kernel."""
    wanted: dict[str, list[str]] = {}
    for item in session.items:
        if getattr(item, "originalname", "") == test.__name__ and item.module.__name__ == test.__module__:
            wanted.setdefault(item.callspec.params["target"], []).append(item.callspec.params["name"])
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    found: Usage = {}
    for target, names in wanted.items():
        command = [sys.executable, "-m", module, target, *names]
        run = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
        for line in run.stdout.splitlines():
            usage = json.loads(line)
            found[target, usage.pop("name")] = usage
        for name in names:
            found.setdefault((target, name), {"error": run.stderr[-2000:]})
    return found


def without_spilling(usage: Usage, target: str, name: str, but: int = 0) -> dict[str, Any]:
    """What one kernel takes, which has to compile, to keep in registers what it holds, but for so many bytes, and to
    find room in the shared memory of every GPU of the kind."""
    found = usage[target, name]
    assert "error" not in found, found["error"]
    assert found["spilled"] <= but, found
    assert found["shared"] <= SHARED[TARGETS[target].backend], found
    return found


def waiting(target: str, name: str) -> int:
    """Bytes (of AMD registers) that a kernel may spill which goes through all stages of a solve where a pair is called
    for: numbers that wait from one stage for a later one. At 64 columns also some of the rotations', one instruction in
    75; and behind a pass on AMD, which has half as many registers for its threads."""
    if target == "gfx942" and " then " in name:
        return 400
    if "64" in name.split():
        return 320
    return 96 if " then " in name else 32


def main(known: Iterable[tuple[str, Variant]]) -> None:
    target, *names = sys.argv[1:]
    chosen = dict(known)
    for name in names or chosen:
        print(json.dumps({"name": name, **measure(chosen[name], TARGETS[target])}), flush=True)


if __name__ == "__main__":
    main(variants())
