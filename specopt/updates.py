"""The base optimizers' updates of matrices as :mod:`specopt.kernels.passes` makes them, on the state torch keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.optim import SGD, AdamW

from specopt.kernels import Update, passes, tables

from .tracker.device import BaseUpdate, runs_on
from .views import Matrix


def rate_of(group: Mapping[str, Any]) -> float | Tensor:
    """The learning rate of a group; 1 where the base has none, or finds its own."""
    rate: float | Tensor | None = group.get("lr")
    return 1.0 if rate is None else rate


def is_plain(matrix: Matrix) -> bool:
    """Whether options and layout are such that the update can be ours; else it is left to torch."""
    if not matrix.fills_parameter:
        return False
    group = matrix.group
    options = (group["weight_decay"], *group.get("betas", ()))
    if group["differentiable"] or any(isinstance(value, Tensor) for value in options):
        return False
    if not group.get("decoupled_weight_decay", True):  # AdamW's groups may have it: then it is Adam
        return False
    if runs_on(matrix):
        if "betas" in group and "step" not in matrix.state:
            return False
        numbers: list[Any] = [value for value in (group["lr"], matrix.state.get("step")) if is_on_device(value)]
        if any(value.dtype != torch.float32 or value.device != matrix.param.device for value in numbers):
            return False
    elif group.get("capturable"):
        return False
    return all(matrix.is_like(tensor) for tensor in _kept(matrix))


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
    if "step" not in state:
        lists: list[list[Any]] = [[] for _ in range(6)]
        ours = dict(state)
        state.clear()  # it makes its own where it finds none
        optimizer._init_group({**group, "params": [matrix.param]}, *lists)  # type: ignore[no-untyped-call]
        state.update(ours)
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


class OnDeviceBase:
    """The same for a pass on the device: numbers and addresses of a batch, anew in each step."""

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        self.matrices = matrices

    def refresh(self) -> BaseUpdate:
        groups = list({id(matrix.group): matrix.group for matrix in self.matrices}.values())
        place = {id(group): i for i, group in enumerate(groups)}
        at = np.array([place[id(matrix.group)] for matrix in self.matrices])
        numbers = {name: np.array([_options(group)[name] for group in groups])[at] for name in _options(groups[0])}
        steps = [matrix.state.get("step") for matrix in self.matrices]
        if "betas" in groups[0]:
            counts = np.array([1.0 if is_on_device(step) else float(step.add_(1)) for step in steps])  # type: ignore[union-attr]
            numbers["BIAS1"] = 1 - numbers["BETA1"] ** counts
            numbers["BIAS2_ROOT"] = np.sqrt(1 - numbers["BETA2"] ** counts)
        else:
            numbers["BIAS1"] = np.array([self._make_buffer(matrix) for matrix in self.matrices])
        grads = [matrix.gradient_storage for matrix in self.matrices]
        addresses = []
        for matrix, grad, step in zip(self.matrices, grads, steps, strict=True):
            kept = [tables.address(tensor) for tensor in _kept(matrix)]
            scalars = [tables.address(value) if is_on_device(value) else 0 for value in (matrix.group["lr"], step)]
            addresses.append([tables.address(grad), *kept, *[0] * (3 - len(kept)), *scalars])
        return BaseUpdate("ADAMW" if "betas" in groups[0] else "SGD", numbers, addresses, grads)

    @staticmethod
    def _make_buffer(matrix: Matrix) -> bool:
        """Whether SGD's momentum buffer is new. Of zeros, as the device may find that the step is to be skipped."""
        if matrix.group["momentum"] == 0 or matrix.state.get("momentum_buffer") is not None:
            return False
        matrix.state["momentum_buffer"] = matrix.empty_like().zero_()
        return True


def _options(group: dict[str, Any]) -> dict[str, float]:
    rate = 1.0 if is_on_device(group["lr"]) else float(group["lr"])
    shared = {"RATE": rate, "DECAY": group["weight_decay"], "MAXIMIZE": group["maximize"]}
    if "betas" in group:
        beta1, beta2 = group["betas"]
        more = {"BETA1": beta1, "COMPLEMENT1": 1 - beta1, "BETA2": beta2, "COMPLEMENT2": 1 - beta2, "EPS": group["eps"]}
        return shared | more
    damping = group["dampening"]
    more = {"BETA1": group["momentum"], "BETA2": damping, "COMPLEMENT2": 1 - damping, "BIAS2_ROOT": group["nesterov"]}
    return shared | more


def rates(matrices: Sequence[Matrix]) -> tuple[list[float], list[Tensor | None]]:
    """Learning rates of a batch: numbers, and the float32 tensors on the device that stand for them where there are
    such."""
    given: list[Any] = [rate_of(matrix.group) for matrix in matrices]
    on_device = [
        rate.to(matrix.param.device, torch.float32) if is_on_device(rate) else None
        for rate, matrix in zip(given, matrices, strict=True)
    ]
    return [1.0 if is_on_device(rate) else float(rate) for rate in given], on_device


def is_on_device(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.device.type != "cpu"


def _kept(matrix: Matrix) -> list[Tensor]:
    """The base optimizer's state of one matrix: all that is as large as the weight."""
    group, state = matrix.group, matrix.state
    if "betas" in group:
        keys = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
    else:
        keys = ["momentum_buffer"] if group["momentum"] != 0 else []
    return [state[key] for key in keys if state.get(key) is not None]
