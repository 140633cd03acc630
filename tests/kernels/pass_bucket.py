"""Records of weights for the pass kernel alone, and what its passes are compared with."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from specopt.kernels import records as r
from specopt.kernels.passes import tiling
from specopt.kernels.subspace import start_block

from .samples import DEVICE, generator

NONE, SGD, ADAMW, CORRECT = (u.value for u in (tiling.NONE, tiling.SGD, tiling.ADAMW, tiling.CORRECT))
NOTHING, LEFT, RIGHT, TURNING = (s.value for s in (tiling.NOTHING, tiling.LEFT, tiling.RIGHT, tiling.TURNING))
STATE = {SGD: ["momentum_buffer"], ADAMW: ["exp_avg", "exp_avg_sq"]}
FIELD = {"momentum_buffer": r.FIRST, "exp_avg": r.FIRST, "exp_avg_sq": r.SECOND, "max_exp_avg_sq": r.PEAK}
SHAPES = [(1, 1), (3, 5), (20, 147), (65, 36), (64, 32)]
LAYOUTS = ("rows", "columns", "sliced", "offset rows", "stepped")


def laid_out(rows: int, columns: int, layout: str, dtype: torch.dtype, random: torch.Generator, scale=1.0) -> Tensor:
    def noise(*shape):
        return (torch.randn(shape, generator=random, device="cpu") * scale).to(DEVICE, dtype)

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
        self.table = torch.zeros(len(weights), r.FIELDS.value, dtype=torch.int64, device="cpu")
        self.numbers = torch.zeros(len(weights), r.NUMBERS.value, device="cpu")
        self.scalars = torch.zeros(len(weights), r.SCALARS.value, device="cpu")
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
                wide = torch.randn(length, row[r.K] + a, generator=random, device="cpu").to(device)
                blocks.append(wide[:, : row[r.K]])
                row |= {basis: wide.data_ptr(), step: wide.stride(0), probe_step: wide.stride(0)}
                row[probe] = 0 if by_pairs and basis is r.LEFT else wide.data_ptr() + 4 * row[r.K]
                triplets = torch.nn.functional.normalize(
                    torch.randn(length, kp, generator=random, device="cpu"), dim=0
                ).to(device)
                firsts.append(triplets[:, 0])
                row[vectors] = triplets.data_ptr()
                self.keep += [wide, triplets]
            outs = []
            for length, inner, product, count, chunk in (
                (m, n, r.LEFT_PRODUCT, r.LEFT_CHUNKS, r.LEFT_CHUNK),
                (n, m, r.RIGHT_PRODUCT, r.RIGHT_CHUNKS, r.RIGHT_CHUNK),
            ):
                row[chunk], row[count] = tiling.chunks(inner)
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
        self.work = {side: tiling.work_list(shapes, side, device) for side in (NOTHING, LEFT, RIGHT, TURNING)}
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


def matrices(dtype, layout, scale=1.0, count=1, shapes=SHAPES):
    random = generator(3)
    return [[laid_out(*shape, layout, dtype, random, scale) for shape in shapes] for _ in range(count)]
