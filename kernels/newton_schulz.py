"""Functions of all singular values at once, by matrix products alone: above all the cap ``min(σ, σ*)``.

Newton–Schulz iterations with odd polynomials of degree 5, each the best there is on the interval that the one before
has left (Amsel, Persson, Musco and Gower, The Polar Express, arXiv 2505.16932; Kovarik 1970, Björck and Bowie 1971).
Products are torch's own, cuBLAS' on a GPU, in full float32 whatever precision is allowed elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .backend import accumulation_dtype, full_precision
from .passes.rounding import rounded_like
from .tables import constant
from .updates import frobenius_norms

SLACK = 1.01
"""A norm's upper bound over what rounding may make of it."""
FINE = {torch.float32: 2e-5, torch.float64: 1e-12}
"""How close to the cap, relative to it, a singular value may lie for the side that it is on not to be known. After the
cap it is off by less than half of this."""
TAME = {torch.float32: 4.0, torch.float64: 1e2}
"""Bound on σ₁/σ* up to which a round meets the cap in this precision: it squares singular values, and what is 1 after
that is off by a few eps of the largest."""
FAR = {torch.float32: 32.0, torch.float64: 1e4}
"""Bound on σ₁/σ* from which a round caps at that part of σ₁ only, lest rounding makes squares negative."""
MOST = 16
"""Rounds on the host, for any number of float64."""
CUSHION = 0.1
"""Smallest over largest number that one step of an iteration is made for."""
LEAST = -40
"""Exponent of the smallest number that an iteration is asked to take to 1."""
STACKED = 1 << 24
"""Entries of a stack of equal shapes that are multiplied at once."""


def cap_(
    matrices: Sequence[Tensor],
    limits: Tensor,
    *,
    active: Tensor | None = None,
    wild: bool = True,
    seeds: Sequence[float] | None = None,
) -> Tensor:
    """Every singular value above its limit is lowered to it, in place: ``W_b = U Σ Vᵀ ← U min(Σ, σ*_b) Vᵀ``.

    With ``A = W/σ*`` (its smaller side as columns) and ``G = AᵀA``: ``S = sign(G − I)``, ``M = I + relu(G − I)`` with
    ``relu(H) = (H + H S)/2``, and ``W ← W + W (M^(−1/2) − I) (I + S)/2``. So what is below the limit is not touched but
    by rounding, and a singular value so close to the limit that its sign is not found is so close that it does not
    matter.

    Float32 (and half precision, rounded once at the end): no singular value is above ``σ*(1 + 1e-5)``, and those below
    are unchanged to ``1e-5 σ*``; float64: 1e-11. Where σ₁ is far above the limit float32 goes by float64. On a device
    the host does not look: float32 meets the limit as long as σ₁ ≤ 4 σ*, to a few eps of ``(σ₁/σ*)²`` up to 32 σ*, and
    float64, which it takes with ``wild``, up to 10⁴ σ*; beyond, later caps do.

    Args:
        matrices: (m_b, n_b), any strides. One with a non-finite entry is left as it is, and a zero one.
        limits: ``σ*`` (B,), positive; a matrix without one (nan) is left as it is.
        active: bool (B,); the others are left as they are.
        wild: in float64 on a device, as for weights that were never capped.
        seeds: of stochastic rounding of half-precision matrices; 0: to nearest, as all are if absent.

    Returns:
        (B,) an upper bound of each σ₁ as found, within ``n^(1/16)`` of it; not finite where an entry is not.
    """
    bounds = torch.empty_like(limits)
    on = torch.ones_like(limits, dtype=torch.bool) if active is None else active
    with full_precision():
        for chosen in _stacks(matrices):
            index = constant([float(i) for i in chosen], limits.dtype, limits.device).long()
            chances = [seeds[i] for i in chosen] if seeds else [0.0] * len(chosen)
            bounds[index] = _cap_stack([matrices[i] for i in chosen], limits[index], on[index], wild, chances)
    return bounds


def _cap_stack(
    matrices: Sequence[Tensor], limits: Tensor, active: Tensor, wild: bool, seeds: Sequence[float]
) -> Tensor:
    """:func:`cap_` of matrices of one shape, or of one and its transpose."""
    tall = [matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT for matrix in matrices]
    norms = frobenius_norms(matrices)
    limits = limits.to(norms)
    fine = norms.isfinite() & (norms > 0) & (limits > 0) & active
    limits = torch.where(fine, limits, 1.0)
    unit = torch.where(fine, norms, 1.0).log2().floor().exp2()  # a power of two, by which nothing is rounded
    a = torch.stack([matrix.to(norms.dtype) for matrix in tall]) / unit[:, None, None]
    ratio = unit / limits  # a is in units of the Frobenius norm: 1e30 and its square are no numbers of float32
    found = bound = _norm_bound(a) * ratio
    looks = _looks(limits)
    for _ in range(MOST if looks else 1):
        live = fine & (bound > 1)
        if looks and not bool(live.any()):
            break
        far = float(torch.where(live, bound, 1.0).max()) > TAME[a.dtype] if looks else wild
        part = a.double() if far else a  # and from then on: what is far above the limit would take digits from the rest
        width = torch.where(live, bound, 1.0).to(part.dtype)
        level = (width / FAR[part.dtype]).clamp(min=1.0)  # what this round caps at, over the limit
        scaled = part * (ratio.to(part.dtype) / level)[:, None, None]
        most = float((width / level).max()) if looks else FAR[part.dtype]
        capped = part + part @ _shrinking(scaled, width / level, most)
        a = torch.where(live[:, None, None], capped, part)
        if not looks or float(width.max()) <= TAME[part.dtype]:
            break
        bound = (_norm_bound(a) * ratio).to(bound.dtype)
    moved = fine & (found > 1)
    new = (a * unit.to(a.dtype)[:, None, None]).to(norms.dtype)
    for matrix, capped, write, seed in zip(tall, new, moved, seeds, strict=True):
        narrow = rounded_like(matrix, capped, seed, salt=4)
        matrix.copy_(torch.where(write & narrow.isfinite(), narrow, matrix))
    return torch.where(norms.isfinite(), found * limits, norms)


def _looks(like: Tensor) -> bool:
    """Whether the host may wait for a value."""
    return like.device.type == "cpu"


def _shrinking(a: Tensor, bound: Tensor, most: float) -> Tensor:
    """``V (1/max(Σ, 1) − 1) Vᵀ`` of a stack (B, m, n) of norms up to ``bound`` (B,), which is up to ``most``."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    h = a.mT @ a - eye
    side = (bound.square() - 1).clamp(min=1.0)[:, None, None] * SLACK
    sign = polar(h / side, least=2 * FINE[a.dtype] / (SLACK * max(1.0, most**2 - 1)), symmetric=True)
    above = h @ sign
    above = 0.25 * (above + above.mT) + 0.5 * h
    root = inverse_root(eye + above, bound.square() * SLACK, least=1 / (SLACK * most))
    return 0.5 * ((root - eye) @ (eye + sign))


def inverse_root(m: Tensor, bound: Tensor, *, least: float) -> Tensor:
    """``M^(−1/2)`` of symmetric matrices (B, n, n) whose eigenvalues lie between ``least²`` and 1 times ``bound`` (B,).

    Coupled iterations ``Y ← Y q(Z Y)``, ``Z ← q(Z Y) Z``, where ``x q(x²)`` takes the square roots to 1 (Higham, Stable
    iterations for the matrix square root, 1997).
    """
    y = m / bound[:, None, None]
    eye = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
    z = eye.expand_as(m)
    for a, b, c in quintics(_rounded_down(least), m.dtype == torch.float64):
        square = z @ y
        step = a * eye + b * square + c * (square @ square)
        y, z = y @ step, step @ z
    return 0.5 * (z + z.mT) / bound.sqrt()[:, None, None]


def polar(x: Tensor, *, least: float, symmetric: bool = False) -> Tensor:
    """``U Vᵀ`` of each ``U Σ Vᵀ`` in a stack (B, m, n), m >= n, whose singular values are at most 1.

    Those from ``least`` up become 1 to rounding, smaller ones something between themselves and 1, in their order; zeros
    stay. For symmetric matrices it is the sign: ``V sign(Λ) Vᵀ``.
    """
    for a, b, c in quintics(_rounded_down(least), x.dtype == torch.float64):
        gram = x @ x if symmetric else x.mT @ x
        x = a * x + x @ (b * gram + c * (gram @ gram))
        if symmetric:
            x = 0.5 * (x + x.mT)
    return x


def _rounded_down(value: float) -> float:
    """To a power of two, so that few sequences are ever made, and none that rounding would not let be followed."""
    return float(2.0 ** max(math.floor(math.log2(value)), LEAST))


@cache
def quintics(least: float, double: bool = False) -> tuple[tuple[float, float, float], ...]:
    """Odd polynomials ``a x + b x³ + c x⁵`` whose composition takes ``[least, 1]`` to 1 within rounding.

    Each is the best approximation of 1 on the interval ``[1 − E, 1 + E]`` (scaled) that those before have left, widened
    a little, so that rounding does not lead out of where it is safe; but never on one that spans more than
    :data:`CUSHION`. The best would take what is large down to almost 0 for the sake of what is tiny, and its rounding
    errors up again with that.
    """
    low, high = least, 1.0
    found = []
    close = 1e-14 if double else 1e-7
    error = 1.0
    while error > close:
        a, b, c, error = best_quintic(max(low, CUSHION * high), high)
        found.append((a, b, c))
        low, high = a * low + b * low**3 + c * low**5, (1 + error) * (1 + 4 * close)
    return tuple(found)


def best_quintic(low: float, high: float) -> tuple[float, float, float, float]:
    """``(a, b, c, E)`` with the least ``E = max |a x + b x³ + c x⁵ − 1|`` on ``[low, high]``: Remez' exchange, the
    error having its four extremes at the ends and at the two zeros of the derivative."""
    if high - low < 1e-3:  # to all digits the Taylor polynomial about the middle, where the exchange is ill-conditioned
        middle = (low + high) / 2
        a, b, c = 15 / 8 / middle, -10 / 8 / middle**3, 3 / 8 / middle**5
        error = max(abs(a * x + b * x**3 + c * x**5 - 1) for x in (low, high))
        return a, b, c, error
    inner = np.array([(3 * low + high) / 4, (low + 3 * high) / 4])
    for _ in range(100):
        points = np.array([low, *inner, high])
        signs = np.array([1.0, -1.0, 1.0, -1.0])
        system = np.stack([points, points**3, points**5, signs], 1)
        a, b, c, error = np.linalg.solve(system, np.ones(4))
        root = math.sqrt(max((3 * b) ** 2 - 20 * a * c, 0.0))
        new = np.sqrt(np.array([(-3 * b - root) / (10 * c), (-3 * b + root) / (10 * c)]))
        done = bool(np.allclose(new, inner, rtol=1e-12, atol=0))
        inner = new
        if done:
            break
    return float(a), float(b), float(c), abs(float(error))


def _norm_bound(a: Tensor) -> Tensor:
    """``‖A‖₂ ≤ ‖(AᵀA)⁴‖_F^(1/8)`` (B,), within ``n^(1/16)``; of stacks with Frobenius norms of at most about 1."""
    gram = a.mT @ a
    scale = torch.linalg.matrix_norm(gram)
    scale = torch.where(scale > 0, scale, 1.0)
    gram = gram / scale[:, None, None]
    square = gram @ gram
    fourth = square @ square
    bound: Tensor = (torch.linalg.matrix_norm(fourth).sqrt().sqrt() * scale).sqrt() * (1 + 1e-4)
    return bound


def _stacks(matrices: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices of matrices of one shape, dtype and device, in lists that are not too large to be stacked."""
    by_shape: dict[Any, list[int]] = {}
    for i, matrix in enumerate(matrices):
        if matrix.numel():
            key = (max(matrix.shape), min(matrix.shape), accumulation_dtype(matrix.dtype), matrix.device)
            by_shape.setdefault(key, []).append(i)
    for (rows, columns, *_), members in by_shape.items():
        size = max(1, STACKED // (rows * columns))
        yield from (members[at : at + size] for at in range(0, len(members), size))


__all__ = ["cap_", "inverse_root", "polar", "quintics"]
