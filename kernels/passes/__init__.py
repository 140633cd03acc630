"""Passes over the weights: the base optimizer's update with the penalty's gradient, in one touch of memory.

On a GPU the same touch makes a half product of the new weight (:mod:`specopt.kernels.passes.device`); on the CPU an
update runs on slices of rows that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from . import reference


@dataclass(frozen=True)
class SGD:
    """The numbers of ``torch.optim.SGD``."""

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool


@dataclass(frozen=True)
class AdamW:
    """The numbers of ``torch.optim.AdamW``; ``step`` counts from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool
    step: float


class Update(NamedTuple):
    """The update of one matrix: everything (m, n), laid out alike."""

    weight: Tensor
    grad: Tensor
    state: tuple[Tensor, ...]
    """SGD: the momentum buffer, if any; AdamW: exp_avg, exp_avg_sq and, with amsgrad, max_exp_avg_sq."""
    numbers: SGD | AdamW
    fresh: bool = False
    """SGD's buffer holds nothing yet and takes the gradient as it is."""


class Penalty(NamedTuple):
    """What every gradient gains: ``c_b u_b v_bᵀ``."""

    coefficients: Tensor
    """(B,)."""
    lefts: Sequence[Tensor]
    """(m_b, ·), of which the first column is u; unit column stride."""
    rights: Sequence[Tensor]
    """(n_b, ·), likewise."""


def base_updates_(updates: Sequence[Update], penalty: Penalty | None = None, scale: float = 1.0) -> None:
    """The step of SGD or AdamW on CPU matrices, as torch's single-tensor implementations make it.

    Half-precision weights are updated in float32 and rounded once.

    Args:
        updates: one for each matrix.
        penalty: added to the gradients, which are not written to; an entry that would stop being finite keeps its plain
            gradient.
        scale: what the gradients (not the penalty) are still multiplied by.
    """
    reference.base_updates_(updates, penalty, scale)


__all__ = ["SGD", "AdamW", "Penalty", "Update", "base_updates_"]
