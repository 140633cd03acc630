"""Passes on the CPU, slice by slice: what a slice of rows takes part in happens while it is in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backend import accumulation_dtype
from ..products.reference import lies_across, slices, widened
from ..updates.reference import rank_updates_, scale_, too_small_to_overflow
from .rounding import rounded_like

if TYPE_CHECKING:
    from . import SGD, AdamW, Penalty, Update

LEAST_MOMENTUM = 0.1
"""From here up the penalty may go into the momentum buffer, divided by the momentum: one array less to write."""


def base_updates_(updates: Sequence[Update], penalty: Penalty | None, scale: float) -> None:
    coefficients = [0.0] * len(updates) if penalty is None else penalty.coefficients.tolist()
    for b, update in enumerate(updates):
        if update.weight.numel() == 0:
            continue
        terms = None
        if penalty is not None and coefficients[b] != 0:
            terms = _factors(coefficients[b], penalty.lefts[b], penalty.rights[b])
        _update(update, terms, scale)
    torch.autograd.graph.increment_version([t for update in updates for t in (update.weight, *update.state)])


def _update(update: Update, terms: tuple[Tensor, Tensor] | None, scale: float) -> None:
    from . import SGD

    numbers, weight = update.numbers, update.weight
    across = lies_across(weight)
    tensors = [t.mT if across else t for t in (weight, update.grad, *update.state)]
    if terms is not None and across:
        terms = terms[1].mT, terms[0].mT
    dtype = accumulation_dtype(weight.dtype)
    safe, buffered = False, None
    salt = 1 if isinstance(numbers, SGD) else 2  # as the kernels': another for every kind of pass
    if terms is not None:
        safe = too_small_to_overflow(*terms)
        if safe and isinstance(numbers, SGD) and _buffers(numbers, update.fresh):
            sign = -1 if numbers.maximize else 1
            buffered = terms[0] * (sign * (1 - numbers.dampening) / numbers.momentum)
    scratch, first = None, 0
    for parts in slices(tensors):
        last = first + len(parts[0])
        wide = [widened(part, dtype) for part in parts]
        grad = wide[1]
        if scratch is None and (scale != 1 or (terms is not None and buffered is None)):
            scratch = torch.empty_like(grad)
        if scratch is not None:
            spare = scratch[: last - first]
            if scale != 1:
                grad = torch.div(grad, scale, out=spare)
            if terms is not None and buffered is None:
                grad = _penalized(grad, terms[0][first:last], terms[1], safe, spare)
        if buffered is not None and terms is not None:
            wide[2].addcmul_(buffered[first:last], terms[1])
        if isinstance(numbers, SGD):
            _sgd(numbers, wide[0], grad, wide[2:], update.fresh)
        else:
            _adamw(numbers, wide[0], grad, wide[2:])
        for i in range(2, len(parts)):
            if wide[i] is not parts[i]:
                parts[i].copy_(wide[i])
        if wide[0] is not parts[0]:
            parts[0].copy_(rounded_like(weight, wide[0], update.seed, salt, rows=(first, last), across=across))
        first = last


def _factors(coefficient: float, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """``c u`` (m, 1) and ``vᵀ`` (1, n) of first columns, without gaps."""
    return left[:, :1] * coefficient, right[:, :1].contiguous().mT


def _terms(coefficients: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """``c_i u_i`` (m, r) and ``v_iᵀ`` (r, n), without gaps."""
    rank = len(coefficients)
    return left[:, :rank] * coefficients, right[:, :rank].contiguous().mT


def _buffers(numbers: SGD, fresh: bool) -> bool:
    """Whether what the gradient gains may be given to the momentum buffer instead."""
    return numbers.momentum >= LEAST_MOMENTUM and not numbers.nesterov and not fresh


def _penalized(grad: Tensor, left: Tensor, right: Tensor, safe: bool, out: Tensor) -> Tensor:
    """``g + u vᵀ``, but ``g`` where that is not finite."""
    if safe:
        return torch.addcmul(grad, left, right, out=out)
    new = torch.addcmul(grad, left, right)
    return torch.where(new.isfinite(), new, grad, out=out)


# torch's fused kernels touch every array once. They are wrong for half precision, and for arrays with gaps: what they
# get here has neither.


def _sgd(numbers: SGD, weight: Tensor, grad: Tensor, state: list[Tensor], fresh: bool) -> None:
    torch._fused_sgd_(
        [weight],
        [grad],
        state,
        weight_decay=numbers.weight_decay,
        momentum=numbers.momentum,
        lr=numbers.lr,
        dampening=numbers.dampening,
        nesterov=numbers.nesterov,
        maximize=numbers.maximize,
        is_first_step=fresh,
    )


def _adamw(numbers: AdamW, weight: Tensor, grad: Tensor, state: list[Tensor]) -> None:
    torch._fused_adamw_(
        [weight],
        [grad],
        state[:1],
        state[1:2],
        state[2:],
        [grad.new_tensor(numbers.step)],
        lr=numbers.lr,
        beta1=numbers.beta1,
        beta2=numbers.beta2,
        weight_decay=numbers.weight_decay,
        eps=numbers.eps,
        amsgrad=len(state) > 2,
        maximize=numbers.maximize,
    )


def corrections_(
    matrices: Sequence[Tensor],
    coefficients: Tensor,
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    factors: Tensor | None,
    seeds: Sequence[float],
) -> None:
    scales = [1.0] * len(matrices) if factors is None else factors.tolist()
    for b, (matrix, changes, scale) in enumerate(zip(matrices, coefficients.tolist(), scales, strict=True)):
        rank = max((i + 1 for i, change in enumerate(changes) if change != 0), default=0)
        if seeds[b] and matrix.dtype != coefficients.dtype and (rank or scale != 1):
            _correct_by_chance(matrix, scale, _terms(coefficients[b, : max(rank, 1)], lefts[b], rights[b]), seeds[b])
            continue
        if factors is not None and scale != 1:
            scale_([matrix], factors[b : b + 1])
        if rank:
            rank_updates_([matrix], coefficients[b : b + 1, :rank], [lefts[b]], [rights[b]])


def _correct_by_chance(matrix: Tensor, factor: float, terms: tuple[Tensor, Tensor], seed: float) -> None:
    new = torch.addmm(matrix.to(terms[0].dtype) * factor, *terms)
    written = rounded_like(matrix, new, seed, salt=3)
    matrix.copy_(torch.where(new.to(matrix.dtype).isfinite(), written, matrix))
