"""How a pass is cut up into programs, and what each keeps on chip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.torch_version import TorchVersion

from .. import tables
from ..solves import device as solves
from ..solves.kinds import RITZ

NONE, SGD, ADAMW, CORRECT = (tl.constexpr(i) for i in range(4))
"""``UPDATE``: what happens to the weight."""
NOTHING, LEFT, RIGHT, TURNING = (tl.constexpr(i) for i in range(-1, 3))
"""``SIDE``: no product; ``W [V | Ω]``; ``Wᵀ [U | Ω]``; the one at turn by the matrix' count of steps."""

STRIP = 64
"""Output rows of a program. Every strip reads the operand again: 4 KP / 64 bytes a parameter."""
CHUNK, MOST_CHUNKS, GRAIN = 1024, 32, 64
"""Inner length of a program, about; how many partial sums at most; and what chunks are a multiple of."""

LEAST_INNER = 8 if TorchVersion(triton.__version__) >= "3.9" else 16
"""The shortest inner length of a float32 product that Triton takes. At 16 a program keeps more registers, and one runs
on a multiprocessor where two did."""


class Tile(NamedTuple):
    inner: int
    loose: int
    """Inner length of a tile of a matrix that is not aligned, each entry of which has an address of its own."""
    warps: int
    stages: int
    """Tiles of an aligned matrix that are on their way at once."""


TILES = {
    (16, 4): Tile(32, 8, 8, 3),
    (16, 2): Tile(32, 8, 8, 3),
    (32, 4): Tile(32, 8, 8, 2),
    (32, 2): Tile(32, 8, 8, 2),
    (64, 4): Tile(16, 8, 8, 2),
    (64, 2): Tile(32, 16, 8, 1),
}
"""For each KP and size of an entry, the same for every update: so the product of the same weights has the same bits."""


def tile_of(kp: int, size: int, update: int, side: int, stochastic: bool) -> Tile:
    """What a launch runs with. The number of stages changes no sum; these spill nowhere."""
    tile = TILES[32 if side == NOTHING.value else kp, size]
    tile = tile._replace(loose=max(tile.loose, LEAST_INNER))
    if update == ADAMW.value and side == TURNING.value:  # the most that is held in registers
        tile = tile._replace(stages=1)
    if stochastic:
        tile = tile._replace(stages=1 if kp != 32 else 2 if update == CORRECT.value else 3)
    return tile


def most_registers(kp: int, update: int, side: int, stochastic: bool, then: int) -> int | None:
    """Left to itself the assembler keeps these to 128 and spills; allowed more, the first needs 126. A solve behind the
    pass needs what it needs alone."""
    if then:
        return solves.most_registers(then, kp, 0, 0) if then == RITZ.value else None
    widest = kp == 64 and update == ADAMW.value
    by_chance = kp == 16 and update == SGD.value and stochastic
    return 168 if side == TURNING.value and (widest or by_chance) else None


def chunks(length: int) -> tuple[int, int]:
    """Size and number of the pieces that an inner length is cut into: LEFT_CHUNK and LEFT_CHUNKS of n columns,
    RIGHT_CHUNK and RIGHT_CHUNKS of m rows. Nearly equal, for the programs of a launch end together."""
    count = min(max(-(-length // CHUNK), 1), MOST_CHUNKS)
    size = max(-(-length // (count * GRAIN)), 1) * GRAIN
    return size, max(-(-length // size), 1)


def programs(rows: int, columns: int, side: int) -> int:
    """How many programs of a launch on ``side`` belong to a matrix, by its shape as the tracker reads it."""
    on_left = max(-(-rows // STRIP), 1) * chunks(columns)[1]
    on_right = max(-(-columns // STRIP), 1) * chunks(rows)[1]
    if side == TURNING.value:
        return max(on_left, on_right)
    return on_right if side == RIGHT.value else on_left


def work_list(shapes: Sequence[tuple[int, int]], side: int, device: torch.device) -> Tensor:
    """(matrix, index) of every program, int32 (P, 2); shapes as the tracker reads them."""
    counts = [programs(rows, columns, side) for rows, columns in shapes]

    def build() -> Tensor:
        matrix = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        first = np.repeat(np.cumsum([0, *counts[:-1]]), counts)
        return tables.upload(np.stack([matrix, np.arange(len(matrix)) - first], 1), torch.int32, device)

    return tables.remembered(("passes", tuple(counts)), device, build)
