"""Base updates on the CPU, slice by slice: what a slice of rows takes part in happens while it is in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backend import accumulation_dtype
from ..updates.reference import too_small_to_overflow

if TYPE_CHECKING:
    from . import SGD, AdamW, Penalty, Update

SLICE = 1 << 18
"""Entries of a slice: 1 MiB of float32, and enough for two threads."""


def base_updates_(updates: Sequence[Update], penalty: Penalty | None, scale: float) -> None:
    for b, update in enumerate(updates):
        if update.weight.numel() == 0:
            continue
        terms = None
        if penalty is not None and penalty.coefficients[b] != 0:
            terms = penalty.lefts[b][:, :1] * penalty.coefficients[b], penalty.rights[b][:, :1]
        _update(update, terms, scale)


def _update(update: Update, terms: tuple[Tensor, Tensor] | None, scale: float) -> None:
    from . import AdamW

    weight = update.weight
    across = weight.stride(0) < weight.stride(1)  # rows in memory are columns here
    tensors = [t.mT if across else t for t in (weight, update.grad, *update.state)]
    if terms is not None and across:
        terms = terms[::-1]
    dtype = accumulation_dtype(weight.dtype)
    safe = terms is not None and too_small_to_overflow(terms[0], terms[1].mT)
    rows, columns = tensors[0].shape
    height = max(1, SLICE // columns)
    scratch = torch.empty(2, min(height, rows), columns, dtype=dtype, device=weight.device)
    for first in range(0, rows, height):
        parts = [tensor[first : first + height] for tensor in tensors]
        wide = [part if part.dtype == dtype else part.to(dtype) for part in parts]
        gradient, spare = (buffer[: len(parts[0])] for buffer in scratch)
        grad = _gradient(wide[1], gradient, terms, first, safe, scale)
        if isinstance(update.numbers, AdamW):
            _adamw(update.numbers, wide[0], grad, wide[2:], spare)
        else:
            _sgd(update.numbers, wide[0], grad, wide[2:], update.fresh, gradient)
        for i in (0, *range(2, len(parts))):
            if wide[i] is not parts[i]:
                parts[i].copy_(wide[i])


def _gradient(
    grad: Tensor, out: Tensor, terms: tuple[Tensor, Tensor] | None, first: int, safe: bool, scale: float
) -> Tensor:
    """``g / scale + c u vᵀ``, in ``out`` where it is not ``grad`` as it stands."""
    if scale != 1.0:
        grad = torch.div(grad, scale, out=out)
    if terms is None:
        return grad
    left, right = terms[0][first : first + len(grad)], terms[1].mT
    if safe:
        return torch.addcmul(grad, left, right, out=out)
    new = torch.addcmul(grad, left, right)
    return torch.where(new.isfinite(), new, grad, out=out)


def _sgd(numbers: SGD, weight: Tensor, grad: Tensor, state: Sequence[Tensor], fresh: bool, spare: Tensor) -> None:
    if numbers.maximize:
        grad = torch.neg(grad, out=spare)
    if numbers.weight_decay != 0:
        grad = torch.add(grad, weight, alpha=numbers.weight_decay, out=spare)
    if state:
        buffer = state[0]
        if fresh:
            buffer.copy_(grad)
        else:
            buffer.mul_(numbers.momentum).add_(grad, alpha=1 - numbers.dampening)
        grad = torch.add(grad, buffer, alpha=numbers.momentum, out=spare) if numbers.nesterov else buffer
    weight.add_(grad, alpha=-numbers.lr)


def _adamw(numbers: AdamW, weight: Tensor, grad: Tensor, state: Sequence[Tensor], spare: Tensor) -> None:
    average, square = state[:2]
    if numbers.maximize:
        grad = -grad
    if numbers.weight_decay != 0:
        weight.mul_(1 - numbers.lr * numbers.weight_decay)
    average.lerp_(grad, 1 - numbers.beta1)
    square.mul_(numbers.beta2).addcmul_(grad, grad, value=1 - numbers.beta2)
    if len(state) > 2:
        square = torch.maximum(state[2], square, out=state[2])
    root = (1 - numbers.beta2**numbers.step) ** 0.5
    divisor = torch.sqrt(square, out=spare).div_(root).add_(numbers.eps)
    weight.addcdiv_(average, divisor, value=-numbers.lr / (1 - numbers.beta1**numbers.step))
