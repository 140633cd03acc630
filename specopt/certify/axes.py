"""What a window reads: the geometry of convolutions and pooling, one spatial dimension at a time.

Output position t of a window of ``kernel`` taps reads, at its tap j, position ``stride·t + dilation·j − before``. Where
that lies outside of the input, padding says what is there: nothing (zeros), or another position of the input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

NOTHING = -1
"""In place of a position: a zero is read."""
MODES = ("zeros", "circular", "reflect", "replicate")


def each(value: Any, count: int) -> list[Any]:
    """A setting for each dimension, as torch takes them."""
    return list(value) if isinstance(value, tuple | list) else [value] * count


@dataclass(frozen=True)
class Axis:
    """One spatial dimension of an operator."""

    kernel: int
    stride: int = 1
    dilation: int = 1
    before: int = 0
    after: int = 0
    mode: str = "zeros"
    size: int | None = None
    """Length of the input; None where it is not known."""
    outputs: int | None = None
    """Length of the output; known where the size is."""

    @property
    def step(self) -> int:
        """``s' = stride / gcd(stride, dilation)``: taps j and j + s' read the same residue class of positions."""
        return self.stride // math.gcd(self.stride, self.dilation)

    @property
    def folds(self) -> int:
        """``m = ceil(kernel / s')``: how many taps read one position at most, without padding."""
        return -(-self.kernel // self.step)

    @property
    def reach(self) -> int:
        """``d' (m − 1)``: from the first to the last tap of a residue class, in outputs."""
        return self.dilation // math.gcd(self.stride, self.dilation) * (self.folds - 1)

    @cached_property
    def reads(self) -> Tensor:
        """(outputs, kernel): the positions that are read, or NOTHING."""
        assert self.size is not None and self.outputs is not None
        outputs, taps = torch.arange(self.outputs)[:, None], torch.arange(self.kernel)
        return self._inside(self.stride * outputs + self.dilation * taps - self.before)

    def _inside(self, positions: Tensor) -> Tensor:
        assert self.size is not None
        last = self.size - 1
        if self.mode == "circular":
            return positions % self.size
        if self.mode == "replicate":
            return positions.clamp(0, last)
        if self.mode == "reflect":
            return last - (last - positions.abs()).abs()
        return torch.where((positions < 0) | (positions > last), NOTHING, positions)

    @cached_property
    def most_reads(self) -> int:
        """How often an input position is read at most, over all outputs and taps."""
        if self.size is None:
            return self.folds * self.copies
        return _most_common(self.reads)

    @cached_property
    def copies(self) -> int:
        """How often padding shows an input position at most, itself included: ``‖Pad‖²``. A circular dimension that is
        a whole torus for the operator (below) counts as one that pads nothing."""
        if self.mode == "zeros" or self.is_torus:
            return 1
        if self.size is not None:
            return _most_common(self._inside(torch.arange(-self.before, self.size + self.after)))
        if self.mode == "replicate":
            return 1 + self.before + self.after
        return 1 + (self.before > 0) + (self.after > 0)

    @property
    def is_torus(self) -> bool:
        """Circular padding makes the operator a part of a convolution on the torus: the stride divides its length, and
        no output comes twice."""
        if self.mode != "circular":
            return False
        if self.size is None or self.outputs is None:
            return self.stride == 1 and self.before + self.after <= self.dilation * (self.kernel - 1)
        return self.size % self.stride == 0 and self.outputs <= self.size // self.stride

    @property
    def torus(self) -> int | None:
        """Length L of a torus, in outputs, on which a convolution holds the operator as a part: where the taps of the
        last output do not come round to positions of the first. None where the size is not known."""
        if self.size is None or self.outputs is None:
            return None
        return self.size // self.stride if self.is_torus else self.outputs + self.reach


def _most_common(positions: Tensor) -> int:
    there = positions[positions != NOTHING]
    return int(there.bincount().max()) if there.numel() else 0
