"""Adversarial training by the fast gradient method with steps of a given l2 length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from ..recording import GENERATORS
from .checking import check_differentiable, check_number, check_targets, is_floating, kind
from .gradients import Loss, cross_entropy, losses_of
from .graph import graph_of, logits_of, without_autocast


def fgm_step(gradient: Tensor, epsilon: float) -> Tensor:
    """``η_i = ε g_i / ‖g_i‖₂`` for each sample i of a gradient (B, ...); 0 where ``g_i`` is 0. A constant, of the
    gradient's shape and dtype.

    A sample is divided by its largest entry first, in float32 (float64 for float64), so that squares neither vanish nor
    overflow. A NaN or an infinity makes its sample NaN.

    Source: Miyato, Dai and Goodfellow, "Adversarial Training Methods for Semi-Supervised Text Classification" (arXiv
    1605.07725), whose g is the gradient of ``log p(y|x)``: the minus sign before their step is that of our loss. The
    fast gradient *sign* method of Goodfellow, Shlens and Szegedy, "Explaining and Harnessing Adversarial Examples"
    (arXiv 1412.6572), ``ε sign(g)``, is the l∞ step: ``√n ε`` long in l2 where no entry of an input's n is 0.

    Raises:
        TypeError: a gradient that is no tensor of floating point numbers.
        ValueError: no sample; epsilon that is not a finite number of at least 0.
    """
    check_number("epsilon", epsilon)
    if not is_floating(gradient):
        raise TypeError(f"gradient must be a tensor of floating point numbers, got {kind(gradient)}")
    if gradient.dim() == 0 or gradient.numel() == 0:
        raise ValueError(f"gradient must be (B, ...) with at least one number, got {tuple(gradient.shape)}")
    g = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
    rows = g.reshape(len(g), -1)
    largest = rows.abs().amax(dim=1, keepdim=True)
    rows = rows / torch.where(largest == 0, 1, largest)
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    step = rows * (epsilon / torch.where(length == 0, 1, length))
    return step.view(g.shape).to(gradient.dtype)


def adversarial(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    *,
    epsilon: float,
    alpha: float | None = None,
    loss: Loss = cross_entropy,
) -> Tensor:
    """``L(x + η)``, the mean loss where each input is moved by ``η_i = ε g_i/‖g_i‖₂``, with ``g_i = ∂l_i/∂x_i``; with
    ``alpha``, the mixed objective ``α L(x) + (1 − α) L(x + η)``. The step η is a constant: nothing flows through it.

    Sources: Goodfellow, Shlens and Szegedy, "Explaining and Harnessing Adversarial Examples" (arXiv 1412.6572), the
    mixed objective, with a step by signs and α = 0.5; with this step (:func:`fgm_step`) Miyato, Dai and Goodfellow
    (arXiv 1605.07725); Yoshida and Miyato, "Spectral Norm Regularization for Improving the Generalizability of Deep
    Learning" (arXiv 1705.10941), compare with α = 0.5 and ε = 1. Without ``alpha`` it is a term beside a loss:
    ``L(x) + λ L(x + η)`` is ``1 + λ`` times the mixed objective with ``α = 1/(1 + λ)``. ε is in units of the inputs as
    the model takes them, after any normalization.

    The model runs twice, on the inputs and on the moved ones. Both see the same dropout masks: the random state of the
    CPU and of the inputs' device is put back before the second forward, and is afterwards as one forward leaves it
    (that of other devices is not: a replica of nn.DataParallel on one of these draws another mask). Batch norm in
    training mode normalizes each batch by itself and updates its running statistics twice, as two calls written by hand
    would: first from the inputs, then from the moved ones.

    Args:
        model: a callable that computes logits (B, C).
        inputs: (B, ...), which are left as they are.
        targets: class indices (B,); with another ``loss``, what it takes, B in its first dimension.
        epsilon: the length of the step, at least 0.
        alpha: the weight of the clean loss, from 0 to 1; None for the moved one alone.
        loss: a loss for each sample, (B,), from logits in float32 or float64 and targets; without autocast.

    Raises:
        TypeError, ValueError, RuntimeError: what no such gradient can be taken of, by name.
    """
    check_number("epsilon", epsilon)
    if alpha is not None:
        check_number("alpha", alpha, most=1.0)
    if isinstance(model, Tensor) or not callable(model):
        raise TypeError(f"model must be a callable that computes logits, got {type(model).__name__}")
    check_differentiable(inputs, model)
    check_targets(targets, inputs, classes=loss is cross_entropy)
    with _random_state_put_back(inputs.device):
        graph = graph_of(model, inputs)
    with without_autocast(graph.logits.device):
        losses = losses_of(loss, graph.logits, targets)
        gradient = graph.gradient(losses.sum(), differentiable=False, retain=alpha is not None)
    moved = inputs.detach() + fgm_step(gradient, epsilon)
    logits = logits_of(model, moved)
    with without_autocast(logits.device):
        there = losses_of(loss, logits, targets, differentiable=False).mean()
        return there if alpha is None else alpha * losses.mean() + (1 - alpha) * there


@contextmanager
def _random_state_put_back(device: torch.device) -> Iterator[None]:
    """That of the CPU and of the device."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        if device.type in GENERATORS:
            stack.enter_context(torch.random.fork_rng(devices=[device.index or 0], device_type=device.type))
        yield
