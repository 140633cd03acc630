"""Upper bounds on the norm of convolutions as operators, that hold for sure.

An operator ``y[o, t] = Σ_{c,j} K[o, c, j] x[c, s t + d j − p]`` on all of ``ℓ²(Zⁿ)`` is, but for a permutation of its
inputs, one of stride and dilation 1: per dimension let ``g = gcd(s, d)``, ``s' = s/g``, ``d' = d/g``. Only positions of
one residue class modulo g are read. Taps j and j + s' read the same residue class modulo s' of those, ``d'`` outputs
apart, and d' is invertible modulo s', so that the ``s'`` classes of taps read different inputs. Hence with the *folded*
kernel

    K'[o, (c, ρ), μ] = K[o, c, ρ + s' μ],  ρ < s',  μ < m = ceil(k / s')
    y[o, t] = Σ K'[o, (c, ρ), μ] x_{c,ρ}[t + d' μ]

and for each t modulo d' that is a convolution of dilation 1. Zero padding restricts this operator to inputs and outputs
in a box, which makes no norm larger; other padding is the same after ``Pad``, ``‖Pad‖² = Π copies``. A transposed
convolution is the adjoint, of the same norm. Three bounds follow, of which the least is taken:

*flattened*: ``‖T‖ <= √(Π m) · ‖K' as (out·Π_{i∈R} m_i, in·s'·Π_{i∉R} m_i)‖`` for each set R of dimensions. For R empty
    each output is that matrix times the patch it reads, and a position is in at most ``Π m`` patches (fewer where the
    size is known and small). A dimension in R: the matrix gives each of its m taps' images by themselves, together no
    longer than its norm times what the other dimensions read; their sum over m taps is at most √m longer
    (Cauchy-Schwarz).
    Source: Singla and Feizi, "Fantastic Four", arXiv 1911.10258 (stride 1, circular).
*symbol*: ``‖T‖ <= sup_ω ‖F(ω)‖, F(ω) = Σ_μ K'[:, :, μ] e^{iω·μ}``: the Fourier transform makes T a multiplication by F.
    On a torus of L outputs that holds a bounded T as a part, the L-th roots of unity are all there are. Else the
    supremum is at most ``Π 1 / cos(π (m−1) / 2N)`` times the maximum over grids of N > m − 1 frequencies: for unit
    vectors a, b the real part of ``e^{iφ} aᴴF(ω)b e^{-iω(m−1)/2}`` is a bounded function of exponential type
    ``τ = (m−1)/2``, so near a maximum M at ω₀ at least ``M cos(τ (ω − ω₀))`` as long as ``|ω − ω₀| <= π/τ`` (M. Riesz;
    Duffin and Schaeffer, 1938), and some frequency of the grid is within π/N. Sources of the use: Sedghi, Gupta and
    Long, arXiv 1805.10408; Pfister and Bresler, arXiv 1802.09588.
*unrolled*: where it is small, the operator itself as a matrix, entry by entry.

Each norm on the right is bounded by :func:`specopt.certify.gram.largest_norm`; what is rounded before it is added.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import NamedTuple

import torch
from torch import Tensor

from .axes import NOTHING, Axis
from .gram import TOLERANCE, exponent_of, gamma, largest_norm, root, times, times_power, total, unscaled, up

BUDGET = 1e11
"""Floating point operations that a bound may cost; above it a coarser one is taken."""
UNROLLED_SIDE, UNROLLED_ENTRIES = 1536, 2**22
CHUNK = 2**22
"""Entries of the symbol that are held at a time."""
GRID_TOLERANCES = (1e-3, 4e-3, 1.6e-2, 6.4e-2, 0.25)
"""What a grid may add per dimension, the finest first."""
TWIDDLE = 2.0**-44
"""More than any cosine or sine of the grid is wrong by: angles below 2π, in some ulps of float64."""


class Bound(NamedTuple):
    """An upper bound, and how it was found."""

    value: float
    how: str


def operator_bound(weight: Tensor, axes: Sequence[Axis], groups: int = 1, tolerance: float = TOLERANCE) -> Bound:
    """A bound on the norm of a convolution, never below it.

    Args:
        weight: (out, in / groups, *kernel), float64; of a transposed convolution, as it is stored.
        axes: one for each dimension of the kernel.
        groups: as torch's.
        tolerance: of each Gram iteration; grids of frequencies may add some more, as ``how`` tells.
    """
    if weight.numel() == 0 or any(axis.size == 0 for axis in axes):
        return Bound(0.0, "empty")
    if not bool(weight.isfinite().all()):
        return Bound(math.inf, "non-finite entries")
    exponent = exponent_of(weight)
    kernel = times_power(weight, -exponent).reshape(groups, -1, *weight.shape[1:])
    bound = _least(kernel, axes, tolerance)
    return Bound(unscaled(bound.value, exponent), bound.how)


def _least(kernel: Tensor, axes: Sequence[Axis], tolerance: float) -> Bound:
    """Of a kernel (groups, out, in, *k) whose largest entry is near 1, so that no sum of squares leaves float64."""
    if _unrolls(kernel, axes):
        return _unrolled(kernel, axes, tolerance)
    folded = fold(kernel, axes)
    grids = _affordable(folded, axes)
    found = [_flattened(folded, axes, frozenset(), tolerance)]
    if grids is not None:
        found.append(_symbol(folded, axes, grids, tolerance))
    else:
        found += [_flattened(folded, axes, rows, tolerance) for rows in _affordable_rows(folded, axes)]
    return min(found, key=lambda bound: bound.value)


def fold(kernel: Tensor, axes: Sequence[Axis]) -> Tensor:
    """K' (groups, out, in·Π s', *m) of a kernel (groups, out, in, *k)."""
    for dim, axis in enumerate(axes, start=3):
        missing = axis.folds * axis.step - axis.kernel
        filler = kernel.new_zeros(*kernel.shape[:dim], missing, *kernel.shape[dim + 1 :])
        whole = torch.cat([kernel, filler], dim)
        whole = whole.reshape(*kernel.shape[:dim], axis.folds, axis.step, *kernel.shape[dim + 1 :])
        kernel = whole.movedim(dim + 1, 3).flatten(2, 3)
    return kernel


# --- flattened ------------------------------------------------------------------------------------------------------


def _affordable_rows(folded: Tensor, axes: Sequence[Axis]) -> list[frozenset[int]]:
    """Sets R but the empty one, whose matrices' products are within the budget."""
    several = [i for i, axis in enumerate(axes) if axis.folds > 1]
    sets = [frozenset(chosen) for size in range(len(several)) for chosen in combinations(several, size + 1)]
    return [rows for rows in sets if _cost(*_sides(folded, axes, rows)) * folded.shape[0] <= BUDGET]


def _sides(folded: Tensor, axes: Sequence[Axis], rows: frozenset[int]) -> tuple[int, int]:
    height = folded.shape[1] * math.prod(axes[i].folds for i in rows)
    return height, folded[0].numel() // height


def _cost(rows: int, columns: int) -> int:
    """Operations of a Gram iteration, near enough."""
    smaller, larger = sorted((rows, columns))
    return 2 * smaller**2 * (larger + 10 * smaller)


def _flattened(folded: Tensor, axes: Sequence[Axis], rows: frozenset[int], tolerance: float) -> Bound:
    """With the dimensions in ``rows`` on the side of the outputs."""
    order = [0, 1, *(3 + i for i in sorted(rows)), 2, *(3 + i for i in range(len(axes)) if i not in rows)]
    height, width = _sides(folded, axes, rows)
    matrices = folded.permute(order).reshape(folded.shape[0], height, width)
    counts = [axis.folds * axis.copies if i in rows else axis.most_reads for i, axis in enumerate(axes)]
    count = math.prod(counts)
    how = f"flattened {height}x{width}, times sqrt({count})"
    return Bound(times(largest_norm(matrices, tolerance), root(count)), how)


# --- symbol ---------------------------------------------------------------------------------------------------------


class Grid(NamedTuple):
    """Frequencies ``2π l / points`` of one dimension, and what their maximum is to be multiplied by."""

    points: int
    factor: float


def _affordable(folded: Tensor, axes: Sequence[Axis]) -> list[Grid] | None:
    """The finest grids within the budget."""
    groups, out, width = folded.shape[:3]
    smaller, larger = sorted((out, width))
    each = 8 * groups * smaller**2 * (larger + 4 * smaller)  # complex products: one with all, some with what is left
    for tolerance in GRID_TOLERANCES:
        grids = [_grid(axis, tolerance) for axis in axes]
        if each * math.prod(grid.points for grid in grids) / 2 <= BUDGET:
            return grids
    return None


def _grid(axis: Axis, tolerance: float) -> Grid:
    order = axis.folds - 1
    count = max(1, math.ceil(math.pi * order / 2 / math.acos(1 / (1 + tolerance))))
    if axis.torus is not None and axis.torus <= count:
        return Grid(axis.torus, 1.0)
    factor = 1 / math.cos(math.pi * order / (2 * count)) if order else 1.0
    return Grid(count, up(factor) if order else 1.0)


def _symbol(folded: Tensor, axes: Sequence[Axis], grids: Sequence[Grid], tolerance: float) -> Bound:
    groups, out, width = folded.shape[:3]
    taps = folded.flatten(3).permute(3, 0, 1, 2).reshape(-1, groups * out * width)
    largest = 0.0
    for cosines, sines in _waves(grids, folded.shape[3:], max(1, CHUNK // taps.shape[1]), folded.device):
        values = torch.complex(cosines @ taps, sines @ taps).reshape(-1, out, width)
        largest = max(largest, largest_norm(values, tolerance, floor=largest))
    # |error of F| <= (TWIDDLE + γ) Σ_μ |K'_μ|, and ‖Σ_μ |K'_μ|‖_F <= √(Π m) ‖K'‖_F
    count, norm = len(taps), float(torch.linalg.vector_norm(folded))
    error = times(TWIDDLE + 2 * gamma(count), root(count), norm, 1 + gamma(folded.numel() + 8))
    factors = [*(grid.factor for grid in grids), *(root(axis.copies) for axis in axes)]
    shape = "x".join(str(grid.points) for grid in grids)
    return Bound(times(total([largest, error]), *factors), f"symbol at {shape} frequencies")


def _waves(
    grids: Sequence[Grid], folds: Sequence[int], chunk: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cosines and sines (frequencies, Π m) of ``ω·μ``, at half of the frequencies: ``F(−ω)`` is the conjugate of
    ``F(ω)``."""
    counts = [grid.points for grid in grids]
    last = torch.arange(counts[-1] // 2 + 1, device=device)
    frequencies = torch.cartesian_prod(*(torch.arange(n, device=device) for n in counts[:-1]), last)
    taps = torch.cartesian_prod(*(torch.arange(m, device=device) for m in folds))
    frequencies, taps = frequencies.reshape(-1, len(counts)), taps.reshape(-1, len(counts))
    for part in torch.split(frequencies, chunk):
        turns = torch.zeros(len(part), len(taps), dtype=torch.float64, device=device)
        for i, count in enumerate(counts):
            turns += (part[:, i, None] * taps[:, i] % count).double() / count
        angles = 2 * math.pi * (turns % 1)
        yield angles.cos(), angles.sin()


# --- unrolled -------------------------------------------------------------------------------------------------------


def _unrolls(kernel: Tensor, axes: Sequence[Axis]) -> bool:
    if any(axis.size is None for axis in axes):
        return False
    groups, out, width = kernel.shape[:3]
    rows = out * math.prod(axis.outputs or 0 for axis in axes)
    columns = width * math.prod(axis.size or 0 for axis in axes)
    fits = min(rows, columns) <= UNROLLED_SIDE and groups * rows * columns <= UNROLLED_ENTRIES
    return fits and groups * _cost(rows, columns) <= BUDGET


def unrolled(kernel: Tensor, axes: Sequence[Axis]) -> Tensor:
    """The operator (groups, out·Π outputs, in·Π size) of a kernel (groups, out, in, *k)."""
    groups, out, width = kernel.shape[:3]
    sizes = [axis.size or 0 for axis in axes]
    outputs = math.prod(axis.outputs or 0 for axis in axes)
    matrix = kernel.new_zeros(outputs, math.prod(sizes), groups, out, width)
    places = torch.arange(outputs, device=kernel.device)
    taps = kernel.flatten(3).unbind(3)
    for tap, values in zip(product(*(range(axis.kernel) for axis in axes)), taps, strict=True):
        read = torch.zeros(1, dtype=torch.long)
        for axis, j in zip(axes, tap, strict=True):
            assert axis.size is not None
            next_one = axis.reads[:, j]
            lost = (read == NOTHING)[:, None] | (next_one == NOTHING)
            read = torch.where(lost, NOTHING, read[:, None] * axis.size + next_one).flatten()
        read = read.to(kernel.device)
        there = read != NOTHING
        matrix[places[there], read[there]] += values
    return matrix.permute(2, 3, 0, 4, 1).reshape(groups, out * outputs, -1)


def _unrolled(kernel: Tensor, axes: Sequence[Axis], tolerance: float) -> Bound:
    """Where padding shows an input several times, an entry is a sum of up to ``Π k`` taps: a row of errors is at most γ
    times the sum of its ``in·Π k`` taps' sizes, which is at most the root of their number times their norm."""
    value = largest_norm(unrolled(kernel, axes), tolerance)
    on = "x".join(str(axis.size) for axis in axes)
    if any(axis.mode != "zeros" for axis in axes):
        taps = math.prod(axis.kernel for axis in axes)
        longest = root(kernel.shape[2] * taps * math.prod(axis.outputs or 0 for axis in axes))
        norm = up(float(torch.linalg.vector_norm(kernel)) * (1 + gamma(kernel.numel() + 8)))
        value = total([value, times(gamma(taps), longest, norm)])
    return Bound(value, f"unrolled on {on}")
