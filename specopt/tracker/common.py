"""What both trackers share: the state of a matrix, the schedule of pairs, and peeking at the device without waiting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from specopt import kernels
from specopt.kernels import Triplets, accumulation_dtype, start_block

from ..views import Matrix, scaling

COLD_STEPS = 20
"""A residual is no proof in a flat spectrum: from scaled orthogonal init one pair leaves residual 0.05 with sigma 11 %
wrong. So the first steps make more pairs, and stop only when sigma stands still as well."""
COLD_MIN, COLD_MAX = 6, 16
COLD_STOP = 0.25
"""The residual that ends a cold step, in tolerances: a direction is wrong by residual / gap, and gaps are small."""
WARM_MAX = 2
LOST = 0.1
"""A last residual above this gives a step the cold phase's number of pairs on the CPU. On a device it makes the one
conditional pair in each step until it is found again: what is enqueued there must not depend on what is measured."""
JUMP = 10
"""So many tolerances between sigma and what the last step left call for the conditional pair: an update out of scale
(a spike of the learning rate) shows there one step before it shows in a residual."""

PREFIX = "spectral_"
BLOCK, PROBE, LEFT, RIGHT, STATS, STEP, WAIT = (
    PREFIX + name for name in ("block", "probe", "left", "right", "stats", "step", "wait")
)


class Stat(IntEnum):
    """Entries of the state tensor ``spectral_stats``. Steps are those in which a rule looks at the weight."""

    SIGMA = 0
    """sigma₁ as last measured: before the correction, if one was made."""
    RESIDUAL = 1
    TOP = 2
    """The largest Ritz value after the correction: what the next step expects to find."""
    VALID = 3
    """1 where the last step's triplet was finite and could be applied."""
    CAPPED = 4
    """1 while a matrix that was all zero at the start has not reached its target by itself."""
    PAIRS = 5
    """Pairs of products made in the last step; a lone half product counts a half."""
    COUNT = 6
    """Steps made, as ``spectral_step`` on the host; what the device goes by, which a replayed graph moves on."""


def fits(state: Mapping[str, Any], key: str, shape: tuple[int, ...], matrix: Matrix) -> bool:
    """Whether a state tensor is there, and of the shape, dtype and device that the weight has now."""
    value, param = state.get(key), matrix.param
    if not isinstance(value, Tensor):
        return False
    return (value.shape, value.dtype, value.device) == (shape, accumulation_dtype(param.dtype), param.device)


def has_stats(matrix: Matrix) -> bool:
    return STEP in matrix.state and fits(matrix.state, STATS, (len(Stat),), matrix)


def restart(matrix: Matrix, norm: Tensor | None = None) -> None:
    """Stats and step count of a matrix that has no block, or none that fits any more. What is told of its beginning,
    that it was zero (``norm``), outlives a restart."""
    stats = torch.zeros(len(Stat), dtype=accumulation_dtype(matrix.param.dtype), device=matrix.param.device)
    old = matrix.state.get(STATS)
    if old is not None and old.shape[-1:] == stats.shape:
        stats.copy_(old.reshape(-1, len(Stat)).amax(0))  # of several matrices where the view was another
    if norm is not None:
        stats[Stat.CAPPED] = torch.maximum(stats[Stat.CAPPED], (norm == 0).to(stats.dtype))
    stats[Stat.RESIDUAL] = torch.inf
    stats[Stat.COUNT] = 0
    matrix.state[STATS], matrix.state[STEP] = stats, 0


def count_step(matrices: Sequence[Matrix], stats: Tensor) -> None:
    """Stats (B, 7) of a step that was made, into the states of its matrices."""
    stats[:, Stat.COUNT] += 1
    scatter_stats(matrices, stats)
    for matrix in matrices:
        matrix.state[STEP] += 1


def wait_of(state: Mapping[str, Any], period: int) -> int:
    """Steps that the base optimizer still makes alone, where a rule acts in the first of so many."""
    return min(int(state.get(WAIT, 0)), period - 1)


def move_on(states: Iterable[MutableMapping[str, Any]], wait: int, period: int) -> int:
    """After a step with so many to wait: those that are left. Of a period of 1 nothing is kept."""
    left = (wait or period) - 1
    for state in states:
        if period > 1:
            state[WAIT] = left
        else:
            state.pop(WAIT, None)
    return left


def gather_stats(matrices: Sequence[Matrix]) -> Tensor:
    """(B, len(Stat)), a copy."""
    return torch.stack([matrix.state[STATS] for matrix in matrices])


def scatter_stats(matrices: Sequence[Matrix], stats: Tensor) -> None:
    torch._foreach_copy_([matrix.state[STATS] for matrix in matrices], list(stats.unbind()))


class Kept:
    """A copy of the trackers' state, for a step of which only the device knows whether it is to be skipped."""

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        keys = (STATS, BLOCK, PROBE, LEFT, RIGHT)
        self.before = [(m.state, key, m.state[key].clone()) for m in matrices for key in keys if key in m.state]

    def put_back(self, where: Tensor) -> None:
        """The state as it was, where the condition (of no dimensions) holds."""
        for state, key, old in self.before:
            if key in state and state[key].shape == old.shape:
                state[key].copy_(torch.where(where.to(old.device), old, state[key]))


def constant(values: Sequence[float], like: Tensor) -> Tensor:
    """Host numbers as a tensor beside ``like``. Not to be written to."""
    return kernels.constant(values, like.dtype, like.device)


def exact_triplets(matrices: Sequence[Matrix], like: Tensor, count: int = 1) -> Triplets:
    """All sigma of complete matrices, and their first ``count`` vectors alone, or as many as there are (a device fills
    up with zeros)."""
    weights = [matrix.weight for matrix in matrices]
    most = max(matrix.columns for matrix in matrices)
    host = kernels.on_host(like)
    # of an approximate basis all columns have to be there to be made sharp
    counts = [min(count, matrix.columns) if host else (1 if count == 1 else most) for matrix in matrices]
    bases = [kernels.identity(matrix.columns, like.dtype, like.device) for matrix in matrices]
    out = Triplets(
        like.new_zeros(len(matrices), most),
        *(
            kernels.allocate([(w.shape[side], r) for w, r in zip(weights, counts, strict=True)], like)
            for side in (0, 1)
        ),
    )
    if kernels.on_host(like):
        products = [weight.to(like.dtype) for weight in weights]
    else:
        products = kernels.skinny_products(weights, bases)
    kernels.ritz_triplets(products, bases, out=out)
    if count > 1:
        kernels.sharpen(out, count if host else most)
    return out


def sharpened(count: int) -> int:
    """How many triplets of a block to make sharp for so many to be: those next to them may have their place."""
    return min(2 * count, kernels.MAX_EIGEN)


def probe_columns(block: int) -> int:
    """``a``: so many of the ``block`` columns of a product are a probe of the weight by fixed random vectors Ω."""
    return block // 8


def omega(rows: int, columns: int, like: Tensor) -> Tensor:
    """Ω: the same fixed random vectors in every step."""
    return start_block(rows, columns, like.dtype, like.device)


def with_omega(block: Tensor, matrix: Matrix) -> Tensor:
    """``[ block | Ω ]``."""
    return torch.cat([block, omega(block.shape[0], probe_columns(matrix.block), block)], 1)


def put_omega(wide: Sequence[Tensor], matrices: Sequence[Matrix]) -> None:
    """Ω into the columns behind each matrix' block: ``[ block | Ω ]``."""
    probes = [block[:, m.columns :] for block, m in zip(wide, matrices, strict=True)]
    if any(probe.shape[1] for probe in probes):
        kernels.copy_blocks([omega(probe.shape[0], probe.shape[1], probe) for probe in probes], probes)


def noise(rows: int, columns: int, matrix: Matrix, shift: int = 0) -> Tensor:
    """Fixed random columns to fill a block with, others in every step and round: last time's may lie in it by now."""
    dtype = accumulation_dtype(matrix.weight.dtype)
    variant = 2 * COLD_MAX * matrix.state.get(STEP, 0) + shift
    return start_block(rows, columns, dtype, matrix.weight.device, variant)


def noise_like(blocks: Sequence[Tensor], matrices: Sequence[Matrix], shift: int = 0) -> list[Tensor]:
    """As long as the blocks, and as wide as the matrices' bases."""
    return [noise(len(block), matrix.columns, matrix, shift) for block, matrix in zip(blocks, matrices, strict=True)]


@dataclass
class HostCopy:
    """A device tensor on its way to the host, looked at only once it has arrived."""

    value: Tensor
    arrived: torch.Event | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> HostCopy:
        if tensor.device.type != "cuda":
            return cls(tensor.to("cpu", copy=True))
        value = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        value.copy_(tensor, non_blocking=True)
        event = torch.Event(tensor.device)
        event.record(torch.cuda.current_stream(tensor.device))
        return cls(value, event)

    def peek(self) -> Tensor | None:
        return self.value if self.arrived is None or self.arrived.query() else None

    def wait(self) -> Tensor:
        """The value, waited for."""
        if self.arrived is not None and not self.arrived.query():
            self.arrived.synchronize()
        return self.value


class Limits(NamedTuple):
    """What options and step counts say of the pairs of each matrix (B,)."""

    minimum: Tensor
    maximum: Tensor
    tolerance: Tensor
    cold: Tensor
    fixed: Tensor
    """``max_passes`` is set, so a lost block does not raise the maximum."""

    @classmethod
    def of(cls, options: Sequence[tuple[int | None, float, bool]], like: Tensor) -> Limits:
        limits, tolerances, colds = (np.array(column) for column in zip(*options, strict=True))
        cold, fixed = colds.astype(bool), np.array([limit is not None for limit in limits])
        most = np.where(fixed, np.where(fixed, limits, 0), np.where(cold, COLD_MAX, WARM_MAX)).astype(float)
        numbers = [np.minimum(np.where(cold, COLD_MIN, 1), most), most, np.where(cold, COLD_STOP, 1) * tolerances]
        uploaded = [kernels.upload(values, like.dtype, like.device) for values in numbers]
        return cls(*uploaded, *(kernels.upload(values, torch.bool, like.device) for values in (cold, fixed)))


@dataclass
class Schedule:
    """How many pairs each matrix of a list makes in this step, decided on the device.

    What is enqueued is a fixed number, ``rounds``; rounds return at once where a matrix is done.
    """

    minimum: Tensor
    maximum: Tensor
    tolerance: Tensor
    cold: Tensor
    rounds: int

    @classmethod
    def of(cls, matrices: Sequence[Matrix], stats: Tensor) -> Schedule:
        options = [(m.group["max_passes"], m.group["tolerance"], m.state[STEP] < COLD_STEPS) for m in matrices]
        limits = kernels.remembered(
            ("schedule", *options, stats.dtype), stats.device, lambda: Limits.of(options, stats)
        )
        rounds = max(limit or (COLD_MAX if cold else WARM_MAX) for limit, _, cold in options)
        lost = stats[:, Stat.RESIDUAL] > LOST
        if stats.device.type == "cpu":
            if not lost.any():
                return cls(limits.minimum, limits.maximum, limits.tolerance, limits.cold, rounds)
            if bool((lost & ~limits.fixed).any()):
                rounds = max(rounds, COLD_MAX)
        maximum = torch.where(lost & ~limits.fixed, float(COLD_MAX), limits.maximum)
        return cls(limits.minimum.minimum(maximum), maximum, limits.tolerance, limits.cold | lost, rounds)

    def first(self, sigma: Tensor, expected: Tensor, residual: Tensor) -> Tensor:
        """Who needs another pair after the step's first product."""
        moved = (sigma - expected).abs() > JUMP * self.tolerance * sigma
        return self._wanted(1.0, sigma, (residual > self.tolerance) | moved | self.cold)

    def doubtful(self, wanted: Tensor, sigma: Tensor, expected: Tensor) -> Tensor:
        """Who of those needs it for the residual alone, which a half product shows of the triplet before it."""
        return wanted & ~self.first(sigma, expected, torch.zeros_like(sigma))

    def again(self, pairs: Tensor, sigma: Tensor, before: Tensor, residual: Tensor) -> Tensor:
        """Who needs another pair after ``pairs`` of them, the last having moved sigma from ``before``."""
        moved = (sigma - before).abs() > 0.1 * self.tolerance * sigma
        return self._wanted(pairs, sigma, (residual > self.tolerance) | moved)

    def _wanted(self, pairs: Tensor | float, sigma: Tensor, unsettled: Tensor) -> Tensor:
        few = self.minimum > pairs
        return sigma.isfinite() & (self.maximum > pairs) & (few | unsettled)


def all_idle(wanted: Tensor) -> bool:
    """True where the host may see it: a CPU step ends its rounds early; on a device they are enqueued regardless."""
    return wanted.device.type == "cpu" and not bool(wanted.any())


def rounding_seeds(matrices: Sequence[Matrix]) -> list[float]:
    """Of stochastic rounding in this step: another number for every matrix and step, 0 where it is off."""
    count = len(matrices)
    steps = [m.state.get(STEP, 0) * scaling(m.group, "every", 1) - m.state.get(WAIT, 0) for m in matrices]
    seeds = [1.0 + b + count * step for b, step in enumerate(steps)]
    return [s if m.group.get("stochastic_rounding") else 0.0 for s, m in zip(seeds, matrices, strict=True)]
