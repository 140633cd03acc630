"""From sums over ranks to Ritz triplets and orthonormal bases.

Gram matrices are made and solved in float64. So they need no scale, their small singular values are as sharp as those
of the product itself, and a basis is orthonormal to a few units in the last place of float32 from one of them. (Of
float64 weights that holds as long as squares of the entries are numbers, and to half of the digits.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specopt import kernels
from specopt.kernels import Triplets
from specopt.kernels.triplets import eigh


def gram(block: Tensor) -> Tensor:
    """``XᵀX`` (k, k) in float64, of this rank's rows."""
    wide = block.to(torch.float64)
    return wide.mT @ wide


class Solved(NamedTuple):
    """What Gram matrices ``YᵀY`` tell: by size, of equal or different widths."""

    sigma: list[Tensor]
    """(k_b,) in float64; nan where a product is not finite."""
    rotations: list[Tensor]
    """Q (k_b, k_b)."""
    inverses: list[Tensor]
    """``1/σ_i`` (k_b,), 0 where that direction is lost in the precision of the products."""


def solved(grams: Sequence[Tensor], dtype: torch.dtype) -> Solved:
    """``YᵀY = Q diag(σ²) Qᵀ``.

    Args:
        grams: (k_b, k_b) in float64.
        dtype: of the products that they are of.
    """
    out = Solved([torch.empty(0)] * len(grams), [torch.empty(0)] * len(grams), [torch.empty(0)] * len(grams))
    by_width: dict[int, list[int]] = {}
    for i, one in enumerate(grams):
        by_width.setdefault(len(one), []).append(i)
    for chosen in by_width.values():
        stacked = torch.stack([grams[i] for i in chosen])
        finite = stacked.isfinite().all(2).all(1)[:, None]
        weight, rotation = eigh(torch.where(finite[:, :, None], stacked, 0.0).neg_())
        root = weight.neg_().clamp_min_(0).sqrt_()
        present = (root > 64 * torch.finfo(dtype).eps * root[:, :1]) & (root >= torch.finfo(dtype).smallest_normal)
        sigma = torch.where(finite, torch.where(present, root, 0.0), torch.nan)
        inverse = torch.where(present, 1 / root, 0.0)
        for i, *found in zip(chosen, sigma, rotation, inverse, strict=True):
            out.sigma[i], out.rotations[i], out.inverses[i] = found
    return out


def ritz(products: Sequence[Tensor], bases: Sequence[Tensor], grams: Sequence[Tensor]) -> Triplets:
    """Rayleigh–Ritz as :func:`specopt.kernels.ritz_triplets`, where the Gram matrices are of whole products.

    Args:
        products: ``Y_b`` (·, k_b), of which this may be some rows.
        bases: ``V_b`` (·, k_b), likewise.
        grams: ``YᵀY`` (k_b, k_b).
    """
    found = solved(grams, products[0].dtype)
    sigma = products[0].new_zeros(len(products), max(len(one) for one in found.sigma))
    lefts, rights = [], []
    parts = zip(products, bases, *found, strict=True)
    for b, (product, basis, values, rotation, inverse) in enumerate(parts):
        sigma[b, : len(values)] = values
        left = product @ (rotation * inverse).to(product.dtype)
        lefts.append(left if bool(values[0].isfinite()) else torch.zeros_like(left))
        rights.append(basis @ rotation.to(basis.dtype))
    return Triplets(sigma, lefts, rights)


class Basis(NamedTuple):
    """Columns to be made orthonormal, as combinations of others: ``X M``."""

    blocks: Tensor
    """X (·, w) of this rank's rows."""
    mixing: Tensor
    """M (w, k) in float64."""
    starts: Tensor
    """Random columns (·, k) in the place of what is zero or depends on columns before it."""


DEPENDENT = 1e-6
"""Squared distance of a normalized column from those before it, below which it is made of rounding."""
CANCELLED = 1e-8
"""Squared length of a candidate, as a share of what it is the difference of, below which float64 does not know it."""
FAINT = 1e-12
"""Of a random column, in the place of a candidate that may be zero: less than the rounding of one that is not."""
LOOSE = 1e-5
"""Entry of ``TᵀGT - I`` from which T is none of G, be it that G's Cholesky factorization has failed or that G's own
rounding errors come to as much."""
ROUNDINGS = 8
"""Of terms of length 1, how many eps an entry of G is wrong by."""


class Factor(NamedTuple):
    """What the Gram matrix of X tells of an orthonormal basis ``X M T``."""

    factor: Tensor
    """T (k, k), upper triangular."""
    dropped: Tensor
    """(k,) columns that are zero in T."""
    cancelled: Tensor
    """(k,) columns whose terms cancel."""
    settled: bool
    """Whether that is the whole basis: not where columns were dropped or cancel, or where the Gram matrix is too close
    to singular."""


def factors(gram: Tensor, mixing: Tensor) -> Factor:
    """From ``XᵀX`` (w, w).

    Args:
        mixing: M, by which the terms of a column are of length 1, or less.
    """
    wanted = mixing.mT @ gram @ mixing
    largest = wanted.diagonal().amax()
    scale = torch.where(largest > 0, largest, 1.0)
    found, dropped = (each[0] for each in kernels.orthonormalizers((wanted / scale)[None], threshold=DEPENDENT))
    made = found / scale.sqrt()
    error = (made.mT @ wanted @ made - torch.eye(len(made), dtype=made.dtype, device=made.device)).abs().amax()
    error += ROUNDINGS * torch.finfo(made.dtype).eps * made.square().sum(0).amax()
    cancelled = wanted.diagonal() < CANCELLED
    settled = bool(~dropped.any() & ~cancelled.any() & (error < LOOSE))
    return Factor(made, dropped, cancelled & ~dropped, settled)


def candidates(basis: Basis, known: Factor) -> Tensor:
    """``X M`` (·, k) in float64, from which a basis is made by its own Gram matrix: with random columns of about unit
    length for what was dropped, and faint ones in what may be zero."""
    made = basis.blocks.to(torch.float64) @ basis.mixing
    starts = basis.starts.to(made.dtype)
    made[:, known.cancelled] += FAINT * starts[:, known.cancelled]
    made[:, known.dropped] = starts[:, known.dropped]
    return made


def mixed(basis: Basis, factor: Tensor) -> Tensor:
    """``X M T`` (·, k) in the dtype of X."""
    made = basis.blocks.to(torch.float64) @ (basis.mixing @ factor)
    return made.to(basis.blocks.dtype)
