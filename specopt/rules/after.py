"""What rules that act on weights after the base update share: their sessions over the tracker of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specopt.kernels import Penalty, tables

from .. import updates
from ..session import Gate
from ..tracker import device, pairs
from ..views import Matrix


class After:
    """The session of a correction by operations on lists of matrices, on the CPU or on a device."""

    penalty: Penalty | None = None
    writes = True

    def __init__(self, matrices: Sequence[Matrix], correct: pairs.Correct, rank: int = 1) -> None:
        self.matrices, self.correct, self.rank = matrices, correct, rank
        new = [matrix for matrix in matrices if not pairs.has_state(matrix)]
        self.start = pairs.Start(new) if new else None  # it sees new matrices before the base update

    def finish(self) -> None:
        if self.start is not None:
            self.start.finish()
        pairs.step(self.matrices, self.correct, self.rank)


class AfterOnDevice:
    """The session of a correction of rank 1 by a device's launches over all matrices."""

    penalty = None
    writes = True

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
            numbers["LR"] = [0 if rate is None else tables.address(rate) for rate in self.rates]
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
