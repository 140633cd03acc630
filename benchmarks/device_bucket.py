"""A bucket of float32 weights of noise, to launch single kernels on. What they compute is of no interest here.

As in the optimizers, a matrix whose smaller side is at most twice the block (at most 64) is exact, and is read
transposed where its rows are few.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from specopt.kernels import bucket as buckets
from specopt.kernels import records as r
from specopt.kernels.passes import tiling

Shape = tuple[int, int]

NUMBERS = {"RATE": 1e-6, "EPS": 1e-8, "TOLERANCE": 0.01, "MINIMUM": 1, "MAXIMUM": 1, "FIXED": 1}
NUMBERS |= {"TARGET": 1, "STRENGTH": 1e-6}
SGD = {"BETA1": 0.9, "COMPLEMENT2": 1}
ADAMW = {"BETA1": 0.9, "BETA2": 0.999, "COMPLEMENT1": 0.1, "COMPLEMENT2": 1e-3, "BIAS1": 0.5, "BIAS2_ROOT": 0.5}
SCALARS = {"SIGMA": 1, "WANTED": 1, "CHANGE": 1e-6, "FACTOR": 1, "PENALTY": 1e-6}
STREAMS = {"NONE": 4, "SGD": 20, "ADAMW": 28, "CORRECT": 8}
"""Bytes of a float32 parameter that a pass moves."""


class NoiseBucket:
    """``halves``: SGD's state and a basis on both sides; else AdamW's, and one on the right."""

    def __init__(self, shapes: Sequence[Shape], block: int, device: torch.device, *, halves: bool) -> None:
        self.device, self.halves, self.probes = device, halves, block // 8
        self.k = block - self.probes
        self.random = torch.Generator(device).manual_seed(0)
        limit = min(2 * block, 64)
        weights = [self._noise(*shape) for shape in shapes]
        weights = [w.mT if w.shape[0] < w.shape[1] and w.shape[0] <= limit else w for w in weights]
        self.tracked = [self._tracked(weight, limit) for weight in weights]
        self.bucket = buckets.Bucket(self.tracked)
        moments = 1 if halves else 2
        self.others = [[torch.ones_like(w) for _ in range(1 + moments)] for w in weights]
        addresses = [[t.data_ptr() for t in tensors] + [0] * (6 - moments) for tensors in self.others]
        self.bucket.set_addresses(addresses)
        self.bucket.set_numbers(self._filled(r.NUMBERS.value, NUMBERS | (SGD if halves else ADAMW)))
        self.bucket.scalars.copy_(torch.from_numpy(self._filled(r.SCALARS.value, SCALARS)))

    def launch(self, update: str, side: str) -> None:
        """A pass, by the names of ``UPDATE`` and ``SIDE``."""
        self.bucket.launch_pass(getattr(buckets, update), getattr(buckets, side))

    def solve(self, kind: str, stage: int = 0) -> None:
        self.bucket.launch_solve(getattr(buckets, kind), round=0, last=True, found_inf=None, stage=stage)

    def bytes(self, update: str, side: str) -> int:
        """What memory has to move in a pass: the streams, the operand, and the product in its partial sums."""
        total = 0
        for t in self.tracked:
            m, n = t.weight.shape
            total += 0 if t.exact and update == "NONE" else STREAMS[update] * m * n
            if side != "NOTHING" and not t.exact:
                outer, inner = (n, m) if side == "RIGHT" else (m, n)
                total += 4 * (self.k + self.probes) * inner + 4 * self.bucket.KP * outer * tiling.chunks(inner)[1]
        return total

    def _noise(self, rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=self.random, device=self.device)

    def _basis(self, rows: int) -> Tensor:
        return torch.linalg.qr(self._noise(rows, self.k))[0].contiguous()

    def _tracked(self, weight: Tensor, limit: int) -> buckets.Tracked:
        m, n = weight.shape
        stats = torch.zeros(8, device=self.device)
        if n <= limit:
            return buckets.Tracked(weight, n, 0, True, stats)
        left = (self._basis(m), self._noise(m, self.probes)) if self.halves else (None, None)
        right = self._basis(n), self._noise(n, self.probes)
        return buckets.Tracked(weight, self.k, self.probes, False, stats, right[0], left[0], right[1], left[1])

    def _filled(self, width: int, values: dict[str, float]) -> np.ndarray:
        row = np.zeros((len(self.tracked), width), np.float32)
        for name, value in values.items():
            row[:, getattr(r, name).value] = value
        return row
