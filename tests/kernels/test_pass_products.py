"""Half products in passes: against the weights they stored, in chunks, by turns, and the solve behind them."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from specopt.kernels import records as r
from specopt.kernels.bucket import Bucket, Tracked
from specopt.kernels.passes import device as passes
from specopt.kernels.solves import device as solves
from specopt.kernels.solves import kinds

from .pass_bucket import (
    CORRECT,
    LEFT,
    NONE,
    RIGHT,
    SGD,
    TURNING,
    PassBucket,
    matrices,
    set_sgd,
)
from .samples import copy, generator

pytestmark = pytest.mark.usefixtures("on_device")


@pytest.mark.parametrize("kp", [16, 32])
@pytest.mark.parametrize("side", [LEFT, RIGHT])
def test_a_product_alone_has_the_bits_of_one_beside_an_update(side, kp):
    cases = [("rows", torch.float32), ("columns", torch.bfloat16), ("sliced", torch.float32)]
    for layout, dtype in cases:
        weights, gradient = matrices(dtype, layout, count=2)
        state = [{"momentum_buffer": copy(w)} for w in weights]
        bucket = PassBucket(weights, gradient, state, k=kp - 4, probes=3, kp=kp)
        set_sgd(bucket, lr=0.1, momentum=0.9)
        passes.launch(bucket, SGD, side)
        first = [outs[side].clone() for outs in bucket.outs]
        passes.launch(bucket, NONE, side)
        assert all(torch.equal(outs[side], old) for outs, old in zip(bucket.outs, first, strict=True))
        passes.launch(bucket, CORRECT, side)
        assert all(torch.equal(outs[side], old) for outs, old in zip(bucket.outs, first, strict=True))


@pytest.mark.parametrize("layout", ["rows", pytest.param("columns", marks=pytest.mark.full)])
def test_long_matrices_are_summed_in_chunks(layout):
    for shape in ((5, 2056), (1030, 6)):
        weights, gradient = matrices(torch.float32, layout, count=2, shapes=[shape])
        for side in (LEFT, RIGHT):
            bucket = PassBucket(weights, gradient, k=3)
            set_sgd(bucket, lr=0.1)
            passes.launch(bucket, SGD, side)
            assert bucket.outs[0][side].shape[0] == -(-shape[1 - side] // 1024)
            bucket.assert_product(0, side)


def test_sides_in_turn_follow_each_matrix_own_count():
    weights, gradient = matrices(torch.float32, "rows", count=2, shapes=[(70, 130), (130, 70), (20, 20)])
    for flip in (0, 1):
        bucket = PassBucket(weights, gradient, exact=[2])
        set_sgd(bucket, lr=0.1)
        expected = [w - 0.1 * g for w, g in zip(weights, gradient, strict=True)]
        for count, stats in zip((4, 7, 3), bucket.stats, strict=True):
            stats[6] = count
        passes.launch(bucket, SGD, TURNING, flip=flip)
        torch.testing.assert_close(weights, expected)
        for b, side in ((0, flip), (1, 1 - flip)):
            bucket.assert_product(b, side)
            bucket.assert_no_product(b, 1 - side)
        bucket.assert_no_product(2, LEFT)
        bucket.assert_no_product(2, RIGHT)


def test_a_tracker_by_pairs_has_no_probe_on_the_left():
    (weights,) = matrices(torch.float32, "rows")
    bucket = PassBucket(weights, by_pairs=True)
    for side in (LEFT, RIGHT):
        passes.launch(bucket, NONE, side)
        for b in range(len(weights)):
            bucket.assert_product(b, side, left_probe=False)


def test_products_only_where_a_pair_is_wanted():
    (weights,) = matrices(torch.float32, "rows")
    bucket = PassBucket(weights)
    bucket.scalars[::2, r.WANTED.value] = 1
    passes.launch(bucket, NONE, LEFT, conditional=True)
    for b in range(len(weights)):
        (bucket.assert_no_product if b % 2 else bucket.assert_product)(b, LEFT)


@triton.jit
def _note_solve(
    b, table, numbers, scalars, sigmas, squares, noise, tickets, round, last, index, count,
    KIND, KP, KX, DTYPE, ALONE, HIP,
):  # fmt: skip
    """In place of the solve: counts how often it runs, and moves the step count on as the real one does."""
    entry = table + b * r.FIELDS
    stats = tl.load(entry + r.STATS).to(tl.pointer_type(tl.float32))
    tl.store(stats, tl.load(stats) + 1)
    tl.store(stats + r.STAT_COUNT, tl.load(stats + r.STAT_COUNT) + 1)
    tl.store(stats + 1, round * 10 + last)


@pytest.mark.parametrize("side", [*(pytest.param(side, marks=pytest.mark.full) for side in (LEFT, RIGHT)), TURNING])
def test_the_last_program_of_each_matrix_solves_it_once(side, monkeypatch):
    monkeypatch.setattr(passes, "solve", _note_solve)
    shapes = [(70, 1100), (1, 1), (300, 5), (200, 200)]
    weights, gradient = matrices(torch.float32, "rows", count=2, shapes=shapes)
    bucket = PassBucket(weights, gradient, k=3, exact=[2])
    set_sgd(bucket, lr=0.1)
    for times in (1, 2):
        expected = [w - 0.1 * g for w, g in zip(weights, gradient, strict=True)]
        passes.launch(bucket, SGD, side, then=3, round=4, last=1)
        torch.testing.assert_close(weights, expected)  # once, although the sides change under way
        assert [stats[0].item() for stats in bucket.stats] == [times] * 4
        assert all(stats[1] == 41 for stats in bucket.stats)
        assert (bucket.tickets == 0).all()
    bucket.scalars[:, r.WANTED.value] = torch.tensor([0.0, 1.0, 0.0, 1.0])
    passes.launch(bucket, NONE, side, then=3, conditional=True)
    assert [stats[0].item() for stats in bucket.stats] == [2, 3, 2, 3]
    passes.launch(bucket, CORRECT, side, then=2)
    assert [stats[0].item() for stats in bucket.stats] == [3, 4, 3, 4]


def tracked_bucket(shapes, gradient=None, *, most=2, by_pairs=False):
    """A bucket with blocks of 4 columns and a probe, of which at most ``most`` pairs are wanted; a matrix of 5 columns
    is exact. Also all that its launches write to."""
    weights, others = matrices(torch.float32, "rows", count=2, shapes=shapes)
    random = generator(11)
    blocks = [
        [torch.randn(length, 5, generator=random, device="cpu").to(w.device) for length in w.shape] for w in weights
    ]
    stats = [torch.zeros(7, device=w.device) for w in weights]
    tracked = []
    for w, (left, right), stat in zip(weights, blocks, stats, strict=True):
        if w.shape[1] == 5:
            tracked.append(Tracked(w, 5, 0, True, stat))
        elif by_pairs:
            tracked.append(Tracked(w, 4, 1, False, stat, right=right[:, :4], right_probe=right[:, 4:]))
        else:
            tracked.append(Tracked(w, 4, 1, False, stat, right[:, :4], left[:, :4], right[:, 4:], left[:, 4:]))
    bucket = Bucket(tracked)
    bucket.amsgrad = False
    bucket.set_addresses([(g.data_ptr() if gradient else 0, 0, 0, 0, 0, 0, 0) for g in others])
    numbers = torch.zeros(len(shapes), r.NUMBERS.value, device="cpu")
    values = ((r.RATE, 0.1), (r.STRENGTH, 0.5), (r.TOLERANCE, 0.01), (r.MINIMUM, 1), (r.MAXIMUM, most), (r.FIXED, 1))
    for field, value in values:
        numbers[:, field.value] = value
    bucket.set_numbers(numbers.numpy())
    written = [*weights, *(block for pair in blocks for block in pair), *stats, bucket.scalars, bucket.sigmas]
    return bucket, [*written, *bucket.vectors[0], *bucket.vectors[1]], others


def test_the_solve_in_a_pass_is_the_one_after_it():
    results = []
    turn = kinds.TURN.value
    for within in (True, False):
        bucket, written, _gradient = tracked_bucket([(70, 40), (6, 9), (90, 5)], gradient=True)
        passes.launch(bucket, SGD, TURNING, then=turn if within else 0, last=True)
        if not within:
            for stage in range(3):
                bucket.launch_solve(turn, round=0, last=True, found_inf=None, stage=stage)
        assert (bucket.scalars[:, r.PENALTY.value] > 0).all()
        results.append(written)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize("by_pairs", [True, False])
def test_programs_of_a_conditional_pass_without_a_pair_to_make_take_the_stages_of_the_solve(by_pairs, most):
    """The same bits as their own launches, which a step of one pair has; where a pair is wanted they leave it alone."""
    kind = (kinds.RITZ if by_pairs else kinds.TURN).value
    results = []
    for within in (True, False):
        bucket, written, _ = tracked_bucket([(300, 150), (40, 70), (90, 5)], most=most, by_pairs=by_pairs)
        passes.launch(bucket, NONE, LEFT if by_pairs else TURNING)
        bucket.launch_solve(kind, round=0, last=False, found_inf=None)
        wanted = bucket.scalars[:, r.WANTED.value].clone()
        assert wanted.tolist() == [most - 1, most - 1, 0]
        before = [tensor.clone() for tensor in written]
        if not within or most == 2:
            for stage in range(1, solves.STAGES[kind]):
                bucket.launch_solve(kind, round=0, last=False, found_inf=None, stage=stage)
        elif by_pairs:
            passes.launch(bucket, NONE, RIGHT, then=kinds.BASIS.value, round=1, conditional=True)
        else:
            for half in (1, 2):
                passes.launch(
                    bucket, NONE, TURNING, then=kind, flip=half - 1, round=half, last=half == 2, conditional=True
                )
        assert (bucket.tickets == 0).all()
        same = all(torch.equal(one, other) for one, other in zip(written, before, strict=True))
        assert same == (most == 2)
        results.append(written)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
