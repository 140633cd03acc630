"""What the steps of a block share on every device: triplets, how a basis is shared out, and an orthonormal one of any
candidates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .backend import allocate
from .blocks import grams, mixes
from .small import dependence, orthonormalizers
from .tables import constant


class Triplets(NamedTuple):
    """Ritz triplets of B matrices, by size; ``W_b rights_b = lefts_b · diag(sigma_b)`` to rounding."""

    sigma: Tensor
    """(B, K), 0 beyond ``k_b``; non-finite where a product was."""
    lefts: list[Tensor]
    """(m_b, k_b), unit columns; zero where sigma is."""
    rights: list[Tensor]
    """(n_b, k_b)."""


def scouts(columns: int) -> int:
    """How many columns of a basis are random, others in each step. In a flat spectrum a direction outside the block may
    lie above all within, and nothing else would show it: the residual is small, and the update does not lead there."""
    return 1 if columns >= 8 else 0


def eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """As ``torch.linalg.eigh``, of Gram matrices (B, k, k) or (k, k) that may be graded beyond all rounding: in float32
    MKL does not converge on some of nearly rank one. Those are solved in float64, without what is nothing beside their
    largest entry."""
    try:
        weight, rotation = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined] # which torch does not list as exported
        wide = gram.double()
        size = wide.abs()
        wide = torch.where(size > 1e-20 * size.amax((-2, -1), keepdim=True), wide, 0.0)
        weight, rotation = (found.to(gram.dtype) for found in torch.linalg.eigh(wide))
    return weight, rotation


class BasisLayout(NamedTuple):
    """How the columns of the next basis are shared out: ``kept`` and ``followers`` per matrix, its :func:`scouts`, and
    images in the rest."""

    columns: tuple[int, ...]
    kept: tuple[int, ...]
    followers: tuple[int, ...]


class TurnLayout(NamedTuple):
    """How the columns of a basis of a tracker by halves are shared out: images in the rest."""

    columns: tuple[int, ...]
    kept: tuple[int, ...]
    followers: tuple[int, ...]


REFILL_THRESHOLD = 0.05
"""In the second pass only a replaced column can lie close to the others; closer than this it is left out (zero)."""


def orthonormalize_all(
    candidates: Sequence[Tensor],
    starts: Sequence[Tensor],
    out: Sequence[Tensor],
    active: Tensor | None = None,
    *,
    rounding: torch.dtype | None = None,
) -> None:
    """:func:`~specopt.kernels.orthonormalize` whatever the candidates are.

    A column that the first pass keeps at its threshold is little but the others' rounding errors; the second leaves
    them up to a few ``eps · K / REFILL_THRESHOLD`` from orthonormal, 1e-4 in fp32.

    Args:
        rounding: what the candidates were computed in, where they are given in more than that.
    """
    gram, scale = grams(candidates)
    finite = (gram.sum((1, 2)) + scale).isfinite()
    active = finite if active is None else active & finite
    factor, dropped = orthonormalizers(gram, threshold=dependence(gram.shape[-1], rounding or gram.dtype))
    counts = constant([float(block.shape[1]) for block in candidates], gram.dtype, gram.device)
    real = torch.arange(gram.shape[-1], device=gram.device) < counts[:, None]
    refill = torch.diag_embed((dropped & real).to(gram.dtype))
    rows = constant([float(block.shape[0]) for block in candidates], gram.dtype, gram.device)
    refill = refill * rows.rsqrt()[:, None, None]
    first = allocate([(block.shape[0], block.shape[1]) for block in candidates], candidates[0])
    mixes([(candidates, factor / scale[:, None, None]), (starts, refill)], first)
    gram, scale = grams(first)
    factor, _ = orthonormalizers(gram, threshold=REFILL_THRESHOLD)
    mixes([(first, factor / scale[:, None, None])], out, active=active)
