"""What follows the largest singular triplet of convolutions from step to step.

The spectrum of a convolution is a sampled curve: near its maximum the singular values lie ever closer, in pairs (the
sine and the cosine of a frequency) and more, so power iteration creeps; a :func:`~specopt.operators.pair.pair` is
therefore a step of LOBPCG. With j = 4 and 12 columns it costs 16 convolutions of one feature map. On 3 × 3 to 7 × 7
kernels, default and orthogonal, of 8 to 64 channels, from random vectors: σ₁ to 1e-3 after 6 to 21 pairs; subspace
iteration of the same cost takes 10 to over 60. While the kernel moves by 2 % of its norm in a step, one pair a step
leaves 2e-4 at the median and 9e-4 at worst; subspace iteration 6e-4 and 4e-3.

Frequencies hardly mix, so a basis that stands on one peak of the spectrum does not see another peak overtake it, and
its residual says nothing. So a search goes on beside it: the same with j = 2 and 6 columns, two pairs a step, from
other random vectors every :data:`PERIOD` steps. Its best vector is taken into the basis. In training with Adam at 1e-3
σ₁ is then right to 1e-4 in every step. Where peaks change places faster than a search takes (at 1e-2 a kernel is
another after 40 steps) it is too low by the difference until the search has found the other one: by 1e-5 at the median,
by up to 3e-2 in single steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specopt import kernels

from .conv import ConvOperator
from .pair import Ritz, maps_of, pair, randomize

IMAGES, COLUMNS = 4, 12
SEARCH_IMAGES, SEARCH_COLUMNS = 2, 6
SEARCH_PAIRS = 2
PERIOD = 6
"""Steps after which the search begins anew."""
VARIANTS = 33
"""Between the random columns of one step and those of the next: odd, so that all windows of the noise come."""


class Effort(NamedTuple):
    """How many pairs of products a step makes.

    On the CPU at least ``least``, then until the residual is at most ``residual`` and the last pair has moved sigma₁ by
    no more than ``growth`` of it, or by no more than ``stall`` whatever the residual, but ``most`` in all. Elsewhere
    that would have to wait for the device: always ``fixed`` pairs, of which the kernel's shape and the step's count are
    all that may decide.
    """

    least: int
    most: int
    fixed: int
    residual: float
    growth: float
    stall: float = 0.0

    def is_done(self, made: int, residual: float, moved: float) -> bool:
        """After ``made`` pairs, the last of which has moved sigma₁ by that part of it (nan if it was the first)."""
        settled = residual <= self.residual and (self.growth == math.inf or moved <= self.growth)
        return made >= self.least and (settled or moved <= self.stall)


START = Effort(least=6, most=96, fixed=40, residual=0.01, growth=2e-5)
"""From random vectors."""
COLD = Effort(least=2, most=24, fixed=4, residual=0.01, growth=1e-4, stall=1e-5)
"""In the first steps, while a learning rate warms up and kernels move fast."""
WARM = Effort(least=1, most=6, fixed=2, residual=0.005, growth=math.inf, stall=2e-4)
"""In a flat spectrum (kernel as long as stride, orthogonal) a residual of 0.02 hides an error of 5e-3, one of 0.005 of
6e-4."""


class Found(NamedTuple):
    """The largest singular triplet of B operators; ``A v = σ u`` to rounding."""

    sigma: Tensor
    """(B,); never above the operator norm but for rounding. Non-finite where the kernel is."""
    residual: Tensor
    """``‖Aᵀu − σv‖ / σ`` (B,): some singular value lies within so much of ``σ``. Of the groups of channels that may
    have the largest one, the worst."""
    lefts: list[Tensor]
    """(1, out, *output_size), of unit norm; zero where sigma is."""
    rights: list[Tensor]
    """(1, in, *size)."""
    pairs: Tensor
    """Pairs of products made (B,), without those of the search."""


def columns_of(operator: ConvOperator) -> int:
    """The columns of an operator's block: of its basis and of its search, or all there are where those are few."""
    rows = _rows(operator)
    return rows if rows <= COLUMNS else COLUMNS + SEARCH_COLUMNS


def start(operators: Sequence[ConvOperator]) -> list[Tensor]:
    """Blocks (n, k) of n = channels · pixels, from fixed random vectors."""
    blocks = [o.kernel.new_empty(math.prod(o.input_shape), columns_of(o)) for o in operators]
    for o, block in zip(operators, blocks, strict=True):
        randomize([o], [_basis(block)], 0)
        if not _is_whole(o):
            randomize([o], [_search(block)], 1)
    return blocks


def follow(operators: Sequence[ConvOperator], blocks: Sequence[Tensor], effort: Effort, step: int = 0) -> Found:
    """The triplets of operators of one device and dtype, and their ``blocks`` moved on in place.

    The block of a group of channels that is not finite stays as it is.

    Args:
        operators: as they are now.
        blocks: from :func:`start`, or of an earlier step.
        effort: see :class:`Effort`.
        step: how many there were before.
    """
    hints = _hints(operators, blocks, step)
    bases = [_basis(block) for block in blocks]
    if kernels.on_host(blocks[0]):
        found = [_until(*each, effort, step) for each in zip(operators, bases, hints, strict=True)]
    else:
        for made in range(effort.fixed):
            last = pair(operators, bases, IMAGES, VARIANTS * step + made, hints)
        found = [_largest(o, ritz, effort.fixed) for o, ritz in zip(operators, last, strict=True)]
    sigma, residual, lefts, rights, pairs = zip(*found, strict=True)
    return Found(torch.stack(sigma), torch.stack(residual), list(lefts), list(rights), torch.stack(pairs))


class _One(NamedTuple):
    """A row of :class:`Found`."""

    sigma: Tensor
    residual: Tensor
    left: Tensor
    right: Tensor
    pairs: Tensor


def _until(operator: ConvOperator, basis: Tensor, hint: Tensor | None, effort: Effort, step: int) -> _One:
    """One operator on the CPU, where what is measured may decide."""
    before = math.nan
    for made in range(1, effort.most + 1):
        (ritz,) = pair([operator], [basis], IMAGES, VARIANTS * step + made, [hint])
        found = _largest(operator, ritz, made)
        sigma, residual = float(found.sigma), float(found.residual)
        if _is_whole(operator) or not math.isfinite(sigma) or sigma == 0:
            break
        if effort.is_done(made, residual, abs(sigma - before) / sigma):
            break
        before = sigma
    return found


def _hints(operators: Sequence[ConvOperator], blocks: Sequence[Tensor], step: int) -> list[Tensor | None]:
    """The best vector (n, 1) of the search of each, after more pairs; None where a basis is all there is."""
    hints: list[Tensor | None] = [None] * len(operators)
    searching = [i for i, o in enumerate(operators) if not _is_whole(o)]
    if not searching:
        return hints
    chosen, searches = [operators[i] for i in searching], [_search(blocks[i]) for i in searching]
    variant = VARIANTS * step - 1
    if step % PERIOD == 0:
        randomize(chosen, searches, variant)
    for made in range(SEARCH_PAIRS):
        found = pair(chosen, searches, SEARCH_IMAGES, variant - made)
    for i, ritz in zip(searching, found, strict=True):
        hints[i] = ritz.right[:, :1]
    return hints


def _largest(operator: ConvOperator, ritz: Ritz, pairs: int) -> _One:
    """The triplet of the group with the largest singular value; in the others' channels its vectors are 0."""
    sigma = ritz.sigma.amax()
    may_be_largest = ritz.sigma * (1 + ritz.residual) >= sigma
    chosen = (torch.arange(len(ritz.sigma), device=sigma.device) == ritz.sigma.argmax()).to(sigma.dtype)
    left, right = (_of_group(vectors[:, :1], chosen) for vectors in (ritz.left, ritz.right))
    return _One(
        sigma,
        torch.where(may_be_largest, ritz.residual, 0.0).amax(),
        maps_of(left, operator.output_shape),
        maps_of(right, operator.input_shape),
        sigma.new_full((), pairs),
    )


def _of_group(vector: Tensor, chosen: Tensor) -> Tensor:
    """A column, zero but in the rows of the group that ``chosen`` (G,) marks with a 1."""
    return (vector.view(len(chosen), -1) * chosen[:, None]).view(vector.shape) if len(chosen) > 1 else vector


def _rows(operator: ConvOperator) -> int:
    """Of a group's basis."""
    return math.prod(operator.input_shape) // operator.geometry.groups


def _is_whole(operator: ConvOperator) -> bool:
    """The basis spans all there is: one product gives the exact triplet."""
    return _rows(operator) <= COLUMNS


def _basis(block: Tensor) -> Tensor:
    return block[:, :COLUMNS]


def _search(block: Tensor) -> Tensor:
    return block[:, COLUMNS:]
