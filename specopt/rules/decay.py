"""The rule of decoupled spectral decay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from specopt import kernels

from .. import options
from ..session import Gate, Session
from ..tracker import pairs
from ..tracker.common import constant
from ..updates import rate_of
from ..views import Matrix, block_of
from .after import After, AfterOnDevice
from .strength import Strengthened


@dataclass(frozen=True, repr=False)
class SpectralDecay(Strengthened):
    """``W ← W − lr λ σ₁ u₁v₁ᵀ`` after the base update, with the first triplet of the updated weight.

    To :class:`specopt.SpectralPenalty` what AdamW's weight decay is to a penalty ``λ/2 ‖W‖²`` in the loss: momentum and
    adaptive step sizes do not see it. Where ``lr λ < 1`` the first singular value falls by that part.

    Args:
        lam: λ >= 0; ``decay_lambda`` in a group.
        spectral, view, block, tolerance, max_passes, stochastic_rounding: see :class:`specopt.NormScaleAdamW`.

    Raises:
        ValueError: an option that makes no sense, naming it, its value and what it may be.

    Source: Loshchilov and Hutter, Decoupled weight decay regularization, arXiv 1711.05101, for the first triplet alone.
    """

    lam: float = field(metadata=options.named("decay_lambda"))
    strength: ClassVar[str] = "decay_lambda"

    def columns(self, group: Mapping[str, Any]) -> int:
        return pairs.basis_columns(block_of(group))

    def has_state(self, matrix: Matrix) -> bool:
        return pairs.has_state(matrix)

    def takes_along(self, matrix: Matrix) -> bool:
        return True

    def begin(self, matrices: Sequence[Matrix], gate: Gate) -> Session:
        if self.is_fused(matrices[0]):
            return _DecayedOnDevice(matrices, gate)
        return After(matrices, self.correction(matrices, gate))

    def reach(self, matrices: Sequence[Matrix]) -> int:
        return 1

    def correction(self, matrices: Sequence[Matrix], gate: Gate) -> pairs.Correct:
        def correct(found: pairs.Found) -> pairs.Change:
            sigma = found.sigma[:, 0]
            strength = constant([float(matrix.group["decay_lambda"]) for matrix in matrices], sigma)
            part = _rates(matrices, sigma) * strength * gate.open(matrices, sigma)
            return pairs.Change(-(part * torch.where(found.valid, sigma, 0.0))[:, None])

        return correct


class _DecayedOnDevice(AfterOnDevice):
    def numbers(self) -> dict[str, Any]:
        strength = [float(matrix.group["decay_lambda"]) for matrix in self.matrices]
        return {"MODE": [DECAY] * len(self.matrices), "STRENGTH": strength}

    def finish(self) -> None:
        self.tracked().finish()


DECAY = 3
"""The number that the solves know this rule by; see ``MODE`` in :mod:`specopt.kernels.records`."""


def _rates(matrices: Sequence[Matrix], like: Tensor) -> Tensor:
    """Learning rates (B,)."""
    rates = [rate_of(matrix.group) for matrix in matrices]
    if any(isinstance(rate, Tensor) and rate.device.type != "cpu" for rate in rates):
        return torch.stack([r.reshape(()).to(like) if isinstance(r, Tensor) else like.new_full((), r) for r in rates])
    return kernels.upload([float(rate) for rate in rates], like.dtype, like.device)
