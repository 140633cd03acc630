"""The block's own steps on the CPU, matrix by matrix: where values may be looked at, most of what guards against rare
numbers is left out until they come. See :mod:`.subspace` for what each function means.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .backend import live
from .blocks.reference import residual
from .tables import identity
from .triplets import BasisLayout, Triplets, TurnLayout, eigh, orthonormalize_all, scouts

SAFE = 1e-8, 1e16
"""Squared norm of a block's longest column, between which no square that counts can over- or underflow."""
GOOD = 0.05
"""Smallest squared distance of a normalized column from those before it, for which one Cholesky-QR is orthonormal to a
few units in the last place."""
FAIR = 1e-3
"""The same for which a second one makes it so."""


def ritz_triplets(products: Sequence[Tensor], blocks: Sequence[Tensor], out: Triplets, active: Tensor | None) -> None:
    """Into ``out``, as many vectors as there is room for."""
    for chosen, gram, scale in _grams(products, live(active, len(products))):
        weight, rotation = eigh(gram.neg_())
        root = weight.neg_().clamp_min_(0).sqrt_()
        limits = torch.finfo(root.dtype)
        present = root > 64 * limits.eps * root[:, :1]
        if any(s != 1 for s in scale):
            root *= root.new_tensor(scale)[:, None]
            present &= root >= limits.smallest_normal
        inverse = torch.where(present, 1 / root, 0.0)
        sigma = torch.where(present | root.isnan(), root, 0.0)
        k = gram.shape[1]
        if len(chosen) == len(out.sigma) and k == out.sigma.shape[1]:
            out.sigma.copy_(sigma)
        else:
            out.sigma[chosen, :k] = sigma
        to_left = rotation * inverse[:, None, :]
        for i, left, right, s in zip(chosen, to_left.unbind(), rotation.unbind(), scale, strict=True):
            if s != s:
                out.lefts[i].zero_()
                out.rights[i].zero_()
                continue
            torch.mm(products[i], left[:, : out.lefts[i].shape[1]], out=out.lefts[i])
            torch.mm(blocks[i], right[:, : out.rights[i].shape[1]], out=out.rights[i])


def sharpen(triplets: Triplets, count: int) -> None:
    for i, (left, right) in enumerate(zip(triplets.lefts, triplets.rights, strict=True)):
        k = min(count, left.shape[1])
        x = left[:, :k].double() * triplets.sigma[i, :k].double()
        top = float(x.abs().amax()) if x.numel() else 0.0
        if not (math.isfinite(top) and top > 0):
            continue
        x = x / top
        _, rotation = eigh(x.mT @ x)
        x = x @ rotation.flip(1)
        norms = torch.linalg.vector_norm(x, dim=0)
        left[:, :k] = torch.where(norms > 0, x / norms.clamp_min(torch.finfo(x.dtype).tiny), 0.0)
        right[:, :k] = right[:, :k].double() @ rotation.flip(1)
        triplets.sigma[i, :k] = norms * top


def orthonormalize(
    candidates: Sequence[Tensor], starts: Sequence[Tensor], out: Sequence[Tensor], chosen: Sequence[int]
) -> None:
    rest: list[int] = []
    first: dict[int, Tensor] = {}
    for group, gram, scale in _grams(candidates, chosen):
        factor, least = _factors(gram)
        for i, small, s, distance in zip(group, factor.unbind(), scale, least, strict=True):
            if s != 1 or not distance >= FAIR:
                rest.append(i)
            elif distance >= GOOD:
                torch.mm(candidates[i], small, out=out[i])
            else:
                first[i] = torch.mm(candidates[i], small)
    if first:
        for group, gram, _ in _grams(first, list(first)):
            factor, _ = _factors(gram)
            for i, small in zip(group, factor.unbind(), strict=True):
                torch.mm(first[i], small, out=out[i])
    if rest:
        # in double precision, so that what hardly stands out of the others is orthonormal too
        wide, fresh, found = ([some[i].double() for i in rest] for some in (candidates, starts, out))
        orthonormalize_all(wide, fresh, found, rounding=out[rest[0]].dtype)
        for i, basis in zip(rest, found, strict=True):
            out[i].copy_(basis)


def next_basis(
    triplets: Triplets,
    returned: Sequence[Tensor],
    previous: Sequence[Tensor],
    starts: Sequence[Tensor],
    layout: BasisLayout,
    top: Tensor,
    largest: Tensor,
    corrected: Tensor,
    out: Sequence[Tensor],
    active: Tensor | None,
) -> Tensor:
    chosen = live(active, len(out))
    residuals = [0.0] * len(out)
    values, tops, sizes = corrected.tolist(), top.tolist(), largest.tolist()
    candidates = list(out)
    for i in chosen:
        z, v, scale = returned[i], triplets.rights[i], 1 / sizes[i]
        k, r, a = layout.columns[i], layout.kept[i], layout.followers[i]
        p = k - r - a - scouts(k)
        d = values[i][:k]
        order = sorted(range(k), key=[-abs(value) for value in d].__getitem__)[:p]
        zs, vs = z[:, :p], v[:, :p]
        if order != list(range(p)):
            index = torch.tensor(order, device=z.device)
            zs, vs = z.index_select(1, index), v.index_select(1, index)
        ordered = z.new_tensor([d[j] for j in order])
        block = candidates[i] = torch.empty_like(out[i], memory_format=torch.contiguous_format)
        images, kept = block[:, :p], block[:, p : p + r]
        torch.mul(zs, ordered * scale, out=images).sub_(vs, alpha=0.5 * min(x * x for x in d))
        if r:
            torch.mul(vs[:, :r], -ordered[:r], out=kept).add_(zs[:, :r], alpha=scale)
        if a:
            torch.sub(z[:, k:], previous[i], out=block[:, p + r : p + r + a]).mul_(scale)
        if scouts(k):
            torch.mul(starts[i][:, k - 1 :], len(block) ** -0.5, out=block[:, k - 1 :])
        residuals[i] = float(residual(z[:, 0], v[:, 0], tops[i]))
    orthonormalize(candidates, starts, out, chosen)
    return top.new_tensor(residuals)


def turn(
    products: Sequence[Tensor],
    bases: Sequence[Tensor],
    others: Sequence[Tensor],
    starts: Sequence[Tensor],
    layout: TurnLayout,
    active: Tensor | None,
) -> tuple[Triplets, Tensor, Tensor]:
    count = len(products)
    images = [k - r - a for k, r, a in zip(*layout, strict=True)]
    candidates = [x.new_empty(len(x), k) for x, k in zip(products, layout.columns, strict=True)]
    triplets = Triplets(
        products[0].new_zeros(count, max(layout.columns)),
        [block[:, :p] for block, p in zip(candidates, images, strict=True)],
        [v.new_empty(len(v), k) for v, k in zip(bases, layout.columns, strict=True)],
    )
    blocks = [x[:, :k] for x, k in zip(products, layout.columns, strict=True)]
    old = [v[:, :k] for v, k in zip(bases, layout.columns, strict=True)]
    ritz_triplets(blocks, old, triplets, active)
    sigma = triplets.sigma[:, 0]
    valid = sigma.isfinite()
    if active is not None:
        valid &= active
    residuals = [0.0] * count
    chosen, out = live(valid, count), list(candidates)
    for i, top in enumerate(sigma.tolist()):
        if i not in chosen:
            continue
        x, other, block = products[i], others[i], candidates[i]
        k, r, a = layout.columns[i], layout.kept[i], layout.followers[i]
        p, scale = images[i], 1 / top if top > 0 else 1.0
        if r:
            y, u = x[:, :r], other[:, :r]
            y = y * scale
            torch.addcmul(y, u, (y * u).sum(0), value=-1, out=block[:, p : p + r])
            residuals[i] = float(torch.linalg.vector_norm(block[:, p]))
        else:
            residuals[i] = float(residual(x[:, 0], other[:, 0], 1 / scale))
        if a:
            torch.sub(x[:, k:], other[:, k:], out=block[:, k - a :]).mul_(scale)
        out[i] = other[:, :k]
        old[i].copy_(triplets.rights[i])
    orthonormalize(candidates, starts, out, chosen)
    return triplets, sigma.new_tensor(residuals), valid


def _grams(
    blocks: Sequence[Tensor] | dict[int, Tensor], chosen: Sequence[int]
) -> Iterator[tuple[list[int], Tensor, list[float]]]:
    """``(X_i / s_i)ᵀ (X_i / s_i)`` stacked, for indices of equal width; s is 1 unless squares were unsafe, and nan
    where the block is not finite (its Gram matrix is 0 then)."""
    by_width: dict[int, list[int]] = {}
    for i in chosen:
        by_width.setdefault(blocks[i].shape[1], []).append(i)
    for width, group in by_width.items():
        gram = blocks[group[0]].new_empty(len(group), width, width)
        for i, small in zip(group, gram.unbind(), strict=True):
            torch.mm(blocks[i].mT, blocks[i], out=small)
        scale = [1.0] * len(group)
        for j, longest in enumerate(gram.diagonal(dim1=1, dim2=2).amax(1).tolist()):
            if SAFE[0] <= longest <= SAFE[1]:
                continue
            block = blocks[group[j]]
            peak = float(block.abs().amax()) if block.numel() else 0.0
            if math.isfinite(peak) and peak > 0:
                scale[j] = peak
                block = block / peak
                torch.mm(block.mT, block, out=gram[j])
            else:
                gram[j] = 0
                scale[j] = 1.0 if peak == 0 else math.nan
        yield group, gram, scale


def _factors(gram: Tensor) -> tuple[Tensor, list[float]]:
    """``L⁻ᵀ`` of ``G = L Lᵀ``, and the smallest squared distance of a normalized column from those before it; nothing
    to go by where that is 0."""
    lower, info = torch.linalg.cholesky_ex(gram)
    width = gram.shape[1]
    eye = identity(width, gram.dtype, gram.device)
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
    distance = lower.diagonal(dim1=1, dim2=2).square() / gram.diagonal(dim1=1, dim2=2)
    least = torch.where(info == 0, distance.amin(1), 0.0)
    return inverse.mT, least.tolist()
