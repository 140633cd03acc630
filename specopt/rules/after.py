"""What rules that act on weights after the base update share: their sessions over the tracker of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import updates
from ..session import Gate
from ..tracker import device, pairs
from ..views import Matrix


class AfterOnHost:
    """The spectral matrices of a step on the CPU: what of them has to be seen before the base update."""

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        self.matrices = matrices
        new = [matrix for matrix in matrices if not pairs.has_state(matrix)]
        self.start = pairs.Start(new) if new else None

    def finish(self, correct: pairs.Correct) -> None:
        if self.start is not None:
            self.start.finish()
        if self.matrices:
            pairs.step(self.matrices, correct)


class AfterOnDevice:
    """The same of matrices that a device's kernels control."""

    penalty = None

    def __init__(self, matrices: Sequence[Matrix], gate: Gate) -> None:
        self.matrices, self.gate = matrices, gate
        new = [] if gate.settled else [matrix for matrix in matrices if not pairs.has_state(matrix)]
        self.start = pairs.Start(new) if new else None
        self.pairs = None if self.start else self._pairs()

    def numbers(self) -> dict[str, Any]:
        """What the records are told of the rule."""
        raise NotImplementedError

    def _pairs(self) -> device.Pairs:
        numbers = self.numbers()
        if self.gate.base is None:
            numbers["RATE"], self.rates = updates.rates(self.matrices)
            numbers["LR"] = [0 if rate is None else rate.data_ptr() for rate in self.rates]
        scaler = self.gate.scaler(self.matrices[0].param.device)
        return device.Pairs(self.matrices, numbers, self.gate.base, self.gate.workspace, scaler)

    def update(self) -> None:
        assert self.pairs is not None
        self.pairs.update()

    def tracked(self) -> device.Pairs:
        """After the base update: all matrices, with state."""
        if self.start is not None:
            self.start.finish()
        return self.pairs or self._pairs()
