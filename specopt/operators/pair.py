"""One pair of products with a convolution and its adjoint: the Ritz triplets of a basis, and the next basis.

    Y = A V,   Rayleigh–Ritz on span(V):  σ_i, u_i, v_i;   Z_i = Aᵀ u_i of the first j
    next V = orth[ v_i | Z_i / σ_i − v_i | the first columns that V had | hint ]

the Ritz vectors, where they are off, where they came from, and what another search has found: a step of LOBPCG, the
conjugate gradients of eigenproblems, on ``AᵀA``. What depends on the columns before it is replaced by fixed random
columns. A is read afresh in every pair, for its kernel may have moved.

Groups of channels do not mix, so each has a basis of its own; they lie one under the other, as channels do.

Source: Knyazev, Toward the optimal preconditioned eigensolver, SIAM J. Sci. Comput. 23 (2001), without preconditioner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specopt import kernels
from specopt.kernels import Triplets

from .conv import ConvOperator


class Ritz(NamedTuple):
    """What a pair shows of one operator with G groups of channels."""

    sigma: Tensor
    """(G,) the largest Ritz value of each."""
    residual: Tensor
    """(G,) ``‖Aᵀu − σv‖ / σ`` of these."""
    left: Tensor
    """(m, j): u of the first, each group in its own rows."""
    right: Tensor
    """(n, j): v."""


def pair(
    operators: Sequence[ConvOperator],
    bases: Sequence[Tensor],
    images: int,
    variant: int,
    hints: Sequence[Tensor | None] | None = None,
) -> list[Ritz]:
    """The triplets of operators of one device and dtype; their bases moved on in place.

    A group's basis stays as it is where its product is not finite, or where it spans all there is.

    Args:
        operators: as they are now.
        bases: (n, k) of n = channels · pixels, the rows of each group orthonormal.
        images: ``j``, at most k / 3 unless the basis spans all there is.
        variant: of the random columns that fill up a basis.
        hints: a direction (n, 1) to be taken in, or None.
    """
    products = [_columns(o(maps_of(basis, o.input_shape))) for o, basis in zip(operators, bases, strict=True)]
    lefts, rights = (
        [block.new_empty(len(block), min(images, block.shape[1])) for block in blocks] for blocks in (products, bases)
    )
    split = [_split(blocks, operators) for blocks in (products, bases, lefts, rights)]
    sigma = split[0][0].new_zeros(len(split[0]), max(y.shape[1] for y in split[0]))
    triplets = kernels.ritz_triplets(split[0], split[1], out=Triplets(sigma, split[2], split[3]))
    images_of = [maps_of(left, o.output_shape) for left, o in zip(lefts, operators, strict=True)]
    returned = _split([_columns(o.adjoint(u)) for o, u in zip(operators, images_of, strict=True)], operators)
    top = triplets.sigma[:, 0]
    residual = kernels.first_column_residuals(returned, triplets.rights, torch.where(top > 0, top, 1.0))
    noises = _split([_noise(basis, variant) for basis in bases], operators)
    _move(split[1], returned, triplets, noises, _split_hints(hints, operators))
    counts = [o.geometry.groups for o in operators]
    tops, residuals = (torch.split(values, counts) for values in (top, residual))
    return [Ritz(*of) for of in zip(tops, residuals, lefts, rights, strict=True)]


def randomize(operators: Sequence[ConvOperator], bases: Sequence[Tensor], variant: int) -> None:
    """Fixed random bases: the same on every machine, and no touch of the global random state."""
    noises = _split([_noise(basis, variant) for basis in bases], operators)
    kernels.orthonormalize(noises, noises, _split(bases, operators))


def maps_of(columns: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Columns (n, k) as feature maps (k, channels, *size)."""
    return columns.mT.reshape(-1, *shape).contiguous()


def _columns(maps: Tensor) -> Tensor:
    return maps.flatten(1).mT.contiguous()


def _move(
    bases: Sequence[Tensor],
    returned: Sequence[Tensor],
    triplets: Triplets,
    noises: Sequence[Tensor],
    hints: Sequence[Tensor | None],
) -> None:
    """The next basis of every group that has more dimensions than its basis."""
    moved = [i for i, basis in enumerate(bases) if basis.shape[0] > basis.shape[1]]
    if not moved:
        return
    candidates = [_candidates(bases[i], returned[i], triplets.rights[i], triplets.sigma[i], hints[i]) for i in moved]
    valid = triplets.sigma[:, 0].isfinite()
    if len(moved) < len(bases):
        valid = torch.stack([valid[i] for i in moved])
    kernels.orthonormalize(candidates, [noises[i] for i in moved], [bases[i] for i in moved], active=valid)


def _split_hints(hints: Sequence[Tensor | None] | None, operators: Sequence[ConvOperator]) -> list[Tensor | None]:
    split: list[Tensor | None] = []
    for hint, o in zip(hints or [None] * len(operators), operators, strict=True):
        split += [None] * o.geometry.groups if hint is None else _split([hint], [o])
    return split


def _candidates(basis: Tensor, returned: Tensor, rights: Tensor, sigma: Tensor, hint: Tensor | None) -> Tensor:
    """``[ v | Aᵀu / σ − v | before | hint ]`` (n, k)."""
    images = rights.shape[1]
    columns = [rights, returned / torch.where(sigma[:images] > 0, sigma[:images], 1.0) - rights]
    before = basis.shape[1] - 2 * images
    columns += [basis[:, :before]] if hint is None else [basis[:, : before - 1], hint]
    return torch.cat(columns, 1)


def _noise(basis: Tensor, variant: int) -> Tensor:
    """Fixed random columns (n, k). The shared buffer of noise is 64 wide and as high as its highest block, so long
    columns are laid into it row by row."""
    height = -(-basis.numel() // kernels.MAX_COLUMNS)
    window = kernels.start_block(height, kernels.MAX_COLUMNS, basis.dtype, basis.device, variant)
    return window.reshape(-1)[: basis.numel()].view(basis.shape)


def _split(blocks: Sequence[Tensor], operators: Sequence[ConvOperator]) -> list[Tensor]:
    """The rows (channels · pixels) of each group."""
    pairs = zip(blocks, operators, strict=True)
    return [part for block, o in pairs for part in block.view(o.geometry.groups, -1, block.shape[1]).unbind()]
