"""The small dense part: batched k × k factors by Cholesky and matrix squarings, and Jacobi's method.

``torch.linalg.eigh`` and ``svd`` read an error code back from the device, which stalls the host; what is needed mostly
is less than an eigendecomposition: the first eigenvector sharply, the others well enough to sort directions by size.
Corrections of several triplets need these sharply too, and take an eigendecomposition of their few columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import backend_for
from . import reference

MAX_EIGEN = 64
WHOLE, BLOCK_SWEEPS = 32, 5
"""Columns of a matrix that one program rotates in registers; wider ones go by blocks of half of them."""

SWEEPS = 8
"""Of Jacobi's method: all pairs of columns, each in so many turns. It converges quadratically."""

SQUARINGS = 12
"""G^(2^12): a first direction only 0.1 % above the second in sigma is separated to 3e-4."""

ROUNDS = 2
"""Rounds of orthogonal iteration for the directions after the first; the basis is warm, they are nearly sorted."""


def cholesky_shift(width: int, dtype: torch.dtype) -> float:
    """How far a normalized Gram matrix is moved towards the identity so that its Cholesky factor exists."""
    return width * torch.finfo(dtype).eps


def dependence(width: int, dtype: torch.dtype) -> float:
    """Squared relative distance of a column from those before it under which it is rounding errors as likely as not."""
    return 8 * cholesky_shift(width, dtype)


def orthonormalizers(gram: Tensor, *, threshold: float | None = None) -> tuple[Tensor, Tensor]:
    """``T`` with ``(X T)ᵀ (X T) = I`` from ``G = XᵀX``: Cholesky-QR with the columns normalized first.

    A column that depends on those before it, or is zero, becomes a zero column of ``T``. One call leaves an error of
    about eps·cond², so blocks are passed twice.

    Args:
        gram: (B, K, K), symmetric, diagonal at most about 1e30 and at least 1 for the largest column.
        threshold: squared relative distance from the columns before under which a column counts as dependent; by
            default :func:`dependence`.

    Returns:
        ``T`` (B, K, K) upper triangular and ``dropped`` (B, K) bool.
    """
    shift = cholesky_shift(gram.shape[-1], gram.dtype)
    threshold = dependence(gram.shape[-1], gram.dtype) if threshold is None else threshold
    if backend_for(gram.device, gram.dtype) == "triton":
        from . import device

        return device.orthonormalizers(gram, shift, threshold)
    return reference.orthonormalizers(gram, shift, threshold)


def eigenvectors(symmetric: Tensor) -> Tensor:
    """``R`` (B, K, K), orthogonal, with ``RᵀSR`` diagonal and falling, of symmetric ``S`` (B, K, K), K <= 64.

    Jacobi's method with half of the pairs at a time; of more than 32 columns, of blocks of 16. Rounding leaves ``RᵀSR``
    off the diagonal at some hundred eps of the largest eigenvalue.
    """
    if symmetric.shape[-1] > MAX_EIGEN:
        raise ValueError(f"eigenvectors takes matrices of at most {MAX_EIGEN} columns, got {symmetric.shape[-1]}")
    turned = _jacobi(symmetric) if symmetric.shape[-1] <= WHOLE else _block_jacobi(symmetric)
    values = (turned * (symmetric @ turned)).sum(1)
    order = values.argsort(dim=1, descending=True, stable=True)
    return turned.gather(2, order[:, None, :].expand_as(turned))


def _jacobi(symmetric: Tensor) -> Tensor:
    if backend_for(symmetric.device, symmetric.dtype) == "triton":
        from . import device

        return device.jacobi(symmetric)
    return reference.jacobi(symmetric)


def _block_jacobi(symmetric: Tensor) -> Tensor:
    """Four blocks of 16 columns; in every round two pairs of blocks are made diagonal, three rounds meet all pairs."""
    count, width, half = len(symmetric), symmetric.shape[-1], WHOLE
    s = torch.nn.functional.pad(symmetric, (0, 2 * half - width) * 2)
    basis = torch.eye(2 * half, dtype=s.dtype, device=s.device).expand_as(s)
    for _ in range(3 * BLOCK_SWEEPS):
        pairs = torch.cat([s[:, :half, :half], s[:, half:, half:]])
        turned = _jacobi(0.5 * (pairs + pairs.mT))
        rotation = torch.zeros_like(s)
        rotation[:, :half, :half], rotation[:, half:, half:] = turned[:count], turned[count:]
        first, second, third, fourth = rotation.chunk(4, 2)
        rotation = torch.cat([first, third, fourth, second], 2)  # the next pairs of blocks
        s, basis = rotation.mT @ s @ rotation, basis @ rotation
    return basis[:, :width, :width]  # the blocks are in their places again, and what is beyond was rotated with none


def rotations(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Directions of ``G`` by size: ``Q`` (orthonormal or zero columns) and ``λ_i = q_iᵀ G q_i``.

    The first column is the top eigenvector, by :data:`SQUARINGS` normalized squarings of ``G`` (a vector of the
    cluster where eigenvalues coincide). The others start as the columns of the Householder reflection that maps ``e₁``
    to it, sorted by their Rayleigh quotients, and go through :data:`ROUNDS` rounds ``Q ← orth(G Q)``.

    Args:
        gram: (B, K, K), symmetric positive semidefinite.

    Returns:
        ``Q`` (B, K, K) and ``λ`` (B, K), zero columns where a direction has no weight left.
    """
    if backend_for(gram.device, gram.dtype) == "triton":
        from . import device

        return device.rotations(gram)
    return reference.rotations(gram)
