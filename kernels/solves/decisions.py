"""What a step does with its triplets, decided on the device: another pair, the change of the weight, the stats.

The schedule is that of :mod:`specopt.tracker.common`, which this package does not import; a test compares them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import records as r
from .rows import block_at, is_finite

COLD_MAX = tl.constexpr(16)
LOST = tl.constexpr(0.1)
JUMP = tl.constexpr(10.0)
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
STILL = tl.constexpr(0.1)
"""So much of the tolerance may sigma move by from pair to pair."""


@triton.jit
def first_wanted(options, sigma, expected, residual, lost):
    """``Schedule.first``: whether another pair is called for after the step's first product."""
    tolerance = tl.load(options + r.TOLERANCE)
    moved = tl.abs(sigma - expected) > JUMP * tolerance * sigma
    unsettled = (residual > tolerance) | moved | (tl.load(options + r.COLD) > 0) | lost
    return called_for(options, 1.0, sigma, unsettled, lost)


@triton.jit
def again_wanted(options, pairs, sigma, before, residual, lost):
    """``Schedule.again``: the same after ``pairs`` of them."""
    tolerance = tl.load(options + r.TOLERANCE)
    moved = tl.abs(sigma - before) > STILL * tolerance * sigma
    return called_for(options, pairs, sigma, (residual > tolerance) | moved, lost)


@triton.jit
def called_for(options, pairs, sigma, unsettled, lost):
    raised = lost & (tl.load(options + r.FIXED) == 0)
    most = tl.where(raised, COLD_MAX * 1.0, tl.load(options + r.MAXIMUM))
    least = tl.minimum(tl.load(options + r.MINIMUM), most)
    return (is_finite(sigma) & (most > pairs) & ((least > pairs) | unsettled)).to(tl.float32)


@triton.jit
def change_of(entry, options, stats, sigma):
    """``c``, ``f`` and whether still capped: the change ``W ← f W + c u₁v₁ᵀ`` that the rule may make."""
    target = tl.load(options + r.TARGET)
    if tl.load(entry + r.TARGET_AT) != 0:
        target = tl.load(block_at(entry, r.TARGET_AT))
    rate = tl.load(options + r.RATE)
    if tl.load(entry + r.LR) != 0:
        rate = tl.load(block_at(entry, r.LR))
    mode = tl.load(options + r.MODE)
    reached = (sigma >= target) | (tl.load(options + r.RAISE_SMALL) > 0)
    capped = (tl.load(stats + r.STAT_CAPPED) > 0) & (reached == 0)
    change = tl.where(is_finite(sigma) & (sigma > 0) & (target == target), target - sigma, 0.0)
    change = tl.where((capped | (mode == 1)) & (change > 0), 0.0, change)
    decayed = tl.where(is_finite(sigma), -rate * tl.load(options + r.STRENGTH) * sigma, 0.0)
    change = tl.where(mode == 3, decayed, change)
    change = tl.where(rate != 0, change, 0.0)
    whole = mode == 2
    ratio = tl.minimum(target / tl.where(sigma > 0, sigma, 1.0), LARGEST)
    factor = tl.where(whole & (change != 0), ratio, 1.0)
    return tl.where(whole, 0.0, change), factor, capped.to(tl.float32)


@triton.jit
def decide_on_weights(entry, options, stats, mine, sigma, residual, pairs, wanted, round):
    """What the step does after the base update, into the scalars; every thread has read them before."""
    change, factor, capped = change_of(entry, options, stats, sigma)
    counted = tl.load(entry + r.STEP)
    tl.debug_barrier()
    tl.store(mine + r.SIGMA, sigma)
    tl.store(mine + r.RESIDUAL, residual)
    tl.store(mine + r.PAIRS, pairs)
    tl.store(mine + r.WANTED, wanted)
    tl.store(mine + r.CHANGE, change)
    tl.store(mine + r.FACTOR, factor)
    tl.store(mine + r.STILL_CAPPED, capped)
    if (round == 0) & (counted != 0):
        step = counted.to(tl.pointer_type(tl.float32))
        value = tl.load(step) + 1
        tl.debug_barrier()
        tl.store(step, value)


@triton.jit
def decide_on_gradients(options, stats, mine, sigma, residual, pairs, wanted, count):
    """What an odd number of halves has found, and the penalty, into the scalars; every thread has read them before."""
    penalty = tl.where(is_finite(sigma), tl.load(options + r.STRENGTH) * sigma, 0.0)
    tl.debug_barrier()
    tl.store(mine + r.SIGMA, sigma)
    tl.store(mine + r.RESIDUAL, residual)
    tl.store(mine + r.PAIRS, pairs)
    tl.store(mine + r.WANTED, wanted)
    tl.store(mine + r.PENALTY, penalty)
    tl.store(stats + r.STAT_COUNT, count.to(tl.float32))


@triton.jit
def record_on_weights(stats, mine, sigmas, k, residual, K: tl.constexpr):
    """The stats after the correction. ``residual``: of a triplet that is finite."""
    wide = tl.arange(0, K)
    sigma, change, factor = tl.load(mine + r.SIGMA), tl.load(mine + r.CHANGE), tl.load(mine + r.FACTOR)
    after = tl.load(sigmas + wide, wide < k, 0.0) * factor + tl.where(wide == 0, change, 0.0)
    top, valid = tl.max(tl.abs(after), 0), is_finite(sigma)
    top = tl.where(valid, top, tl.load(stats + r.STAT_TOP))
    count = tl.load(stats + r.STAT_COUNT) + 1
    capped, pairs = tl.load(mine + r.STILL_CAPPED), tl.load(mine + r.PAIRS)
    tl.debug_barrier()
    tl.store(stats + r.STAT_SIGMA, sigma)
    tl.store(stats + r.STAT_RESIDUAL, residual)
    tl.store(stats + r.STAT_TOP, top)
    tl.store(stats + r.STAT_VALID, valid.to(tl.float32))
    tl.store(stats + r.STAT_CAPPED, capped)
    tl.store(stats + r.STAT_PAIRS, pairs)
    tl.store(stats + r.STAT_COUNT, count)


@triton.jit
def record_on_gradients(stats, sigma, residual, pairs):
    """The stats of a step before the base update, but for their count."""
    valid = is_finite(sigma)
    top = tl.where(valid, sigma, tl.load(stats + r.STAT_TOP))
    residual = tl.where(valid, residual, tl.load(stats + r.STAT_RESIDUAL))
    tl.debug_barrier()
    tl.store(stats + r.STAT_SIGMA, sigma)
    tl.store(stats + r.STAT_RESIDUAL, residual)
    tl.store(stats + r.STAT_TOP, top)
    tl.store(stats + r.STAT_VALID, valid.to(tl.float32))
    tl.store(stats + r.STAT_PAIRS, pairs)
