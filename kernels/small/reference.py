"""Torch reference of the small dense part: batched torch operations, none of which waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-30  # squared norm, relative to the block's largest entry, of a column that counts as zero


def orthonormalizers(gram: Tensor, shift: float, threshold: float) -> tuple[Tensor, Tensor]:
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    zero = ~(diagonal > TINY)
    inverse_norm = torch.where(zero, 0.0, diagonal.clamp_min(TINY).rsqrt())
    normalized = gram * inverse_norm[:, :, None] * inverse_norm[:, None, :]
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    normalized = (normalized + torch.diag_embed(zero.to(gram.dtype)) + shift * eye) / (1 + shift)
    lower, info, dropped = _eliminated(normalized, threshold)
    inverse = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    failed, dropped = (info != 0)[:, None], zero | dropped
    factor = torch.where(failed[:, :, None], eye, inverse.mT) * inverse_norm[:, :, None]
    return torch.where(dropped[:, None, :], 0.0, factor), dropped


def _eliminated(matrices: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Cholesky factors, error codes, and which columns have a pivot under the threshold, or one that is none. Such a
    column is left out, as the identity's, so that the rounding errors it consists of do not enter those after it.

    Another may have depended on it alone, so they are left out one by one. That takes as many factorizations; only
    where values may be looked at is it known whether there is one to make, and elsewhere they are left out together.
    """
    width, on_host = matrices.shape[-1], matrices.device.type == "cpu"
    index = torch.arange(width, device=matrices.device)
    diagonal = index[:, None] == index
    small = dropped = torch.zeros(matrices.shape[:-1], dtype=torch.bool, device=matrices.device)
    for _ in range(width + 1 if on_host else 2):
        dropped = dropped | (small & (small.cumsum(1) == 1) if on_host else small)
        apart = (dropped[:, :, None] | dropped[:, None, :]) & ~diagonal
        lower, info = torch.linalg.cholesky_ex(torch.where(apart, 0.0, matrices))
        order = torch.where(info == 0, width, info - 1)[:, None]  # of the column at which it failed
        small = (index <= order) & ((lower.diagonal(dim1=-2, dim2=-1).square() < threshold) | (index == order))
        if on_host and not bool(small.any()):
            break
    return lower, info, dropped


def rotations(gram: Tensor) -> tuple[Tensor, Tensor]:
    from . import ROUNDS, cholesky_shift, dependence

    width = gram.shape[-1]
    shift, threshold = cholesky_shift(width, gram.dtype), dependence(width, gram.dtype)
    trace = _trace(gram).clamp_min(torch.finfo(gram.dtype).tiny)
    gram = gram / trace[:, None, None]
    basis = _householder(_top_direction(gram))
    quotients = (basis * (gram @ basis)).sum(1)
    quotients[:, 0] = torch.inf
    order = quotients.argsort(dim=1, descending=True, stable=True)
    basis = basis.gather(2, order[:, None, :].expand_as(basis))
    for _ in range(ROUNDS):
        image = gram @ basis
        peak = image.abs().amax(1, keepdim=True)
        image = image / torch.where(peak > 0, peak, 1.0)
        factor, _ = orthonormalizers(image.mT @ image, shift, threshold)
        basis = image @ factor
    return basis, (basis * (gram @ basis)).sum(1).clamp_min(0) * trace[:, None]


def jacobi(symmetric: Tensor) -> Tensor:
    """In every turn each column has one partner: j of i where ``i + j ≡ turn`` modulo K − 1, the last column being the
    partner of what would be its own. With ``P`` for the swap of partners and c, s of each column's rotation (s of a
    column is −s of its partner) the turn is ``J = diag(c) − P diag(s)``."""
    from . import SWEEPS

    count = symmetric.shape[-1]
    width = max(2, count + count % 2)
    s = torch.nn.functional.pad(symmetric, (0, width - count, 0, width - count))
    index = torch.arange(width, device=s.device)
    basis = torch.eye(width, dtype=s.dtype, device=s.device).expand_as(s)
    limits = torch.finfo(s.dtype)
    least = limits.eps * s.diagonal(dim1=1, dim2=2).abs().amax(1, keepdim=True) + limits.tiny
    for turn in range(SWEEPS * (width - 1)):
        partner = (turn - index) % (width - 1)
        alone = ((width // 2) * turn) % (width - 1)  # half of the turn, in numbers modulo K - 1
        partner = torch.where(index == alone, width - 1, torch.where(index == width - 1, alone, partner))
        swap = (partner[:, None] == index).to(s.dtype)
        own = s.diagonal(dim1=1, dim2=2)
        cosine, sine = _rotation(own, own @ swap, (s * swap).sum(2), index < partner, least)
        rotation = torch.diag_embed(cosine) - swap * sine[:, None, :]
        s, basis = rotation.mT @ s @ rotation, basis @ rotation
        s = 0.5 * (s + s.mT)  # exactly symmetric, or partners would be rotated by different angles
    return basis[:, :count, :count]


def _rotation(own: Tensor, other: Tensor, across: Tensor, first: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """(c, s) of columns with ``own`` on the diagonal, ``other`` on their partners' and ``across`` between them; none
    where that is ``least`` or less."""
    tiny = across.abs() <= least  # every turn costs some orthogonality
    ratio = (other - own) / torch.where(tiny, 1.0, 2 * across)
    sign = torch.where((ratio > 0) | ((ratio == 0) & first), 1.0, -1.0)
    tangent = torch.where(tiny, 0.0, sign / (ratio.abs() + (1 + ratio.square()).sqrt()))
    cosine = (1 + tangent.square()).rsqrt()
    return cosine, tangent * cosine


def _trace(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1)


def _top_direction(gram: Tensor) -> Tensor:
    """The dominant eigenvector (B, K) of matrices of trace 1: the largest column of ``G^(2^SQUARINGS)``."""
    from . import SQUARINGS

    power = gram
    for i in range(SQUARINGS):
        power = power @ power
        if i % 3 == 2 or i == SQUARINGS - 1:  # a trace of 1 falls to at least K^-7 in three squarings
            power = power / _trace(power).clamp_min(torch.finfo(gram.dtype).tiny)[:, None, None]
    best = power.diagonal(dim1=-2, dim2=-1).argmax(1)
    column = power.gather(2, best[:, None, None].expand(-1, power.shape[1], 1)).squeeze(2)
    norm = torch.linalg.vector_norm(column, dim=1, keepdim=True)
    first = torch.zeros_like(column)
    first[:, 0] = 1
    return torch.where(norm > 0, column / norm.clamp_min(torch.finfo(gram.dtype).tiny), first)


def _householder(direction: Tensor) -> Tensor:
    """The orthogonal matrix (B, K, K) whose first column is ``direction``, up to sign."""
    positive = direction[:, :1] > 0
    normal = torch.where(positive, direction, -direction)
    normal[:, 0] = normal[:, 0] + 1  # |direction₁| + 1: no cancellation
    normal = normal / torch.linalg.vector_norm(normal, dim=1, keepdim=True)
    reflection: Tensor = -2 * normal[:, :, None] * normal[:, None, :]
    reflection.diagonal(dim1=-2, dim2=-1).add_(1)
    return reflection
