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
    lower, info = torch.linalg.cholesky_ex(normalized)
    inverse = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    pivots = lower.diagonal(dim1=-2, dim2=-1).square()
    failed = (info != 0)[:, None]
    dropped = zero | (~failed & (pivots < threshold))
    factor = torch.where(failed[:, :, None], eye, inverse.mT) * inverse_norm[:, :, None]
    return torch.where(dropped[:, None, :], 0.0, factor), dropped


def rotations(gram: Tensor) -> tuple[Tensor, Tensor]:
    from . import ROUNDS, cholesky_shift

    shift = cholesky_shift(gram.shape[-1], gram.dtype)
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
        factor, _ = orthonormalizers(image.mT @ image, shift, 8 * shift)
        basis = image @ factor
    return basis, (basis * (gram @ basis)).sum(1).clamp_min(0) * trace[:, None]


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
