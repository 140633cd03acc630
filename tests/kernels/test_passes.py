"""Passes over the weights: against torch's own optimizers in float64, and products against the weights they stored."""

from __future__ import annotations

import copy as copying
import itertools
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from specopt.kernels import records as r
from specopt.kernels.bucket import Bucket, Tracked
from specopt.kernels.passes import device as passes
from specopt.kernels.passes import rounding
from specopt.kernels.solves import device as solves
from specopt.kernels.subspace import start_block

from . import compiled
from .samples import copy, generator

NONE, SGD, ADAMW, CORRECT = (u.value for u in (passes.NONE, passes.SGD, passes.ADAMW, passes.CORRECT))
NOTHING, LEFT, RIGHT, TURNING = (s.value for s in (passes.NOTHING, passes.LEFT, passes.RIGHT, passes.TURNING))
STATE = {SGD: ["momentum_buffer"], ADAMW: ["exp_avg", "exp_avg_sq"]}
FIELD = {"momentum_buffer": r.FIRST, "exp_avg": r.FIRST, "exp_avg_sq": r.SECOND, "max_exp_avg_sq": r.PEAK}
SHAPES = [(1, 1), (3, 5), (20, 147), (65, 36), (64, 32)]
LAYOUTS = ("rows", "columns", "sliced", "offset rows", "stepped")


def laid_out(rows: int, columns: int, layout: str, dtype: torch.dtype, random: torch.Generator, scale=1.0) -> Tensor:
    def noise(*shape):
        return (torch.randn(shape, generator=random) * scale).to(dtype)

    if layout == "columns":
        return noise(columns, rows).mT
    if layout == "sliced":
        return noise(rows + 1, columns + 5)[1:, 3:-2]
    if layout == "offset rows":  # sixteen bytes hold a whole number of entries, and so do rows and offset
        return noise(rows + 1, columns + 16)[1:, 8:-8]
    if layout == "stepped":
        return noise(2 * rows, 3 * columns)[::2, ::3]
    return noise(rows, columns)


class PassBucket(SimpleNamespace):
    """The records of some weights as the tracker reads them, with random bases and vectors."""

    def __init__(self, weights, grads=None, state=(), *, k=5, probes=1, kp=16, exact=(), by_pairs=False, seed=7):
        random, self.keep = generator(seed), []
        device = weights[0].device
        self.weights, self.grads, self.dtype, self.KP, self.KX = weights, grads, weights[0].dtype, kp, 16
        self.state = [dict(s) for s in state] or [{} for _ in weights]
        self.lefts, self.rights, self.us, self.vs, self.outs, self.stats = ([] for _ in range(6))
        self.noise = start_block(4096, 64, torch.float32, device)
        self.table = torch.zeros(len(weights), r.FIELDS.value, dtype=torch.int64)
        self.numbers = torch.zeros(len(weights), r.NUMBERS.value)
        self.scalars = torch.zeros(len(weights), r.SCALARS.value)
        self.scalars[:, r.FACTOR.value] = 1
        self.amsgrad = any("max_exp_avg_sq" in s for s in self.state)
        self.k, self.probes = [], []
        for b, w in enumerate(weights):
            m, n = w.shape
            row = {r.EXACT: b in exact, r.K: n if b in exact else min(k, m, n), r.PROBES: probes}
            a = 0 if b in exact else probes
            self.k.append(row[r.K])
            self.probes.append(a)
            swapped = w.stride(1) != 1 and w.stride(0) == 1
            memory = w.mT if swapped else w
            size = w.element_size()
            others = [] if grads is None else [grads[b]]
            others += list(self.state[b].values())
            aligned = memory.stride(1) == 1 and not memory.stride(0) * size % 16 and not memory.shape[1] * size % 16
            row[r.ALIGNED] = aligned and not any(t.data_ptr() % 16 for t in [w, *others])
            assert all(t.stride() == w.stride() for t in others)
            row |= {r.WEIGHT: w.data_ptr(), r.SWAPPED: swapped}
            row |= dict(
                zip((r.ROWS, r.COLUMNS, r.ROW_STEP, r.COLUMN_STEP), (*memory.shape, *memory.stride()), strict=True)
            )
            row[r.GRAD] = 0 if grads is None else grads[b].data_ptr()
            row |= {FIELD[name]: tensor.data_ptr() for name, tensor in self.state[b].items()}
            for length, basis, step, probe, probe_step, vectors, blocks, firsts in (
                (m, r.LEFT, r.LEFT_STEP, r.LEFT_PROBE, r.LEFT_PROBE_STEP, r.LEFT_VECTORS, self.lefts, self.us),
                (n, r.RIGHT, r.RIGHT_STEP, r.RIGHT_PROBE, r.RIGHT_PROBE_STEP, r.RIGHT_VECTORS, self.rights, self.vs),
            ):
                wide = torch.randn(length, row[r.K] + a, generator=random).to(device)
                blocks.append(wide[:, : row[r.K]])
                row |= {basis: wide.data_ptr(), step: wide.stride(0), probe_step: wide.stride(0)}
                row[probe] = 0 if by_pairs and basis is r.LEFT else wide.data_ptr() + 4 * row[r.K]
                triplets = torch.nn.functional.normalize(torch.randn(length, kp, generator=random), dim=0).to(device)
                firsts.append(triplets[:, 0])
                row[vectors] = triplets.data_ptr()
                self.keep += [wide, triplets]
            outs = []
            for length, inner, product, count, chunk in (
                (m, n, r.LEFT_PRODUCT, r.LEFT_CHUNKS, r.LEFT_CHUNK),
                (n, m, r.RIGHT_PRODUCT, r.RIGHT_CHUNKS, r.RIGHT_CHUNK),
            ):
                row[chunk], row[count] = passes.chunks(inner)
                outs.append(torch.full((row[count], length, kp), 777.0, device=device))
                row[product] = outs[-1].data_ptr()
            self.outs.append(outs)
            self.stats.append(torch.zeros(7, device=device))
            row[r.STATS] = self.stats[-1].data_ptr()
            for field, value in row.items():
                self.table[b, field.value] = int(value)
        self.tickets = torch.zeros(len(weights), dtype=torch.int32, device=device)
        self.sigmas = torch.zeros(len(weights), 64, device=device)
        self.squares = torch.zeros(len(weights), 2, 64, 64, device=device)
        shapes = [tuple(w.shape) for w in weights]
        self.work = {side: passes.work_list(shapes, side, device) for side in (NOTHING, LEFT, RIGHT, TURNING)}
        self.table, self.numbers, self.scalars = (t.to(device) for t in (self.table, self.numbers, self.scalars))

    def set(self, **options):
        for name, value in options.items():
            self.numbers[:, getattr(r, name).value] = value

    def leave(self, **values):
        for name, value in values.items():
            self.scalars[:, getattr(r, name).value] = torch.as_tensor(value, dtype=torch.float32)

    def product(self, b: int, side: int) -> Tensor:
        return self.outs[b][side].sum(0)

    def expected(self, b: int, side: int, left_probe: bool = True) -> tuple[Tensor, Tensor]:
        """The product in float64, and the sum of the absolute values of its terms."""
        w = self.weights[b].double()
        w, basis = (w, self.rights[b]) if side == LEFT else (w.mT, self.lefts[b])
        a = self.probes[b] if side == RIGHT or left_probe else 0
        operand = torch.zeros(w.shape[1], self.KP, dtype=torch.float64, device=w.device)
        operand[:, : self.k[b]] = basis
        operand[:, self.k[b] : self.k[b] + a] = self.noise[: w.shape[1], :a]
        return w @ operand, w.abs() @ operand.abs()

    def assert_product(self, b: int, side: int, **options):
        truth, size = self.expected(b, side, **options)
        error = (self.product(b, side).double() - truth).abs()
        assert (error <= 1e-5 * size).all()

    def assert_no_product(self, b: int, side: int):
        assert (self.outs[b][side] == 777).all()


def set_sgd(bucket, *, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False, first=False):
    bucket.set(RATE=lr, BETA1=momentum, BETA2=dampening, COMPLEMENT2=1 - dampening, DECAY=weight_decay)
    bucket.set(BIAS1=float(first), BIAS2_ROOT=float(nesterov), MAXIMIZE=float(maximize))


def set_adamw(bucket, step, *, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False, maximize=False):
    bucket.set(RATE=lr, BETA1=betas[0], BETA2=betas[1], COMPLEMENT1=1 - betas[0], COMPLEMENT2=1 - betas[1], EPS=eps)
    bucket.set(DECAY=weight_decay, MAXIMIZE=float(maximize))
    bucket.set(BIAS1=1 - betas[0] ** step, BIAS2_ROOT=(1 - betas[1] ** step) ** 0.5)


def torch_step(kind, weight, grad, state, options, dtype=torch.float64):
    """What torch's optimizer makes of one weight in ``dtype``: the weight and its state after the step."""
    param = torch.nn.Parameter(weight.to(dtype, copy=True))
    param.grad = grad.to(dtype)
    optimizer = kind([param], **options, foreach=False)
    if state:
        optimizer.state[param] = {k: v.to(torch.float32 if k == "step" else dtype, copy=True) for k, v in state.items()}
    optimizer.step()
    return param.detach(), optimizer.state[param]


def assert_rounded_once(result, truth, size):
    """As near as the float64 truth rounded to the result's dtype, but for float32 arithmetic on terms of ``size``."""
    nearest = truth.to(result.dtype).double()
    difference = (result.double() - truth).abs()
    assert (difference <= 1.001 * (nearest - truth).abs() + 1e-6 * size).all()


def _matrices(dtype, layout, scale=1.0, count=1, shapes=SHAPES):
    random = generator(3)
    return [[laid_out(*shape, layout, dtype, random, scale) for shape in shapes] for _ in range(count)]


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
    weights, *grads = _matrices(dtype, layout, scale, count=4)
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
    weights, *grads = _matrices(dtype, layout, scale, count=4)
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
        weights, gradient = _matrices(dtype, layout, count=2, shapes=[(20, 24)])
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


def test_rounding_to_bfloat16_keeps_every_nan_and_infinity():
    bits = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, -0x7FFFFF, 0x7F800000, -0x800000], dtype=torch.int32)
    special = bits.view(torch.float32)
    out = torch.empty(2, 8, dtype=torch.bfloat16)
    _round_kernel[(1,)](special, out, N=6, DTYPE=tl.bfloat16)
    assert torch.equal(out[:, :6].isnan(), special.isnan().expand(2, 6))
    assert torch.equal(out[:, 4:6].float(), special[4:].expand(2, 2))


@triton.jit
def _round_kernel(values, out, N: tl.constexpr, DTYPE: tl.constexpr):
    at = tl.arange(0, 8)
    x = tl.load(values + at, at < N, 0.0)
    tl.store(out + at, passes.nearest(x, DTYPE))
    tl.store(out + 8 + at, passes.stochastic(x, tl.full((8,), 0xFFFFFFFF, tl.uint32), DTYPE))


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("layout", ["rows", "columns", "stepped"])
def test_sgd_sees_the_penalized_gradient(layout, maximize):
    weights, gradient = _matrices(torch.float32, layout, count=2)
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
        weights, gradient = _matrices(torch.float32, layout, count=2)
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
    weights, gradient = _matrices(torch.float32, "rows", count=2)
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
    weights, gradient = _matrices(torch.float32, "rows", count=2)
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
        (weights,) = _matrices(dtype, layout)
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
    weights = [torch.randn(70, 70, generator=generator(0)), torch.randn(70, 5, generator=generator(1))]
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


@pytest.mark.parametrize("kp", [16, 32])
@pytest.mark.parametrize("side", [LEFT, RIGHT])
def test_a_product_alone_has_the_bits_of_one_beside_an_update(side, kp):
    cases = [("rows", torch.float32), ("columns", torch.bfloat16), ("sliced", torch.float32)]
    for layout, dtype in cases:
        weights, gradient = _matrices(dtype, layout, count=2)
        state = [{"momentum_buffer": copy(w)} for w in weights]
        bucket = PassBucket(weights, gradient, state, k=kp - 4, probes=3, kp=kp)
        set_sgd(bucket, lr=0.1, momentum=0.9)
        passes.launch(bucket, SGD, side)
        first = [outs[side].clone() for outs in bucket.outs]
        passes.launch(bucket, NONE, side)
        assert all(torch.equal(outs[side], old) for outs, old in zip(bucket.outs, first, strict=True))
        passes.launch(bucket, CORRECT, side)
        assert all(torch.equal(outs[side], old) for outs, old in zip(bucket.outs, first, strict=True))


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_long_matrices_are_summed_in_chunks(layout):
    for shape in ((5, 2056), (1030, 6)):
        weights, gradient = _matrices(torch.float32, layout, count=2, shapes=[shape])
        for side in (LEFT, RIGHT):
            bucket = PassBucket(weights, gradient, k=3)
            set_sgd(bucket, lr=0.1)
            passes.launch(bucket, SGD, side)
            assert bucket.outs[0][side].shape[0] == -(-shape[1 - side] // 1024)
            bucket.assert_product(0, side)


def test_sides_in_turn_follow_each_matrix_own_count():
    weights, gradient = _matrices(torch.float32, "rows", count=2, shapes=[(70, 130), (130, 70), (20, 20)])
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
    (weights,) = _matrices(torch.float32, "rows")
    bucket = PassBucket(weights, by_pairs=True)
    for side in (LEFT, RIGHT):
        passes.launch(bucket, NONE, side)
        for b in range(len(weights)):
            bucket.assert_product(b, side, left_probe=False)


def test_products_only_where_a_pair_is_wanted():
    (weights,) = _matrices(torch.float32, "rows")
    bucket = PassBucket(weights)
    bucket.scalars[::2, r.WANTED.value] = 1
    passes.launch(bucket, NONE, LEFT, conditional=True)
    for b in range(len(weights)):
        (bucket.assert_no_product if b % 2 else bucket.assert_product)(b, LEFT)


@triton.jit
def _note_solve(b, table, numbers, scalars, sigmas, squares, noise, round, last, KIND, KP, KX, DTYPE):
    """In place of the solve: counts how often it runs, and moves the step count on as the real one does."""
    entry = table + b * r.FIELDS
    stats = tl.load(entry + r.STATS).to(tl.pointer_type(tl.float32))
    tl.store(stats, tl.load(stats) + 1)
    tl.store(stats + r.STAT_COUNT, tl.load(stats + r.STAT_COUNT) + 1)
    tl.store(stats + 1, round * 10 + last)


@pytest.mark.parametrize("side", [LEFT, RIGHT, TURNING])
def test_the_last_program_of_each_matrix_solves_it_once(side, monkeypatch):
    monkeypatch.setattr(passes, "solve", _note_solve)
    shapes = [(70, 1100), (1, 1), (300, 5), (200, 200)]
    weights, gradient = _matrices(torch.float32, "rows", count=2, shapes=shapes)
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


def test_the_solve_in_a_pass_is_the_one_after_it():
    results = []
    for within in (True, False):
        weights, gradient = _matrices(torch.float32, "rows", count=2, shapes=[(70, 40), (6, 9), (90, 5)])
        random = generator(11)
        blocks = [[torch.randn(length, 5, generator=random) for length in w.shape] for w in weights]
        stats = [torch.zeros(7) for _ in weights]
        tracked = [
            Tracked(w, 5, 0, True, s) if w.shape[1] == 5
            else Tracked(w, 4, 1, False, s, right[:, :4], left[:, :4], right[:, 4:], left[:, 4:])
            for w, (left, right), s in zip(weights, blocks, stats, strict=True)
        ]  # fmt: skip
        bucket = Bucket(tracked)
        bucket.amsgrad = False
        bucket.set_addresses([(g.data_ptr(), 0, 0, 0, 0, 0, 0) for g in gradient])
        numbers = torch.zeros(3, r.NUMBERS.value)
        for field, value in ((r.RATE, 0.1), (r.STRENGTH, 0.5), (r.TOLERANCE, 0.01), (r.MINIMUM, 1), (r.MAXIMUM, 2)):
            numbers[:, field.value] = value
        bucket.set_numbers(numbers.numpy())
        turn = solves.TURN.value
        passes.launch(bucket, SGD, TURNING, then=turn if within else 0, last=True)
        if not within:
            bucket.launch_solve(turn, round=0, last=True, found_inf=None)
        assert all(s[6] == 1 for s in stats)
        assert (bucket.scalars[:, r.PENALTY.value] > 0).all()
        state = [block for pair in blocks for block in pair]
        results.append([*weights, *state, *stats, bucket.scalars, *bucket.vectors[0], *bucket.vectors[1]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["rows", "columns", "stepped"])
def test_stochastic_rounding_has_the_bits_of_torchs_version(dtype, layout):
    for scale in (1.0, 1e-6):
        weights, gradient = _matrices(dtype, layout, scale, count=2)
        bucket = PassBucket(weights, gradient, exact=[1])
        set_sgd(bucket, lr=2.0**-9)
        expected = []
        for b, (w, g) in enumerate(zip(weights, gradient, strict=True)):
            bucket.numbers[b, r.SEED.value] = 10.5 + b
            random = rounding.random_bits(
                torch.tensor(10.5 + b), SGD, torch.arange(w.numel(), device=w.device).view(w.shape)
            )
            expected.append(rounding.stochastic(w.float() - 2.0**-9 * g.float(), random, dtype))
        assert not torch.equal(expected[-1], (weights[-1].float() - 2.0**-9 * gradient[-1].float()).to(dtype))
        passes.launch(bucket, SGD, LEFT, stochastic=True)
        assert all(torch.equal(w, e) for w, e in zip(weights, expected, strict=True))
        bucket.assert_product(4, LEFT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_unbiased_and_goes_to_a_neighbour(dtype):
    count = 1 << 17
    least = torch.finfo(dtype).smallest_normal
    for value in (1.001, -1.001, 3.3, 1e-3, -0.37 * least, 1.7 * least, 65000.0, 1e-9):
        values = torch.full((count,), value)
        random = rounding.random_bits(torch.tensor(3.0), 1, torch.arange(count))
        result = rounding.stochastic(values, random, dtype).double()
        exact = values[0].double()
        near = exact.abs().to(dtype)
        spacing = torch.nextafter(near, torch.ones_like(near) * torch.inf).double() - near.double()
        assert ((result - exact).abs() < spacing).all()
        assert (result.mean() - exact).abs() <= 5 * spacing / count**0.5, value
        assert len(result.unique()) <= 2


def test_stochastic_rounding_keeps_the_finite_finite():
    for dtype in (torch.bfloat16, torch.float16):
        large = torch.finfo(dtype).max
        values = torch.tensor([large, -large, large * 1.001, torch.finfo(torch.float32).max, torch.inf, torch.nan, 0.0])
        result = rounding.stochastic(values, torch.full((7,), 0xFFFFFFFF), dtype)
        assert result[:4].tolist() == [large, -large, large, large]
        assert result[4].isinf()
        assert result[5].isnan()
        assert result[6] == 0


def test_random_bits_are_even_and_differ_by_seed_salt_and_index():
    index = torch.arange(1 << 16)
    streams = [rounding.random_bits(torch.tensor(s), salt, index + far) for s in (1.0, 2.0) for salt in (1, 3)
               for far in (0, 1 << 40)]  # fmt: skip
    for a, b in itertools.combinations(streams, 2):
        assert ((a ^ b) >> 16 == 0).sum() < 10
    for stream in streams:
        ones = torch.stack([(stream >> bit & 1).double().mean() for bit in range(32)])
        assert ((ones - 0.5).abs() < 5 * 0.5 / 256).all()


def test_the_same_seed_gives_the_same_bits_and_another_another():
    results = []
    for seed in (1.0, 1.0, 2.0):
        weights, gradient = _matrices(torch.bfloat16, "rows", count=2)
        bucket = PassBucket(weights, gradient)
        set_sgd(bucket, lr=0.01)
        bucket.set(SEED=seed)
        passes.launch(bucket, SGD, LEFT, stochastic=True)
        results.append(weights)
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert not torch.equal(results[0][-1], results[2][-1])


def test_a_matrix_without_gradient_is_left_alone():
    weights, gradient = _matrices(torch.float32, "rows", count=2)
    before = [w.clone() for w in weights]
    bucket = PassBucket(weights, gradient)
    bucket.table[0, r.GRAD.value] = 0
    set_sgd(bucket, lr=0.1)
    passes.launch(bucket, SGD, LEFT)
    assert torch.equal(weights[0], before[0])
    assert not torch.equal(weights[1], before[1])


# --- compiled ------------------------------------------------------------------------------------------------------
OFF = {"found_inf": None, "grad_scale": None}


def pass_variants() -> Iterator[tuple[str, compiled.Variant]]:
    """What a launch of the pass kernel may be, by name: update, side, KP, dtype, then options."""
    kinds = {
        "none turning": (NONE, TURNING, {"CONDITIONAL": True}),
        "sgd turning": (SGD, TURNING, {}),
        "sgd left": (SGD, LEFT, {}),
        "adamw left": (ADAMW, LEFT, {}),
        "adamw turning": (ADAMW, TURNING, {}),
        "correct right": (CORRECT, RIGHT, {}),
    }
    for kp, (name, dtype), (kind, constants) in itertools.product((16, 32, 64), compiled.DTYPES.items(), kinds.items()):
        yield f"{kind} {kp} {name}", pass_variant(kp, dtype, *constants)
    for kp in (16, 32, 64):
        scaled = {"found_inf": 0, "grad_scale": 0}  # both pointers are given
        yield f"sgd turning {kp} fp32 scaled", pass_variant(kp, tl.float32, SGD, TURNING, {}, scaled)
        for kind, update in (("sgd", SGD), ("adamw", ADAMW), ("correct", CORRECT)):
            yield f"{kind} nothing {kp} fp32", pass_variant(kp, tl.float32, update, NOTHING, {})
        yield f"adamw left {kp} fp32 scaled", pass_variant(kp, tl.float32, ADAMW, LEFT, {}, scaled)
        yield f"adamw left {kp} fp32 amsgrad", pass_variant(kp, tl.float32, ADAMW, LEFT, {"AMSGRAD": True})
        for (name, dtype), (kind, (update, side, _)) in itertools.product(compiled.DTYPES.items(), kinds.items()):
            if name != "fp32" and update != NONE:
                constants = {"STOCHASTIC": True}
                yield f"{kind} {kp} {name} stochastic", pass_variant(kp, dtype, update, side, constants)


def pass_variant(kp, dtype, update, side, constants, pointers=None) -> compiled.Variant:
    tile = passes.tile_of(kp, dtype.primitive_bitwidth // 8, update, side, "STOCHASTIC" in constants)
    given = pointers or {}
    return compiled.Variant(
        passes.pass_kernel,
        {
            **{name: value for name, value in OFF.items() if name not in given},
            **{"DTYPE": dtype, "UPDATE": update, "SIDE": side, "THEN": 0, "KP": kp, "KX": 0, "CONDITIONAL": False},
            **{"AMSGRAD": False, "STOCHASTIC": False, "STRIP": passes.STRIP},
            **{"INNER": tile.inner, "LOOSE": tile.loose, "STAGES": tile.stages},
            **constants,
        },
        tile.warps,
        passes.most_registers(kp, update, side),
    )


CORE = [
    ("sm_90", kind)
    for kind in ("none turning", "sgd turning", "sgd left", "adamw left", "adamw turning", "correct right")
] + [
    ("gfx942", "sgd turning"),
    ("gfx942", "adamw left"),
]
COMPILED = [
    pytest.param(
        target,
        name,
        id=f"{target}-{name}",
        marks=() if (target, name.removesuffix(" 32 fp32")) in CORE else pytest.mark.full,
    )
    for target in compiled.TARGETS
    for name, _ in pass_variants()
]


@pytest.fixture(scope="session")
def pass_usage(request) -> compiled.Usage:
    return compiled.usage_of(request.session, test_passes_compile_without_spilling, "tests.kernels.test_passes")


@pytest.mark.parametrize(("target", "name"), COMPILED)
def test_passes_compile_without_spilling(target, name, pass_usage):
    usage = pass_usage[target, name]
    assert "error" not in usage, usage["error"]
    assert usage["spilled"] == 0, usage
    if target != "gfx942":
        arrays = {"none": 1, "sgd": 3, "adamw": 4, "correct": 1}.get(name.split()[0], 1)
        ways = 1 if "nothing" in name else 2  # along rows and across
        assert usage["wide"] >= arrays * ways, usage
        if name.endswith(" 32 fp32"):
            assert usage["registers"] <= (128 if passes.LEAST_INNER == 8 else 160), usage


if __name__ == "__main__":
    compiled.main(pass_variants())
