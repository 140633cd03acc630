"""A bucket: matrices of one dtype and device that share every launch, with their records and scratch on the device.

Tables are kept from step to step; a step compares addresses and numbers with those of the step before and uploads a
table only where something moved. Needs Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import records as r
from . import tables
from .passes import device as passes
from .passes import tiling
from .solves import algebra, kinds, rows
from .solves import device as solves
from .subspace import noise_buffer

NOTHING, LEFT, RIGHT, TURNING = (side.value for side in (tiling.NOTHING, tiling.LEFT, tiling.RIGHT, tiling.TURNING))
NONE, SGD, ADAMW, CORRECT = (update.value for update in (tiling.NONE, tiling.SGD, tiling.ADAMW, tiling.CORRECT))
RITZ, BASIS, TURN = (kind.value for kind in (kinds.RITZ, kinds.BASIS, kinds.TURN))

SCRATCH = 64
"""Entries that scratch blocks are set apart by: 256 bytes."""


@dataclass(frozen=True)
class Tracked:
    """What a record is made of. Blocks are float32 with unit column stride; those of an exact matrix are absent."""

    weight: Tensor
    """(m, n), any strides."""
    columns: int
    probes: int
    exact: bool
    stats: Tensor
    right: Tensor | None = None
    """The basis V (n, k)."""
    left: Tensor | None = None
    """The basis U (m, k) of a tracker by halves; a tracker by pairs keeps it in scratch."""
    right_probe: Tensor | None = None
    left_probe: Tensor | None = None


class Bucket:
    """Records, scratch and work lists of some matrices, and the launches over them."""

    def __init__(self, tracked: Sequence[Tracked]) -> None:
        first = tracked[0].weight
        self.device, self.dtype = first.device, first.dtype
        self.shapes = [(t.weight.shape[0], t.weight.shape[1]) for t in tracked]
        widths = [t.columns + t.probes for t in tracked if not t.exact]
        exact = [t.columns for t in tracked if t.exact]
        self.KP = tables.padded(max(widths, default=1))
        self.KX = tables.padded(max(exact)) if exact else 0
        width = max(self.KP, self.KX)
        self.scalars = self._zeros(len(tracked), r.SCALARS.value)
        self.scalars[:, r.FACTOR.value] = 1.0  # what a step that skips leaves: no change
        self.sigmas = self._zeros(len(tracked), width)
        self.squares = self._zeros(len(tracked), algebra.SLOTS.value, width, width)
        self.tickets = torch.zeros(len(tracked), dtype=torch.int32, device=self.device)
        longest = max((max(shape) for shape in self.shapes), default=1)
        self.noise = noise_buffer(longest, torch.float32, self.device)
        self.work = {side: tiling.work_list(self.shapes, side, self.device) for side in (NOTHING, LEFT, RIGHT, TURNING)}
        self.solving = solves.work_lists(self.shapes, [t.exact for t in tracked], self.KP, self.device)
        self._host = np.zeros((len(tracked), r.FIELDS.value), np.int64)
        self._numbers = np.full((len(tracked), r.NUMBERS.value), np.nan, np.float32)
        self._addresses: object = None
        self.amsgrad = False
        self.table: Tensor | None = None
        self.numbers: Tensor | None = None
        self._stream: Any = None
        self._blocks = self._fill(tracked)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=self.device)

    def _fill(self, tracked: Sequence[Tracked]) -> list[tuple[Tensor, Tensor]]:
        """Everything of the table but what a step brings; scratch cut out of one allocation."""
        sizes = []
        for t, (m, n) in zip(tracked, self.shapes, strict=True):
            left_chunks, right_chunks = tiling.chunks(n)[1], tiling.chunks(m)[1]
            counts = (0, 0, 0, 0) if t.exact else (left_chunks, right_chunks, 2, 2)
            partials = 0 if t.exact else rows.partial_rows((m, n), self.KP)
            lengths = (m * counts[0], n * counts[1], m * counts[2], n * counts[3], m, n, partials)
            sizes.append([-(-length * self.KP // SCRATCH) * SCRATCH for length in lengths])
        # of each matrix: partial sums left and right, two blocks left, two right, vectors left and right, partials
        self._scratch = self._zeros(sum(map(sum, sizes)))
        at = 0
        vectors = []
        for row, t, (m, n), size in zip(self._host, tracked, self.shapes, sizes, strict=True):
            starts = [at + sum(size[:i]) for i in range(len(size))]
            at += sum(size)
            address = [tables.address(self._scratch) + 4 * start for start in starts]
            left_vectors, right_vectors = (
                self._scratch[start : start + length * self.KP].view(length, self.KP)
                for start, length in ((starts[4], m), (starts[5], n))
            )
            vectors.append((left_vectors, right_vectors))
            self._fill_weight(row, t.weight)
            row[r.K.value], row[r.PROBES.value], row[r.EXACT.value] = t.columns, t.probes, t.exact
            row[r.LEFT_CHUNK.value], row[r.LEFT_CHUNKS.value] = tiling.chunks(n)
            row[r.RIGHT_CHUNK.value], row[r.RIGHT_CHUNKS.value] = tiling.chunks(m)
            row[r.LEFT_PRODUCT.value], row[r.RIGHT_PRODUCT.value] = address[:2]
            row[r.LEFT_SUM.value], row[r.LEFT_SPARE.value] = address[2], address[2] + 4 * m * self.KP
            row[r.RIGHT_SUM.value], row[r.RIGHT_SPARE.value] = address[3], address[3] + 4 * n * self.KP
            row[r.LEFT_VECTORS.value], row[r.RIGHT_VECTORS.value] = address[4:6]
            row[r.PARTIALS.value] = address[6]
            row[r.STATS.value] = tables.address(t.stats)
            left = left_vectors if t.left is None and not t.exact else t.left
            for field, step, block in (
                (r.RIGHT, r.RIGHT_STEP, t.right),
                (r.LEFT, r.LEFT_STEP, left),
                (r.RIGHT_PROBE, r.RIGHT_PROBE_STEP, t.right_probe),
                (r.LEFT_PROBE, r.LEFT_PROBE_STEP, t.left_probe),
            ):
                if block is not None:
                    row[field.value], row[step.value] = tables.address(block), block.stride(0)
        return vectors

    def _fill_weight(self, row: Any, weight: Tensor) -> None:
        (m, n), (down, across) = weight.shape, weight.stride()
        swapped = across != 1 and down == 1
        if swapped:
            m, n, down, across = n, m, across, down
        row[r.ROWS.value], row[r.COLUMNS.value], row[r.SWAPPED.value] = m, n, swapped
        row[r.ROW_STEP.value], row[r.COLUMN_STEP.value] = down, across
        row[r.WEIGHT.value] = tables.address(weight)
        size = weight.element_size()
        row[r.ALIGNED.value] = across == 1 and not (weight.data_ptr() % 16 or down * size % 16 or n * size % 16)

    @property
    def vectors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Blocks whose first columns are u₁ and v₁ of each matrix."""
        lefts, rights = zip(*self._blocks, strict=True)
        return list(lefts), list(rights)

    def follow_stream(self) -> None:
        """Makes the current stream wait for what an earlier one has still to do to the scratch."""
        if self.device.type == "cpu" or tables.capturing(self.device):
            return
        stream = torch.get_device_module(self.device).current_stream(self.device)
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
            for tensor in (*self._kept(), self._scratch, self.scalars, self.sigmas, self.squares, self.tickets):
                tensor.record_stream(stream)
        self._stream = stream

    def _kept(self) -> list[Tensor]:
        """What was uploaded for it."""
        uploaded = [self.table, self.numbers, self.noise, *self.work.values(), *self.solving.values()]
        return [tensor for tensor in uploaded if tensor is not None]

    def in_use(self) -> list[object]:
        """What launches read that may be replaced before they are over: a captured graph's never are."""
        return [self, *self._kept()]

    def set_addresses(self, addresses: Sequence[Sequence[int]]) -> None:
        """(gradient, first, second, peak, lr, step, target) of each matrix, 0 where there is none."""
        if addresses == self._addresses:
            return
        fields = [f.value for f in (r.GRAD, r.FIRST, r.SECOND, r.PEAK, r.LR, r.STEP, r.TARGET_AT)]
        host = self._host.copy()
        host[:, fields] = addresses
        host[:, r.ALIGNED.value] &= (host[:, fields[:4]] % 16 == 0).all(1)
        self.table = self._upload(host, torch.int64, "a tensor has moved since the step before")
        self._addresses, self.amsgrad = addresses, bool(host[:, r.PEAK.value].any())

    def set_numbers(self, numbers: Any) -> None:
        """(B, NUMBERS) float32."""
        if not np.array_equal(numbers, self._numbers, equal_nan=True):  # a target that stands in memory is nan here
            self.numbers = self._upload(numbers, torch.float32, "an option has changed since the step before")
            self._numbers = numbers

    def _upload(self, values: Any, dtype: torch.dtype, why: str) -> Tensor:
        if tables.capturing(self.device):
            raise RuntimeError(
                f"{why}, and nothing can be uploaded while a graph is captured. Make warm-up steps with the tensors "
                "that are captured: keep gradients in place with zero_grad(set_to_none=False), hold lr in a tensor, "
                "and use capturable=True where there is such an option"
            )
        return tables.upload(values, dtype, self.device)

    def launch_pass(self, update: int, side: int, **options: Any) -> None:
        passes.launch(self, update, side, **options)

    def launch_solve(self, kind: int, *, round: int, last: bool, found_inf: Tensor | None, stage: int = 0) -> None:
        solves.launch(self, kind, round, last, found_inf, stage)
