"""What a base optimizer gets to see of a step: gradients that are not the parameters' own, and no state of ours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from specopt import kernels
from specopt.kernels import Penalty

from . import updates
from .session import Gate
from .sharding.cut import is_distributed, placed_like
from .tracker.common import PREFIX
from .views import Matrix

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def own_entries(state: Mapping[Any, Any]) -> dict[str, Any]:
    """What a rule keeps in the state of a parameter."""
    return {key: value for key, value in state.items() if isinstance(key, str) and key.startswith(PREFIX)}


@contextmanager
def out_of_sight(states: MutableMapping[Tensor, Any], params: Iterable[Tensor]) -> Iterator[None]:
    """Takes our entries out of the states, and states that hold nothing else, and puts them back: most optimizers make
    their own state where they find none, and some go over all that they find."""
    hidden = []
    for param in params:
        state = states.get(param)
        if not isinstance(state, dict):
            continue
        own = own_entries(state)
        for key in own:
            del state[key]
        if not state:
            del states[param]
        hidden.append((param, state, own))
    try:
        yield
    finally:
        for param, state, own in hidden:
            left = states.get(param, {})
            if left is not state:
                state.clear()
                state.update(left)
                states[param] = state  # the one that the step's matrices hold
            state.update(own)


@contextmanager
def gradients(replaced: Mapping[Tensor, Tensor | None]) -> Iterator[None]:
    """Other gradients, or none, for the base update; the same tensors as before afterwards."""
    grads = {param: param.grad for param in replaced}
    try:
        for param, grad in replaced.items():
            param.grad = grad
        yield
    finally:
        for param, grad in grads.items():
            param.grad = grad


def penalized(matrices: Sequence[Matrix], penalty: Penalty, gate: Gate) -> dict[Tensor, Tensor]:
    """By parameter a copy of its gradient with the penalty of its matrices added, at the scale that it has."""
    copies = {matrix.param: torch.empty_like(matrix.param) for matrix in matrices}
    if is_distributed(matrices[0].param):
        for param, copy in copies.items():
            copy.copy_(placed_like(param.grad, cast("DTensor", param)))
    else:
        torch._foreach_copy_(list(copies.values()), [cast(Tensor, param.grad) for param in copies])
    views = [matrix.view_of(copies[matrix.param]) for matrix in matrices]
    coefficients = penalty.coefficients * gate.gradient_scale(penalty.coefficients)
    kernels.rank_updates_(views, coefficients[:, None], penalty.lefts, penalty.rights)
    for matrix, view in zip(matrices, views, strict=True):
        matrix.store(view, copies[matrix.param])
    return copies


@contextmanager
def clean_buffers(optimizer: Optimizer, gate: Gate) -> Iterator[None]:
    """Zeros for the momentum buffers that are made in a step that the device skips. Of torch's fused SGD they hold what
    was in memory, and it goes by them in the next step. (With ``dampening`` that one is damped then, as a first step
    that is not skipped is none.)"""
    new = [
        param
        for group in optimizer.param_groups
        if gate.is_undecided and isinstance(optimizer, SGD) and group["momentum"] != 0
        for param in group["params"]
        if param.grad is not None and optimizer.state.get(param, {}).get("momentum_buffer") is None
    ]
    yield
    for param in new:
        buffer = optimizer.state[param].get("momentum_buffer")
        if buffer is not None:
            buffer.masked_fill_(cast(Tensor, gate.found_inf).to(buffer.device).reshape(()) != 0, 0.0)


@contextmanager
def rates_left_on_device(optimizer: Optimizer) -> Iterator[None]:
    """Torch's SGD by its fused kernel in groups whose learning rate is a tensor on the device, where neither that nor
    another is asked for: the others read the rate back, which stalls the host and cannot be captured in a graph."""
    chosen = [group for group in optimizer.param_groups if isinstance(optimizer, SGD) and _can_fuse(optimizer, group)]
    for group in chosen:
        group["fused"] = True
    try:
        yield
    finally:
        for group in chosen:
            group["fused"] = None


def _can_fuse(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    rate, params = group["lr"], [param for param in group["params"] if param.grad is not None]
    if group["fused"] is not None or group["foreach"] is not None or group["differentiable"]:
        return False
    if not updates.is_on_device(rate) or rate.dtype != torch.float32 or isinstance(group["weight_decay"], Tensor):
        return False
    if any(p.device != rate.device or not p.is_floating_point() or p.grad.layout != torch.strided for p in params):
        return False
    made = {optimizer.state.get(param, {}).get("momentum_buffer") is not None for param in params}
    return len(made) == 1 and not any(is_distributed(param) for param in params)  # it takes all buffers or none
