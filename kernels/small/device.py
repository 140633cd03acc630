"""The small dense part in Triton: one program holds one k × k matrix."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tables
from . import ROUNDS, SQUARINGS, SWEEPS, cholesky_shift
from .reference import TINY

WARPS = {16: 2, 32: 4, 64: 8}
"""For each padded size; sums along rows and columns of a 16 × 16 matrix stay inside one warp."""

STAGES = {16: [(True, ROUNDS)], 32: [(True, ROUNDS)], 64: [(True, 0), *[(False, 1)] * ROUNDS]}
"""``FRESH`` and ``ROUNDS`` of the launches that find rotations; at 64 the whole does not fit in registers."""

SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)
"""What is less has an inverse that may be infinite."""


@triton.jit
def inner_halves(a, b):
    """The left and right half of ``a`` (M, I), and the upper and lower half of ``b`` (I, N)."""
    left, right = tl.split(tl.permute(tl.reshape(a, (a.shape[0], 2, a.shape[1] // 2)), (0, 2, 1)))
    upper, lower = tl.split(tl.permute(tl.reshape(b, (2, b.shape[0] // 2, b.shape[1])), (1, 2, 0)))
    return left, upper, right, lower


@triton.jit
def product_of_halves(a, b):
    """``a b``, of an inner length of 32 at most."""
    if a.shape[1] <= 16:
        return tl.dot(a, b, input_precision="ieee")
    else:
        left, upper, right, lower = inner_halves(a, b)
        return tl.dot(left, upper, input_precision="ieee") + tl.dot(right, lower, input_precision="ieee")


@triton.jit
def square_product(a, b):
    """``a b``, of 64 columns at most. A dot holds its operands in registers over their whole inner length, so that is
    kept at 16. (A function that calls itself would never be hashed by Triton before 3.5.)"""
    if a.shape[1] <= 32:
        return product_of_halves(a, b)
    else:
        left, upper, right, lower = inner_halves(a, b)
        return product_of_halves(left, upper) + product_of_halves(right, lower)


@triton.jit
def load_square(pointer, width, K: tl.constexpr):
    """The matrix of this program, zero beyond ``width``."""
    index = tl.arange(0, K)
    inside = (index < width)[:, None] & (index < width)[None, :]
    base = pointer + tl.program_id(0).to(tl.int64) * width * width
    return tl.load(base + index[:, None] * width + index[None, :], inside, 0.0)


@triton.jit
def store_square(pointer, square, width, K: tl.constexpr):
    index = tl.arange(0, K)
    inside = (index < width)[:, None] & (index < width)[None, :]
    base = pointer + tl.program_id(0).to(tl.int64) * width * width
    tl.store(base + index[:, None] * width + index[None, :], square, inside)


@triton.jit
def diagonal_of(square, K: tl.constexpr):
    index = tl.arange(0, K)
    return tl.sum(tl.where(index[:, None] == index[None, :], square, 0.0), 1)


@triton.jit
def orthonormalizer(gram, width, shift, threshold, TINY: tl.constexpr, K: tl.constexpr):
    """``T = D L⁻ᵀ`` with ``L Lᵀ = D G D``, and which columns were dropped.

    Elimination on ``[A | I]``: with pivot ``p = A_jj``, ``l = A[:, j] / √p`` below it and ``e = E[j, :] / √p``,
    ``A ← A − l lᵀ`` and ``E ← E − l eᵀ``; at the end ``E = L⁻¹``. Both share one matrix: once column j is eliminated
    its place below the diagonal is free for that of ``E``. A dropped column is not eliminated, so that the rounding
    errors it consists of do not enter those after it.
    """
    index = tl.arange(0, K)
    row, column = index[:, None], index[None, :]
    norms = diagonal_of(gram, K)
    present = norms > TINY  # false for NaN
    inverse_norm = tl.where(present, 1 / tl.sqrt(tl.where(present, norms, 1.0)), 0.0)
    a = gram * inverse_norm[:, None] * inverse_norm[None, :]
    a = tl.where(present[:, None] & present[None, :], a, 0.0)
    a = (a + tl.where(row == column, shift, 0.0)) / (1 + shift)
    kept = tl.zeros((K,), tl.int32)
    tl.assume(width > 0)  # else the loop might not run, and what comes before is computed late, from spilled registers
    for j in range(width):
        pivot_row = tl.sum(tl.where(row == j, a, 0.0), 0)  # [K]: E[j, :j], the pivot, A[j, j + 1:]
        pivot_column = tl.sum(tl.where(column == j, a, 0.0), 1)  # [K]
        pivot = tl.sum(tl.where(index == j, pivot_row, 0.0), 0)
        large = pivot >= threshold
        reciprocal = tl.where(large, 1 / tl.sqrt(tl.maximum(pivot, shift)), 0.0)
        below = tl.where(index > j, pivot_column * reciprocal, 0.0)
        across = tl.where(index == j, 1.0, pivot_row) * reciprocal
        a = tl.where(column == j, 0.0, a) - below[:, None] * across[None, :]
        a = tl.where(row == j, across[None, :], a)
        kept = tl.where(index == j, large.to(tl.int32), kept)
    dropped = (kept == 0) | (norms <= TINY) | (norms != norms)
    factor = tl.trans(tl.where(column <= row, a, 0.0)) * inverse_norm[:, None]
    return tl.where(dropped[None, :], 0.0, factor), dropped


@triton.jit
def orthonormalizer_kernel(gram, factor, dropped, width, shift, threshold, TINY: tl.constexpr, K: tl.constexpr):
    result, gone = orthonormalizer(load_square(gram, width, K), width, shift, threshold, TINY, K)
    store_square(factor, result, width, K)
    index = tl.arange(0, K)
    tl.store(dropped + tl.program_id(0) * width + index, gone.to(tl.uint8), index < width)


@triton.jit
def top_direction(gram, SQUARINGS: tl.constexpr, SMALLEST: tl.constexpr, K: tl.constexpr):
    """The largest column of ``G^(2^SQUARINGS)``, normalized; ``e₁`` where it is zero or not finite. Trace of ``G``: 1.

    The trace is set back every third squaring: until then it falls to at least K^-7.
    """
    tl.static_assert(SQUARINGS % 3 == 0)
    index = tl.arange(0, K)
    power = gram
    for _ in tl.range(0, SQUARINGS // 3, loop_unroll_factor=1):
        power = square_product(power, power)
        power = square_product(power, power)
        power = square_product(power, power)
        power = power / tl.maximum(tl.sum(diagonal_of(power, K), 0), SMALLEST)
    diagonal = diagonal_of(power, K)
    best = tl.argmax(tl.where(diagonal > 0, diagonal, 0.0), 0)  # a NaN counts as nothing
    column = tl.sum(tl.where(index[None, :] == best, power, 0.0), 1)  # [K]
    norm = tl.sqrt(tl.sum(column * column, 0))
    return tl.where(norm > 0, column / tl.where(norm > 0, norm, 1.0), tl.where(index == 0, 1.0, 0.0))


@triton.jit
def reflection(direction, K: tl.constexpr):
    """The Householder matrix whose first column is ``direction``, up to sign."""
    index = tl.arange(0, K)
    first = tl.sum(tl.where(index == 0, direction, 0.0), 0)
    normal = tl.where(first > 0, direction, -direction)
    normal += tl.where(index == 0, 1.0, 0.0)  # |direction₁| + 1: no cancellation
    twice = 2 / tl.sum(normal * normal, 0)
    eye = tl.where(index[:, None] == index[None, :], 1.0, 0.0)
    return eye - (twice * normal)[:, None] * normal[None, :]


@triton.jit
def sorted_columns(basis, quotients, width, K: tl.constexpr):
    """The columns by falling quotient, the first one staying first and those beyond ``width`` last."""
    index = tl.arange(0, K)
    quotients = tl.where(index == 0, float("inf"), tl.where(index < width, quotients, -float("inf")))
    mine, other = quotients[:, None], quotients[None, :]
    ahead = (other > mine) | ((other == mine) & (index[None, :] < index[:, None]))
    place = tl.sum(ahead.to(tl.int32), 1)  # [K]
    permutation = tl.where(place[:, None] == index[None, :], 1.0, 0.0)
    return square_product(basis, permutation)


@triton.jit
def product_from(gram, trace, basis, width, K: tl.constexpr):
    """``G Q / trace``. ``G`` is loaded anew each time: kept, it would stay in registers as an operand of a dot."""
    return square_product(load_square(gram, width, K) / trace, basis)


@triton.jit
def rotation_kernel(
    gram,
    rotation,
    weight,
    width,
    shift,
    FRESH: tl.constexpr,
    SQUARINGS: tl.constexpr,
    ROUNDS: tl.constexpr,
    TINY: tl.constexpr,
    SMALLEST: tl.constexpr,
    K: tl.constexpr,
):
    """Top direction, its reflection, columns sorted, then rounds of ``Q ← orth(G Q)``; ``λ_i = q_iᵀ G q_i``.

    ``FRESH``: starts with the top direction, else goes on from the ``Q`` in memory.
    """
    trace = tl.maximum(tl.sum(diagonal_of(load_square(gram, width, K), K), 0), SMALLEST)
    if FRESH:
        basis = reflection(top_direction(load_square(gram, width, K) / trace, SQUARINGS, SMALLEST, K), K)
        quotients = tl.sum(basis * product_from(gram, trace, basis, width, K), 0)
        basis = sorted_columns(basis, quotients, width, K)
    else:
        basis = load_square(rotation, width, K)
    for _ in tl.range(0, ROUNDS, loop_unroll_factor=1):
        image = product_from(gram, trace, basis, width, K)
        peak = tl.max(tl.abs(image), 0)
        image = image / tl.where(peak > 0, peak, 1.0)[None, :]
        if K > 32:  # there is no room for it in registers beside the elimination
            store_square(rotation, image, width, K)
        factor, _dropped = orthonormalizer(square_product(tl.trans(image), image), width, shift, 8 * shift, TINY, K)
        if K > 32:
            tl.debug_barrier()
            image = load_square(rotation, width, K)
            tl.debug_barrier()
        basis = square_product(image, factor)
    store_square(rotation, basis, width, K)
    if ROUNDS > 0:
        quotients = tl.sum(basis * product_from(gram, trace, basis, width, K), 0)
        index = tl.arange(0, K)
        weights = tl.where(quotients < 0, 0.0, quotients) * trace  # a maximum would turn NaN into 0
        tl.store(weight + tl.program_id(0) * width + index, weights, index < width)


@triton.jit
def jacobi_kernel(
    symmetric, result, width, SWEEPS: tl.constexpr, EPS: tl.constexpr, TINY: tl.constexpr, K: tl.constexpr
):
    """See the reference. Columns beyond ``width`` are zero, and rotated with none. Ends after as many turns as a sweep
    has in which nothing was left to be rotated."""
    index = tl.arange(0, K)
    row, column = index[:, None], index[None, :]
    s = load_square(symmetric, width, K)
    basis = tl.where(row == column, 1.0, 0.0)
    least = EPS * tl.max(tl.abs(diagonal_of(s, K)), 0) + TINY
    turn, quiet = 0, 0
    while (turn < SWEEPS * (K - 1)) & (quiet < K - 1):
        alone = ((K // 2) * turn) % (K - 1)
        partner = (turn - index + SWEEPS * (K - 1) * (K - 1)) % (K - 1)
        partner = tl.where(index == alone, K - 1, tl.where(index == K - 1, alone, partner))
        swap = tl.where(partner[:, None] == column, 1.0, 0.0)
        own_rows = tl.sum(tl.where(row == column, s, 0.0), 1)  # [K] by rows, which reductions over them need
        own = tl.sum(tl.where(row == column, s, 0.0), 0)
        other = tl.sum(swap * own_rows[:, None], 0)
        across = tl.sum(swap * s, 0)
        tiny = tl.abs(across) <= least
        quiet = tl.where(tl.sum((~tiny).to(tl.int32), 0) > 0, 0, quiet + 1)
        ratio = (other - own) / tl.where(tiny, 1.0, 2 * across)
        ahead = tl.sum(tl.where((partner[:, None] == column) & (row > column), 1, 0), 0) > 0  # index < partner
        sign = tl.where((ratio > 0) | ((ratio == 0) & ahead), 1.0, -1.0)
        tangent = tl.where(tiny, 0.0, sign / (tl.abs(ratio) + tl.sqrt(1 + ratio * ratio)))
        cosine = 1 / tl.sqrt(1 + tangent * tangent)
        rotation = tl.where(row == column, cosine[None, :], 0.0) - swap * (tangent * cosine)[None, :]
        s = square_product(tl.trans(rotation), square_product(s, rotation))
        s = 0.5 * (s + tl.trans(s))  # exactly symmetric, or partners would be rotated by different angles
        turn += 1
        basis = square_product(basis, rotation)
    store_square(result, basis, width, K)


def jacobi(symmetric: Tensor) -> Tensor:
    symmetric = symmetric.contiguous()
    count, width, _ = symmetric.shape
    size = tables.padded(width)
    result = torch.empty_like(symmetric)
    with tables.on(symmetric.device):
        jacobi_kernel[(count,)](
            symmetric,
            result,
            width,
            SWEEPS=SWEEPS,
            EPS=torch.finfo(symmetric.dtype).eps,
            TINY=torch.finfo(symmetric.dtype).tiny,
            K=size,
            num_warps=WARPS[size],
            enable_fp_fusion=True,
        )
    return result


def orthonormalizers(gram: Tensor, shift: float, threshold: float) -> tuple[Tensor, Tensor]:
    gram = gram.contiguous()
    count, width, _ = gram.shape
    size = tables.padded(width)
    factor, dropped = torch.empty_like(gram), torch.empty(count, width, dtype=torch.uint8, device=gram.device)
    with tables.on(gram.device):
        orthonormalizer_kernel[(count,)](
            gram,
            factor,
            dropped,
            width,
            shift,
            threshold,
            TINY=TINY,
            K=size,
            num_warps=WARPS[size],
            enable_fp_fusion=True,
        )
    return factor, dropped.view(torch.bool)


def rotations(gram: Tensor) -> tuple[Tensor, Tensor]:
    gram = gram.contiguous()
    count, width, _ = gram.shape
    size = tables.padded(width)
    rotation, weight = torch.empty_like(gram), gram.new_empty(count, width)
    with tables.on(gram.device):
        for fresh, rounds in STAGES[size]:
            rotation_kernel[(count,)](
                gram,
                rotation,
                weight,
                width,
                cholesky_shift(width, gram.dtype),
                FRESH=fresh,
                SQUARINGS=SQUARINGS,
                ROUNDS=rounds,
                TINY=TINY,
                SMALLEST=torch.finfo(gram.dtype).tiny,
                K=size,
                num_warps=WARPS[size],
                enable_fp_fusion=True,
            )
    return rotation, weight
