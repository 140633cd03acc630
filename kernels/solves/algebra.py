"""The small matrices of a solve in Triton: Ritz triplets from a Gram matrix, and an orthonormal basis in two rounds.

The same mathematics as :mod:`specopt.kernels.subspace`, on records (:mod:`specopt.kernels.records`). Small matrices
wait in ``squares`` between uses, for few fit into registers beside a tile, and from one launch to the next.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import subspace, triplets
from ..products import MAX_COLUMNS
from ..small import ROUNDS, SQUARINGS
from ..small.device import (
    SMALLEST,
    diagonal_of,
    orthonormalizer,
    reflection,
    sorted_columns,
    square_product,
    top_direction,
)
from ..small.reference import TINY
from .rows import (
    ROWS,
    add_gram,
    add_mixed,
    fetch,
    gram_of,
    is_finite,
    leave_gram,
    mix,
    no_gram,
    park,
    rows_of,
    strip_rows,
    strips_of,
)

SLOTS = tl.constexpr(5)
"""Small matrices that a matrix has in ``squares``. The last holds vectors: see :func:`first_factor`."""

EPS = tl.constexpr(torch.finfo(torch.float32).eps)
ZERO_NORM = tl.constexpr(TINY)
POWER = tl.constexpr(SQUARINGS)
SWEEPS = tl.constexpr(ROUNDS)
REFILLED = tl.constexpr(triplets.REFILL_THRESHOLD)
VARIANTS = tl.constexpr(subspace.VARIANTS)
SHIFT = tl.constexpr(subspace.SHIFT)
NOISE_STEP = tl.constexpr(MAX_COLUMNS)


@triton.jit
def entry_of(vector, at, K: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, K) == at, vector, 0.0), 0)


# --- triplets ------------------------------------------------------------------------------------------------------
@triton.jit
def scaled_product(parked, trace, basis, K: tl.constexpr):
    """``G Q / trace``. ``G`` is loaded anew each time: kept, it would stay in registers as an operand of a dot."""
    return square_product(fetch(parked, K) / trace, basis)


@triton.jit
def rotate(gram, k, squares, K: tl.constexpr):
    """``Q`` and ``λ`` of :func:`specopt.kernels.rotations`."""
    park(squares, gram, K)
    tl.debug_barrier()
    parked, waiting = squares, squares + K * K
    trace = tl.maximum(tl.sum(diagonal_of(gram, K), 0), SMALLEST)
    basis = reflection(top_direction(fetch(parked, K) / trace, POWER, SMALLEST, K), K)
    quotients = tl.sum(basis * scaled_product(parked, trace, basis, K), 0)
    basis = sorted_columns(basis, quotients, k, K)
    shift = k * EPS
    for _ in tl.range(0, SWEEPS, loop_unroll_factor=1):
        image = scaled_product(parked, trace, basis, K)
        peak = tl.max(tl.abs(image), 0)
        image = image / tl.where(peak > 0, peak, 1.0)[None, :]
        if K > 32:  # there is no room for it in registers beside the elimination
            park(waiting, image, K)
        factor, _dropped = orthonormalizer(square_product(tl.trans(image), image), k, shift, 8 * shift, ZERO_NORM, K)
        if K > 32:
            tl.debug_barrier()
            image = fetch(waiting, K)
            tl.debug_barrier()
        basis = square_product(image, factor)
    quotients = tl.sum(basis * scaled_product(parked, trace, basis, K), 0)
    return basis, tl.where(quotients < 0, 0.0, quotients) * trace  # a maximum would turn NaN into 0


@triton.jit
def ritz_values(gram, peak, k, squares, K: tl.constexpr):
    """``Q``, ``θ`` and ``1/θ`` (0 where nothing is left) from ``G = YᵀY / s²``; θ is NaN where G is not finite."""
    poison = 0.0 * tl.sum(tl.sum(gram, 1), 0)
    scale = tl.where(peak == 0, 1.0, peak)
    basis, weight = rotate(gram, k, squares, K)
    root = tl.sqrt(weight)
    present = (root > 64 * EPS * entry_of(root, 0, K)) & (root * scale >= SMALLEST)
    inverse = tl.where(present, 1 / tl.where(present, root, 1.0), 0.0) / scale
    sigma = tl.where(present, root, 0.0) * scale + poison
    return basis, sigma, inverse


# --- bases: subspace.orthonormalize, by strips of rows -------------------------------------------------------------
@triton.jit
def first_factor(entry, n, k, squares, K: tl.constexpr):
    """From the Gram matrix of the candidates: what they are multiplied by, and which columns are filled anew."""
    gram, peak = gram_of(entry, strips_of(n, K), K)
    scale = tl.where(peak == 0, 1.0, peak)
    sound = is_finite(tl.sum(tl.sum(gram, 1), 0) + scale)
    shift = k * EPS
    factor, dropped = orthonormalizer(gram, k, shift, 8 * shift, ZERO_NORM, K)
    wide = tl.arange(0, K)
    park(squares, factor / scale, K)
    refill = tl.where(dropped & (wide < k), 1 / tl.sqrt(n.to(tl.float32)), 0.0)
    tl.store(squares + 4 * K * K + wide, refill)
    tl.store(squares + 4 * K * K + K, sound.to(tl.float32))


@triton.jit
def sound_basis(squares, K: tl.constexpr):
    """Whether the candidates were finite; else the basis stays as it is."""
    return tl.load(squares + 4 * K * K + K) != 0


@triton.jit
def first_round(entry, candidates, n, k, noise, variant, squares, index, count, K: tl.constexpr):
    """Candidates times the first factor, in their place, and what :func:`second_factor` is made of."""
    R: tl.constexpr = ROWS if K <= 32 else ROWS // 4
    row, wide = tl.arange(0, R), tl.arange(0, K)
    window = noise + (variant % VARIANTS) * (SHIFT * NOISE_STEP)  # the fixed random columns of this variant
    refill = tl.load(squares + 4 * K * K + wide)
    size = strip_rows(n, K)
    for strip in range(index, strips_of(n, K), count):
        start, stop = strip * size, tl.minimum(strip * size + size, n)
        gram, peak = no_gram(K)
        for first in range(start, stop, R):
            left = stop - first
            inside = (row < left)[:, None]
            origin = rows_of(candidates, first, K)
            random = rows_of(window, first, NOISE_STEP) + row[:, None] * NOISE_STEP + wide[None, :]
            total = tl.load(random, inside & (refill > 0)[None, :], 0.0) * refill[None, :]
            total = add_mixed(total, origin, K, row, left, k, squares, True, K, K)
            tl.debug_barrier()
            tl.store(origin + row[:, None] * K + wide[None, :], total, inside)
            gram, peak, _ratio, _x = add_gram(gram, peak, total)
        leave_gram(entry, strip, gram, peak, K)


@triton.jit
def second_factor(entry, n, k, squares, K: tl.constexpr):
    gram, peak = gram_of(entry, strips_of(n, K), K)
    factor, _dropped = orthonormalizer(gram, k, k * EPS, REFILLED, ZERO_NORM, K)
    park(squares + K * K, factor / tl.where(peak == 0, 1.0, peak), K)


@triton.jit
def orthonormalize(entry, candidates, n, k, noise, variant, out, out_step, squares, K: tl.constexpr):
    """All of it by one program, once the candidates' strips have left their Gram matrices."""
    first_factor(entry, n, k, squares, K)
    tl.debug_barrier()
    if sound_basis(squares, K):
        first_round(entry, candidates, n, k, noise, variant, squares, 0, 1, K)
        tl.debug_barrier()
        second_round(entry, candidates, n, k, out, out_step, squares, K)


@triton.jit
def second_round(entry, candidates, n, k, out, out_step, squares, K: tl.constexpr):
    """By one program, once the strips of the first round have left their Gram matrices."""
    second_factor(entry, n, k, squares, K)
    tl.debug_barrier()
    mix(candidates, K, squares + K * K, out, out_step, 0, n, k, True, K)
