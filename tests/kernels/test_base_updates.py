"""Base updates in slices, with a penalty, against torch's SGD and AdamW; and corrections."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from specopt.kernels import Penalty, Update, base_updates_, corrections_, passes
from specopt.kernels.products import reference as products

from .samples import copy, generator, matrix

CPU = torch.device("cpu")
LAYOUTS = ("rows", "columns", "sliced", "stepped")
SGDS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
    {"momentum": 0.9, "maximize": True, "weight_decay": 0.05},
    {"momentum": 0.01, "dampening": 0.2},
    {"weight_decay": 0.1, "maximize": True},
]
ADAMWS: list[dict[str, Any]] = [
    {},
    {"amsgrad": True},
    {"weight_decay": 0.0, "betas": (0.8, 0.95), "eps": 1e-6},
    {"maximize": True, "weight_decay": 0.2, "amsgrad": True},
]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True, params=[500, products.SLICE], ids=["slices", "whole"])
def slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SLICE", request.param)


def samples(dtype: torch.dtype, layout: str, seed: int, count: int = 1) -> list[Tensor]:
    """Tensors (37, 61) laid out alike."""
    random = generator(seed)
    return [matrix((37, 61, torch.float32, layout, 1), random, CPU).to(dtype=torch.float64) for _ in range(count)]


def laid_out(values: Tensor, layout: str, dtype: torch.dtype) -> Tensor:
    like = matrix((37, 61, torch.float32, layout, 1), generator(0), CPU)
    room = torch.zeros(like.untyped_storage().nbytes() // 4, dtype=dtype)
    return room.as_strided(like.shape, like.stride(), like.storage_offset()).copy_(values)


def penalty_of(shape: torch.Size, dtype: torch.dtype, coefficient: float) -> tuple[Penalty, Tensor]:
    """A penalty, and what it adds to the gradient in float64; the vectors are columns of wider blocks."""
    random = generator(9)
    left, right = (torch.randn(length, 3, generator=random, dtype=torch.float64).to(dtype) for length in shape)
    added = coefficient * torch.outer(left[:, 0].double(), right[:, 0].double())
    return Penalty(torch.tensor([coefficient], dtype=dtype), [left], [right]), added


class Base:
    """torch's optimizer in float64 on the same numbers."""

    def __init__(self, weight: Tensor, kind: str, lr: float, options: dict[str, Any]) -> None:
        self.weight = weight.double().clone().requires_grad_()
        cls = torch.optim.SGD if kind == "sgd" else torch.optim.AdamW
        self.optimizer = cls([self.weight], lr=lr, foreach=False, **options)  # type: ignore[arg-type]

    def step(self, gradient: Tensor) -> Tensor:
        self.weight.grad = gradient.double()
        self.optimizer.step()
        return self.weight.detach()


def numbers(kind: str, lr: float, step: int, options: dict[str, Any]) -> Any:
    if kind == "sgd":
        given = {"momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False, "maximize": False, **options}
        return passes.SGD(lr=lr, **given)
    given = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "maximize": False, **options}
    beta1, beta2 = given["betas"]
    return passes.AdamW(lr, beta1, beta2, given["eps"], given["weight_decay"], given["maximize"], float(step))


def state_of(weight: Tensor, kind: str, layout: str, options: dict[str, Any]) -> tuple[Tensor, ...]:
    count = 2 + bool(options.get("amsgrad")) if kind == "adamw" else int(options.get("momentum", 0) != 0)
    start = torch.nan if kind == "sgd" else 0.0  # a fresh buffer of SGD holds anything
    return tuple(laid_out(torch.full_like(weight, start), layout, weight.dtype) for _ in range(count))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("kind", "options"), [("sgd", o) for o in SGDS] + [("adamw", o) for o in ADAMWS], ids=str)
def test_steps_are_torchs_with_the_penalty_in_the_gradient(
    kind: str, options: dict[str, Any], dtype: torch.dtype, layout: str
) -> None:
    lr = 0.1 if kind == "sgd" else 0.01
    start = samples(dtype, layout, 1)[0]
    weight = laid_out(start, layout, dtype)
    state = state_of(weight, kind, layout, options)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    penalty, added = penalty_of(weight.shape, sums, 0.3)
    base = Base(weight, kind, lr, options)
    if kind == "adamw" and dtype == torch.float16:
        options = {**options, "eps": 1e-4}
        base = Base(weight, kind, lr, options)
    for step in range(1, 4):
        gradient = laid_out(samples(dtype, layout, 10 + step)[0], layout, dtype)
        kept = copy(gradient)
        update = Update(weight, gradient, state, numbers(kind, lr, step, options), step == 1)
        version = weight._version
        base_updates_([update], penalty)
        expected = base.step(gradient.double() + added)
        assert weight._version > version and torch.equal(gradient, kept)
        assert (weight.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_gradients_are_divided_and_the_penalty_is_not(dtype: torch.dtype) -> None:
    results = []
    for scale in (1.0, 64.0):
        weight, gradient = (laid_out(x, "rows", dtype) for x in samples(dtype, "rows", 4, 2))
        update = Update(weight, gradient * scale, (), numbers("sgd", 0.1, 1, {}))
        base_updates_([update], penalty_of(weight.shape, torch.float32, 0.3)[0], scale)
        results.append(weight)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}], ids=str)
def test_entry_that_the_penalty_would_make_non_finite_keeps_its_plain_gradient(options: dict[str, Any]) -> None:
    largest = torch.finfo(torch.float32).max
    weight, gradient = torch.zeros(40, 30), torch.ones(40, 30)
    gradient[3, 5] = 0.9 * largest
    left, right = torch.zeros(40, 1), torch.ones(30, 1)
    left[3] = 1.0
    penalty = Penalty(torch.tensor([0.5 * largest]), [left], [right])
    state = (torch.zeros_like(weight),) if options else ()
    base_updates_([Update(weight, gradient, state, numbers("sgd", 1e-3, 1, options))], penalty)
    assert weight.isfinite().all()
    assert weight[3, 5] == pytest.approx(-0.9e-3 * largest, rel=1e-5)
    assert weight[3, 6] == pytest.approx(-0.5e-3 * largest, rel=1e-5)


def test_non_finite_gradient_shows_where_it_is_and_matrices_without_entries_may_stand_in_the_list() -> None:
    weight, gradient = torch.ones(40, 30), torch.ones(40, 30)
    gradient[7, 2] = torch.nan
    empty = torch.ones(0, 30)
    plain = numbers("sgd", 0.1, 1, {})
    blocks = [torch.ones(40, 1), torch.ones(0, 1)], [torch.ones(30, 1)] * 2
    base_updates_(
        [Update(weight, gradient, (), plain), Update(empty, empty.clone(), (), plain)],
        Penalty(torch.tensor([0.5, 0.5]), *blocks),
    )
    assert (~weight.isfinite()).nonzero().tolist() == [[7, 2]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_corrections_are_scalings_and_outer_products(dtype: torch.dtype, layout: str) -> None:
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    starts = samples(dtype, layout, 5, 4)
    weights = [laid_out(x, layout, dtype) for x in starts]
    changes, factors = torch.tensor([0.4, 0.0, 0.0, -0.3], dtype=sums), torch.tensor([1.0, 1.0, 0.5, 2.0], dtype=sums)
    random = generator(6)
    lefts = [torch.randn(37, 2, generator=random, dtype=sums) for _ in weights]
    rights = [torch.randn(61, 2, generator=random, dtype=sums) for _ in weights]
    versions = [weight._version for weight in weights]
    expected = [
        f * w.double() + c * torch.outer(u[:, 0], v[:, 0]).double()
        for w, f, c, u, v in zip(weights, factors, changes, lefts, rights, strict=True)
    ]
    corrections_(weights, changes[:, None], lefts, rights, factors=factors)
    for weight, wanted in zip(weights, expected, strict=True):
        assert (weight.double() - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()
    assert weights[1]._version == versions[1]  # nothing was to be done
