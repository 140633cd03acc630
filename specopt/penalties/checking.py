"""What the penalties take: errors that name the parameter, what it was, and what it may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


def check_differentiable(inputs: Any, output: object) -> None:
    """That a gradient by the inputs can be taken; where the output is logits, they have to require it already.

    Raises:
        RuntimeError: gradients are off, or torch.func's.
        TypeError: inputs that are no tensor of floating point numbers.
        ValueError: inputs without a sample, from inference mode, or without the gradient that was to be required.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("penalties differentiate, and cannot be called under torch.inference_mode()")
    if not torch.is_grad_enabled():
        raise RuntimeError("penalties differentiate, and cannot be called under torch.no_grad()")
    if in_transform():
        raise RuntimeError(
            "penalties differentiate by torch.autograd, and cannot be called inside torch.func.grad, vmap or another "
            "transform of torch.func: compute the logits there, and the penalty outside"
        )
    if not is_floating(inputs):
        raise TypeError(f"inputs must be a tensor of floating point numbers, got {kind(inputs)}")
    if inputs.dim() == 0 or len(inputs) == 0:
        raise ValueError(f"inputs must be (B, ...) with at least one sample, got {tuple(inputs.shape)}")
    if inputs.is_inference():
        raise ValueError("inputs must not come from torch.inference_mode(): clone them outside of it")
    if isinstance(output, Tensor) and not inputs.requires_grad:
        raise ValueError(
            "inputs must require grad where output is logits: compute these from inputs.requires_grad_(), "
            "or give the model as output"
        )


def check_kept(inputs: Any) -> None:
    """That a model can keep its inputs for a backward pass: a tensor, or those in a dict, a list or a tuple.

    Raises:
        ValueError: from inference mode, with gradients on.
    """
    if isinstance(inputs, Tensor):
        if inputs.is_inference() and torch.is_grad_enabled():
            raise ValueError("inputs must not come from torch.inference_mode(): clone them outside of it")
    elif isinstance(inputs, Mapping | list | tuple):
        for value in inputs.values() if isinstance(inputs, Mapping) else inputs:
            check_kept(value)


def check_logits(logits: Any, inputs: Any) -> None:
    """Of inputs that are no tensor, such as a dict of them, the samples are not counted.

    Raises:
        TypeError: no tensor of floating point numbers.
        ValueError: not (B, C) with B the inputs' samples and at least one class.
    """
    if not is_floating(logits):
        raise TypeError(f"output must be, or compute, one tensor of floating point logits (B, C), got {kind(logits)}")
    if logits.dim() != 2 or logits.numel() == 0:
        raise ValueError(
            f"output must be logits (B, C) with at least one sample and one class, got {tuple(logits.shape)}"
        )
    if isinstance(inputs, Tensor) and (inputs.dim() == 0 or len(inputs) != len(logits)):
        raise ValueError(f"output has {len(logits)} samples, but inputs are {tuple(inputs.shape)}")


def check_targets(targets: Any, inputs: Tensor, *, classes: bool) -> None:
    """That there is one for each sample; with ``classes``, the index of one.

    Raises:
        TypeError: no tensor, or not int64.
        ValueError: a wrong shape, or from inference mode.
    """
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets must be a tensor, got {kind(targets)}")
    if targets.dim() == 0 or len(targets) != len(inputs):
        raise ValueError(f"targets must be as many as inputs, {len(inputs)}, got {tuple(targets.shape)}")
    if classes and targets.dtype != torch.int64:
        raise TypeError(f"targets must be class indices of torch.int64, or loss= be given, got {targets.dtype}")
    if classes and targets.dim() != 1:
        raise ValueError(f"targets must be (B,) class indices, or loss= be given, got {tuple(targets.shape)}")
    if targets.is_inference():
        raise ValueError("targets must not come from torch.inference_mode(): clone them outside of it")


def check_classes(targets: Tensor, logits: Tensor) -> None:
    """That class indices are among the logits'. On a CPU alone: elsewhere it would wait for the device, on which
    cross_entropy checks them, -100 among them.

    Raises:
        ValueError: an index out of range.
    """
    if targets.device.type != "cpu":
        return
    least, most = (int(bound) for bound in targets.aminmax())
    if least < 0 or most >= logits.shape[1]:
        wrong = least if least < 0 else most
        raise ValueError(f"targets must be class indices from 0 to {logits.shape[1] - 1}, got {wrong}")


def check_losses(losses: Any, logits: Tensor, differentiable: bool) -> None:
    """Raises:
    ValueError: what ``loss`` returned is not a number a sample, that depends on the logits where it has to."""
    if not isinstance(losses, Tensor) or losses.shape != logits.shape[:1]:
        got = tuple(losses.shape) if isinstance(losses, Tensor) else kind(losses)
        raise ValueError(f"loss must return a loss a sample, shape ({len(logits)},), got {got}")
    if differentiable and not losses.requires_grad:
        raise ValueError("loss must return what depends on the logits by operations with a gradient")


def check_projections(z: Any) -> None:
    """Raises:
    TypeError: no tensor of floating point numbers.
    ValueError: from inference mode."""
    if not is_floating(z):
        raise TypeError(f"z must be a tensor of floating point numbers, got {kind(z)}")
    if z.is_inference():
        raise ValueError("z must not come from torch.inference_mode(): clone it outside of it")


def check_directions(z: Tensor) -> None:
    """That projections have lengths to be divided by. On a CPU alone: elsewhere it would wait for the device, and one
    of zeros makes the penalty NaN.

    Raises:
        ValueError: a projection of zeros.
    """
    if z.device.type == "cpu" and not bool(z.any(dim=-1).all()):
        raise ValueError("z must have a length other than 0 in each projection where normalized=True, got zeros")


def check_count(name: str, value: Any) -> None:
    """Raises:
    ValueError: not an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def check_number(name: str, value: Any, most: float = math.inf) -> None:
    """Raises:
    ValueError: not a finite number from 0 to ``most``."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not 0 <= value <= most or not math.isfinite(value):
        expected = "of at least 0" if most == math.inf else f"from 0 to {most:g}"
        raise ValueError(f"{name} must be a finite number {expected}, got {value!r}")


def in_transform() -> bool:
    """Whether the caller is inside a transform of torch.func, where no tensor can come to require grad."""
    try:
        torch.empty(0, device="cpu").requires_grad_()
    except RuntimeError:
        return True
    return False


def is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def kind(value: Any) -> str:
    """Of a tensor its dtype, of anything else its type."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
