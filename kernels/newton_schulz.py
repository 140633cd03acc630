"""Functions of all singular values at once, by matrix products alone: the polar factor, and the cap ``min(σ, σ*)``.

Newton–Schulz iterations with odd polynomials of degree 5, each the best there is on the interval that the one before
has left (Amsel, Persson, Musco and Gower, The Polar Express, arXiv 2505.16932; Kovarik 1970, Björck and Bowie 1971).
Products are torch's own, cuBLAS' on a GPU, in full float32 whatever precision is allowed elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .backend import accumulation_dtype
from .passes.rounding import rounded_like
from .tables import constant
from .updates import frobenius_norms

SLACK = 1.01
"""A norm's upper bound over what rounding may make of it."""
FINE = {torch.float32: 2e-5, torch.float64: 1e-12}
"""How close to the cap, relative to it, a singular value may lie for the sign of the distance not to be known: what it
is off by after the cap is at most an eighth of this."""
TAME = 16.0
"""σ₁/σ* up to which one round of float32 meets the cap to 1e-5: its error is a few eps of σ₁."""
WILD = 1e3
"""σ₁/σ* that the first of two rounds allows for where the host does not look."""
MOST = 8
"""Rounds on the host, of which each lowers σ₁/σ* by three orders of magnitude or more."""
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

    With ``A = W/σ*``, its polar factor ``P = U Vᵀ`` and ``H = (PᵀA + AᵀP)/2 − I = V (Σ − I) Vᵀ``, the change is
    ``−σ* P relu(H)``, ``relu(H) = (H + H sign(H))/2``. So P is needed only where Σ > 1, and what is below the limit is
    not touched but by rounding.

    Float32 (and half precision, rounded once at the end): no singular value is above ``σ*(1 + 1e-5)``, and those below
    are unchanged to about ``2e-6 σ₁``; float64: 1e-11. On a device, where the host does not look, that holds as long as
    σ₁ ≤ 16 σ*, or 1000 σ* with ``wild``; beyond, a later cap finds the rest.

    Args:
        matrices: (m_b, n_b), any strides. One with a non-finite entry is left as it is, and a zero one.
        limits: ``σ*`` (B,), positive.
        active: bool (B,); the others are left as they are.
        wild: a second round on a device. On the CPU as many are made as it takes.
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
    fine = norms.isfinite() & (norms > 0) & active
    unit = torch.where(fine, norms, 1.0)
    a = torch.stack([matrix.to(norms.dtype) for matrix in tall]) / unit[:, None, None]
    ratio = unit / limits  # where the norm is not close to the limit, the cap is taken in units of the norm
    found = first = _norm_bound(a) * ratio
    on_host = limits.device.type == "cpu"
    for done in range(MOST if on_host else 1 + wild):
        live = fine & (first > 1)
        if on_host and not bool(live.any()):
            break
        width = float(torch.where(live, first, 1.0).max()) if on_host else (WILD if wild and done == 0 else 2 * TAME)
        change = _excess(a * ratio[:, None, None], torch.where(live, first, 1.0).clamp(min=1.0), width)
        a = torch.where(live[:, None, None], a - change / ratio[:, None, None], a)
        if on_host and width <= TAME:
            break
        first = _norm_bound(a) * ratio
    new = a * unit[:, None, None]
    moved = fine & (found > 1)
    for matrix, capped, write, seed in zip(tall, new, moved, seeds, strict=True):
        narrow = rounded_like(matrix, capped, seed, salt=4)
        matrix.copy_(torch.where(write & narrow.isfinite(), narrow, matrix))
    return torch.where(norms.isfinite(), found * limits, norms)


def _excess(a: Tensor, bound: Tensor, width: float) -> Tensor:
    """``P relu(V (Σ − I) Vᵀ)`` of a stack (B, m, n) whose norms are at most ``bound`` (B,), which is at most ``width``:
    what lies above 1."""
    scale = (bound * SLACK)[:, None, None]
    p = polar(a / scale, least=1 / (SLACK * width))
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    h = p.mT @ a
    h = 0.5 * (h + h.mT) - eye
    side = (bound - 1).clamp(min=1.0)[:, None, None] * SLACK
    sign = polar(h / side, least=FINE[a.dtype] / (SLACK * max(1.0, width - 1)), symmetric=True)
    relu = h @ sign
    return p @ (0.25 * (relu + relu.mT) + 0.5 * h)


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

    Each is the best approximation of 1 on the interval ``[1 − E, 1 + E]`` (scaled) that those before have left, and is
    widened a little, so that rounding does not lead out of where it is safe.
    """
    low, high = least, 1.0
    found = []
    close = 1e-14 if double else 1e-7
    error = 1.0
    while error > close:
        a, b, c, error = best_quintic(low, high)
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


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products in float32, though the user may allow TF32 or bfloat16 inside others."""
    backends: list[tuple[Any, str, Any]] = []
    for backend in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)):
        if hasattr(backend, "fp32_precision"):
            backends.append((backend, "fp32_precision", "ieee"))
        elif hasattr(backend, "allow_tf32"):
            backends.append((backend, "allow_tf32", False))
    before = [getattr(backend, name) for backend, name, _ in backends]
    try:
        for backend, name, value in backends:
            setattr(backend, name, value)
        yield
    finally:
        for (backend, name, _), value in zip(backends, before, strict=True):
            setattr(backend, name, value)


__all__ = ["cap_", "full_precision", "polar", "quintics"]
