"""Passes over the weights: against torch's own optimizers in float64."""

from __future__ import annotations

import copy as copying
import itertools

import pytest
import torch

from specopt.kernels import records as r
from specopt.kernels.passes import device as passes

from .pass_bucket import (
    ADAMW,
    CORRECT,
    LAYOUTS,
    LEFT,
    NOTHING,
    RIGHT,
    SGD,
    STATE,
    TURNING,
    PassBucket,
    assert_rounded_once,
    matrices,
    set_adamw,
    set_sgd,
    torch_step,
)
from .samples import DEVICE, copy, generator

pytestmark = pytest.mark.usefixtures("on_device")

SGD_OPTIONS = [
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.999, "weight_decay": 0.01},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True, "weight_decay": 0.01},
]


def each_and_every(options):
    """Every option in one layout and every layout with one option; all of both in the full run."""
    for i, option in enumerate(options):
        for j, layout in enumerate(LAYOUTS):
            marks = () if j == 0 or i == len(options) - 1 else pytest.mark.full
            yield pytest.param(option, layout, id=f"{option} {layout}", marks=marks)


@pytest.mark.parametrize(("options", "layout"), list(each_and_every(SGD_OPTIONS)))
def test_sgd_is_torchs(options, layout):
    _check_sgd(options, layout, torch.float32, 1.0)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 1e-30), (torch.float32, 1e30), (torch.bfloat16, 1.0), (torch.bfloat16, 1e-30), (torch.float16, 1)],
)
@pytest.mark.parametrize("layout", ["columns", *(pytest.param(x, marks=pytest.mark.full) for x in ("rows", "sliced"))])
def test_sgd_in_other_dtypes_and_scales(dtype, scale, layout):
    _check_sgd(SGD_OPTIONS[-1], layout, dtype, scale)


def _check_sgd(options, layout, dtype, scale):
    weights, *grads = matrices(dtype, layout, scale, count=4)
    has_buffer = options.get("momentum", 0) != 0
    state = [{"momentum_buffer": copy(w).fill_(torch.nan)} if has_buffer else {} for w in weights]
    for step, gradient in enumerate(grads):
        bucket = PassBucket(weights, gradient, state)
        set_sgd(bucket, **options, first=step == 0)
        before = [(w.clone(), {} if step == 0 else copying.deepcopy(s)) for w, s in zip(weights, state, strict=True)]
        passes.launch(bucket, SGD, (LEFT, RIGHT, NOTHING)[step])
        for b, (w, s) in enumerate(before):
            truth, after = torch_step(torch.optim.SGD, w, gradient[b], s, options)
            size = 10 * (w.double().abs() + gradient[b].double().abs())
            if s:
                size += 10 * s["momentum_buffer"].double().abs()
            assert_rounded_once(weights[b], truth, size)
            if has_buffer:
                assert_rounded_once(state[b]["momentum_buffer"], after["momentum_buffer"], size)
            for side in (LEFT, RIGHT):
                (bucket.assert_product if (LEFT, RIGHT, NOTHING)[step] == side else bucket.assert_no_product)(b, side)


ADAMW_OPTIONS = [
    {"lr": 0.01},
    {"lr": 0.01, "weight_decay": 0.0, "eps": 0.0},
    {"lr": 0.01, "betas": (0.3, 0.5), "amsgrad": True},
    {"lr": 0.01, "betas": (0.0, 0.9999), "amsgrad": True, "maximize": True, "weight_decay": 0.5},
]


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(("options", "layout"), list(each_and_every(ADAMW_OPTIONS)))
def test_adamw_is_torchs(options, layout, on_device):
    _check_adamw(options, layout, torch.float32, 1.0, on_device)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 1e-12), (torch.float32, 1e15), (torch.bfloat16, 1.0), (torch.bfloat16, 1e12), (torch.float16, 1)],
)
@pytest.mark.parametrize("layout", ["columns", *(pytest.param(x, marks=pytest.mark.full) for x in ("rows", "sliced"))])
def test_adamw_in_other_dtypes_and_scales(dtype, scale, layout):
    options = {"lr": 0.01 * scale, "amsgrad": True, "eps": 1e-8 * scale, "weight_decay": 0.0}
    _check_adamw(options, layout, dtype, scale, False)


def _check_adamw(options, layout, dtype, scale, on_device):
    weights, *grads = matrices(dtype, layout, scale, count=4)
    state = [{name: copy(w).zero_() for name in STATE[ADAMW]} for w in weights]
    if options.get("amsgrad"):
        state = [{**s, "max_exp_avg_sq": copy(w).zero_()} for s, w in zip(state, weights, strict=True)]
    for step, gradient in enumerate(grads, start=1):
        bucket = PassBucket(weights, gradient, state)
        set_adamw(bucket, step, **options)
        if on_device:
            count, rate = torch.tensor(step - 1.0), torch.tensor(options["lr"])
            bucket.set(RATE=torch.nan, BIAS1=torch.nan, BIAS2_ROOT=torch.nan)
            bucket.table[:, r.STEP.value], bucket.table[:, r.LR.value] = count.data_ptr(), rate.data_ptr()
        done = torch.tensor(step - 1.0)
        before = [(w.clone(), {"step": done, **copying.deepcopy(s)}) for w, s in zip(weights, state, strict=True)]
        side = (RIGHT, LEFT, NOTHING)[step - 1]
        passes.launch(bucket, ADAMW, side)
        for b, (w, s) in enumerate(before):
            truth, after = torch_step(torch.optim.AdamW, w, gradient[b], s, options)
            size = w.double().abs() + (truth - w.double()).abs()
            assert_rounded_once(weights[b], truth, 2 * size)
            g = gradient[b].double()
            for name, values in state[b].items():
                size = g.abs() + s["exp_avg"].abs() if name == "exp_avg" else after[name].abs()
                assert_rounded_once(values, after[name], size)
            if side != NOTHING:
                bucket.assert_product(b, side)
        if on_device:
            assert count == step - 1  # counted up by another kernel


def test_a_nan_in_the_gradient_reaches_what_torch_lets_it_reach():
    for dtype, layout in itertools.product((torch.float32, torch.bfloat16, torch.float16), ("rows", "columns")):
        weights, gradient = matrices(dtype, layout, count=2, shapes=[(20, 24)])
        gradient[0][3, 4], gradient[0][5, 6] = torch.nan, torch.inf
        for bits in (0x7FFFFFFF, -1):  # a NaN of all ones is what a GPU makes
            if dtype == torch.float32:
                gradient[0].view(torch.int32)[3, 4] = bits
            state = [{"momentum_buffer": copy(w).zero_()} for w in weights]
            result = [copy(weights[0])]
            bucket = PassBucket(result, gradient, state)
            set_sgd(bucket, lr=0.1, momentum=0.9)
            bucket.leave(PENALTY=0.5)
            passes.launch(bucket, SGD, LEFT)
            for tensor in (result[0], state[0]["momentum_buffer"]):
                assert tensor[3, 4].isnan()
                assert tensor[5, 6].isinf()
                assert tensor.isfinite().sum() == tensor.numel() - 2


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("layout", ["rows", "columns", "stepped"])
def test_sgd_sees_the_penalized_gradient(layout, maximize):
    weights, gradient = matrices(torch.float32, layout, count=2)
    state = [{"momentum_buffer": copy(w)} for w in weights]
    bucket = PassBucket(weights, gradient, state)
    options = {"lr": 0.1, "momentum": 0.9, "maximize": maximize}
    set_sgd(bucket, **options)
    bucket.leave(PENALTY=3.0)
    before = [(w.clone(), copying.deepcopy(s)) for w, s in zip(weights, state, strict=True)]
    kept = [g.clone() for g in gradient]
    passes.launch(bucket, SGD, RIGHT)
    for b, (w, s) in enumerate(before):
        penalized = gradient[b].double() + 3 * torch.outer(bucket.us[b].double(), bucket.vs[b].double())
        truth, _ = torch_step(torch.optim.SGD, w, penalized, s, options)
        assert_rounded_once(weights[b], truth, 10 * (w.abs().double() + penalized.abs()))
        assert torch.equal(gradient[b], kept[b])
        bucket.assert_product(b, RIGHT)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("layout", ["rows", "columns", "stepped"])
def test_adamw_sees_the_penalized_gradient_where_a_tracker_by_halves_has_left_one(layout, maximize):
    options = {"lr": 0.1, "maximize": maximize}
    for side, strength in ((TURNING, 3.0), (LEFT, 0.0)):
        weights, gradient = matrices(torch.float32, layout, count=2)
        state = [{name: copy(w).abs_() for name in STATE[ADAMW]} for w in weights]
        bucket = PassBucket(weights, gradient, state)
        set_adamw(bucket, 3, **options)
        bucket.leave(PENALTY=3.0)
        before = [
            (w.clone(), {"step": torch.tensor(2.0), **copying.deepcopy(s)}) for w, s in zip(weights, state, strict=True)
        ]
        passes.launch(bucket, ADAMW, side)
        for b, (w, s) in enumerate(before):
            penalized = gradient[b].double() + strength * torch.outer(bucket.us[b].double(), bucket.vs[b].double())
            truth, after = torch_step(torch.optim.AdamW, w, penalized, s, options)
            assert_rounded_once(weights[b], truth, 2 * (w.double().abs() + (truth - w.double()).abs()))
            size = penalized.abs() + gradient[b].double().abs() + s["exp_avg"].abs()
            assert_rounded_once(state[b]["exp_avg"], after["exp_avg"], 10 * size)


def test_a_penalty_that_overflows_leaves_the_gradient():
    for dtype in (torch.float32, torch.float16):
        large = torch.finfo(dtype).max
        weights, gradient = [torch.zeros(2, 2, dtype=dtype)], [torch.tensor([[large, 1], [-large, 2]], dtype=dtype)]
        bucket = PassBucket(weights, gradient, k=1, probes=0, exact=[0])
        bucket.us[0].copy_(torch.tensor([1.0, 1.0]))
        bucket.vs[0].copy_(torch.tensor([1.0, 1.0]))
        set_sgd(bucket, lr=2.0**-10)
        bucket.leave(PENALTY=large / 2)
        passes.launch(bucket, SGD, LEFT)
        half = large / 2
        expected = torch.tensor([[large, half + 1], [-half, half + 2]], dtype=torch.float64) / -1024
        torch.testing.assert_close(weights[0].double(), expected, rtol=1e-3, atol=0)
        bucket.leave(PENALTY=torch.nan)
        passes.launch(bucket, SGD, LEFT)
        assert weights[0].isfinite().all()


def test_gradients_that_are_still_scaled():
    weights, gradient = matrices(torch.float32, "rows", count=2)
    expected = [
        w - 0.1 * (g / 8 + torch.outer(u, v)) for w, g, u, v in zip(weights, gradient, *_vectors(weights), strict=True)
    ]
    bucket = PassBucket(weights, gradient)
    set_sgd(bucket, lr=0.1)
    bucket.leave(PENALTY=1.0)
    passes.launch(bucket, SGD, LEFT, grad_scale=torch.tensor(8.0))
    torch.testing.assert_close(weights, expected)


def _vectors(weights):
    bucket = PassBucket(weights)
    return bucket.us, bucket.vs


@pytest.mark.parametrize("update", [SGD, ADAMW, CORRECT])
def test_on_found_inf_nothing_is_written(update):
    weights, gradient = matrices(torch.float32, "rows", count=2)
    state = [{name: torch.ones_like(w) for name in STATE.get(update, [])} for w in weights]
    bucket = PassBucket(weights, gradient, state)
    set_adamw(bucket, 1, lr=0.1)
    bucket.leave(CHANGE=1.0)
    before = [w.clone() for w in weights]
    passes.launch(bucket, update, LEFT, found_inf=torch.tensor(1.0))
    for b, w in enumerate(weights):
        assert torch.equal(w, before[b])
        assert all((values == 1).all() for values in state[b].values())
        bucket.assert_no_product(b, LEFT)
    passes.launch(bucket, update, LEFT, found_inf=torch.tensor(0.0))
    assert not any(torch.equal(w, old) for w, old in zip(weights, before, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_corrections(layout, dtype):
    for factor, change in ((1.0, -0.7), (0.5, 0.0), (1.5, 2.0)):
        (weights,) = matrices(dtype, layout)
        before = [w.clone() for w in weights]
        bucket = PassBucket(weights, exact=[1])
        bucket.leave(CHANGE=change, FACTOR=factor)
        passes.launch(bucket, CORRECT, RIGHT)
        for b, w in enumerate(weights):
            truth = factor * before[b].double() + change * torch.outer(bucket.us[b], bucket.vs[b]).double()
            assert_rounded_once(w, truth, truth.abs() + before[b].double().abs())
            (bucket.assert_no_product if b == 1 else bucket.assert_product)(b, RIGHT)


def test_a_correction_leaves_what_would_overflow_and_spreads_no_nan():
    for dtype, stochastic in itertools.product((torch.float32, torch.float16, torch.bfloat16), (False, True)):
        large = torch.finfo(dtype).max
        weights = [torch.tensor([[large, 1.0, torch.inf], [2.0, -large, torch.nan]], dtype=dtype)]
        bucket = PassBucket(weights, exact=[0])
        bucket.set(SEED=5.0)
        bucket.us[0].fill_(1.0)
        bucket.vs[0].fill_(1.0)
        bucket.leave(CHANGE=large / 2)
        passes.launch(bucket, CORRECT, NOTHING, stochastic=stochastic)
        assert weights[0][0, 0] == large
        assert weights[0][0, 2].isinf()
        assert weights[0][1, 2].isnan()
        torch.testing.assert_close(weights[0][1, 1].double(), torch.tensor(-large / 2).double(), rtol=1e-2, atol=0)


def test_where_there_is_nothing_to_correct_memory_is_left_alone():
    """-0 and a NaN of odd bits would come back changed."""
    weights = [torch.randn(70, n, generator=generator(n), device="cpu").to(DEVICE) for n in (70, 5)]
    for w in weights:
        w[1, 1] = -0.0
        w.view(torch.int32)[2, 2] = 0x7F800123
    before = [w.view(torch.int32).clone() for w in weights]
    bucket = PassBucket(weights, exact=[1])
    for t in (*bucket.us, *bucket.vs):
        t.fill_(torch.nan)
    passes.launch(bucket, CORRECT, RIGHT)
    assert all(torch.equal(w.view(torch.int32), old) for w, old in zip(weights, before, strict=True))
    bucket.assert_no_product(1, RIGHT)
    finite = torch.arange(70) != 2
    truth, size = bucket.expected(0, RIGHT)
    assert ((bucket.product(0, RIGHT) - truth).abs() <= 1e-5 * size)[finite].all()


def test_a_matrix_without_gradient_is_left_alone():
    weights, gradient = matrices(torch.float32, "rows", count=2)
    before = [w.clone() for w in weights]
    bucket = PassBucket(weights, gradient)
    bucket.table[0, r.GRAD.value] = 0
    set_sgd(bucket, lr=0.1)
    passes.launch(bucket, SGD, LEFT)
    assert torch.equal(weights[0], before[0])
    assert not torch.equal(weights[1], before[1])
