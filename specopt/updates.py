"""The base optimizers' updates of matrices as :mod:`specopt.kernels.passes` makes them, on the state torch keeps."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import SGD, AdamW

from specopt.kernels import Update, passes

from .views import Matrix


def is_plain(matrix: Matrix) -> bool:
    """Whether options and layout are such that the update can be ours; else it is left to torch."""
    group = matrix.group
    options = (group["weight_decay"], *group.get("betas", ()))
    if group["differentiable"] or group.get("capturable") or any(isinstance(value, Tensor) for value in options):
        return False
    kept = (matrix.state.get(key) for key in ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"))
    return all(matrix.is_like(tensor) for tensor in kept if tensor is not None)


def sgd(_: SGD, matrix: Matrix) -> Update:
    group, state = matrix.group, matrix.state
    buffers: tuple[Tensor, ...] = ()
    fresh = False
    if group["momentum"] != 0:
        fresh = state.get("momentum_buffer") is None
        if fresh:
            state["momentum_buffer"] = matrix.empty_like()
        buffers = (matrix.view_of(state["momentum_buffer"]),)
    numbers = passes.SGD(
        float(group["lr"]),
        group["momentum"],
        group["dampening"],
        group["weight_decay"],
        group["nesterov"],
        group["maximize"],
    )
    return Update(matrix.weight, matrix.gradient, buffers, numbers, fresh)


def adamw(optimizer: AdamW, matrix: Matrix) -> Update:
    group, state = matrix.group, matrix.state
    if not state:
        lists: list[list[Any]] = [[] for _ in range(6)]
        optimizer._init_group({**group, "params": [matrix.param]}, *lists)  # type: ignore[no-untyped-call]
    state["step"] += 1
    keys = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))
    beta1, beta2 = group["betas"]
    numbers = passes.AdamW(
        float(group["lr"]),
        beta1,
        beta2,
        group["eps"],
        group["weight_decay"],
        group["maximize"],
        float(state["step"]),
    )
    return Update(matrix.weight, matrix.gradient, tuple(matrix.view_of(state[key]) for key in keys), numbers)
