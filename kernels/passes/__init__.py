"""Passes over the weights: the base optimizer's update with the penalty's gradient, or a correction.

On a GPU :mod:`specopt.kernels.passes.device` makes them, and in the same touch of memory a half product of the new
weight. On the CPU, where products are bound by arithmetic and not by memory, those are made by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..backend import on_host
from ..updates import rank_updates_, scale_
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
    seed: float = 0.0
    """Of stochastic rounding of a half-precision weight; 0: to nearest."""


class Penalty(NamedTuple):
    """What every gradient gains: ``c_b u_b v_bᵀ``."""

    coefficients: Tensor
    """(B,)."""
    lefts: Sequence[Tensor]
    """(m_b, ·), of which the first column is u; unit column stride."""
    rights: Sequence[Tensor]
    """(n_b, ·), likewise."""


def base_updates_(updates: Sequence[Update], penalty: Penalty | None = None, scale: float = 1.0) -> None:
    """The step of SGD or AdamW on CPU matrices: torch's, to rounding.

    Half-precision weights are updated in float32 and rounded once.

    Args:
        updates: one for each matrix.
        penalty: added to the gradients, which are not written to; an entry that would stop being finite keeps its plain
            gradient.
        scale: what the gradients (not the penalty) are still multiplied by.
    """
    reference.base_updates_(updates, penalty, scale)


def corrections_(
    matrices: Sequence[Tensor],
    coefficients: Tensor,
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    *,
    factors: Tensor | None = None,
    seeds: Sequence[float] | None = None,
) -> None:
    """``W_b ← f_b W_b + Σ_i c_bi u_bi v_biᵀ`` in place.

    An entry whose new value would not be finite keeps its old one; where ``c_b`` is 0 and ``f_b`` 1 nothing is written.

    Args:
        matrices: (m_b, n_b), any strides.
        coefficients: ``c`` (B, r), r <= 64.
        lefts, rights: (m_b, >= r) and (n_b, >= r), of which the first r columns are the ``u_bi`` and ``v_bi``; unit
            column stride. Fewer where all coefficients beyond are 0.
        factors: ``f`` (B,); 1 if absent.
        seeds: of stochastic rounding of half-precision matrices on the CPU; 0: to nearest, as all are if absent.
    """
    if on_host(coefficients):
        reference.corrections_(matrices, coefficients, lefts, rights, factors, seeds or [0.0] * len(matrices))
        return
    if factors is not None:
        scale_(matrices, factors)
    rank_updates_(matrices, coefficients, lefts, rights)


__all__ = ["SGD", "AdamW", "Penalty", "Update", "base_updates_", "corrections_"]
