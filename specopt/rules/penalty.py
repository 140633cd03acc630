"""The rule of spectral norm regularization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from specopt.kernels import Penalty

from .. import options
from ..session import Gate, Session
from ..tracker import device, halves
from ..tracker.common import constant
from ..updates import is_on_device
from ..views import Matrix, block_of
from .strength import Strengthened


@dataclass(frozen=True, repr=False)
class SpectralPenalty(Strengthened):
    """``λ/2 · Σ σ₁²`` added to the objective: each matrix' gradient gains ``λ σ₁ u₁v₁ᵀ`` for the base update.

    ``p.grad`` is the same tensor with the same values after the step as before it. Under ``maximize=True`` the penalty
    is still minimized.

    Args:
        lam: λ >= 0; ``snr_lambda`` in a group.
        spectral, view, block, tolerance, max_passes, stochastic_rounding: see :class:`specopt.SNRSGD`.

    Raises:
        ValueError: an option that makes no sense, naming it, its value and what it may be.

    Source: Yoshida and Miyato, Spectral norm regularization, arXiv 1705.10941 (whose σ is printed inverted).
    """

    lam: float = field(default=0.01, metadata=options.named("snr_lambda"))
    strength: ClassVar[str] = "snr_lambda"

    def columns(self, group: Mapping[str, Any]) -> int:
        return halves.basis_columns(block_of(group))

    def has_state(self, matrix: Matrix) -> bool:
        return halves.has_state(matrix)

    def takes_along(self, matrix: Matrix) -> bool:
        # a count of AdamW's steps on the device is moved on by a solve after the update, of which there is none here
        return not is_on_device(matrix.state.get("step"))

    def begin(self, matrices: Sequence[Matrix], gate: Gate) -> Session:
        if not gate.settled:
            halves.start([matrix for matrix in matrices if not halves.has_state(matrix)])
        if device.runs_on(matrices[0]):
            scaler = gate.scaler(matrices[0].param.device)
            return device.Turns(matrices, _strengths(matrices), gate.base, gate.workspace, scaler)
        return _Penalized(matrices)


class _Penalized:
    """A step of :class:`SpectralPenalty`: all of it comes before the base update."""

    writes = False

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        first = halves.step(matrices)
        sigma = torch.where(first.valid, first.sigma, 0.0)
        self.penalty = Penalty(strengths(matrices, sigma) * sigma, first.lefts, first.rights)

    def finish(self) -> None:
        pass


def strengths(matrices: Sequence[Matrix], like: Tensor) -> Tensor:
    """λ (B,), negative where the base maximizes: the penalty is minimized all the same."""
    return constant(_strengths(matrices), like)


def _strengths(matrices: Sequence[Matrix]) -> list[float]:
    return [(-1.0 if m.group.get("maximize") else 1.0) * float(m.group["snr_lambda"]) for m in matrices]
