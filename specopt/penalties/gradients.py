"""Penalties that take one backward pass: the gradient of the loss, and random projections of the logits' Jacobian."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .checking import (
    check_classes,
    check_count,
    check_differentiable,
    check_directions,
    check_losses,
    check_projections,
    check_targets,
)
from .graph import Output, graph_of, without_autocast

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of logits (B, C) and targets: a loss a sample, (B,)."""

NO_INDEX = torch.iinfo(torch.int64).min
"""One that no target has, for an option of torch that cannot be switched off."""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """``−log softmax(logits_i)[targets_i]`` of each sample: (B,), for logits (B, C) and class indices (B,). No index is
    ignored: of -100, which torch ignores by default, there is as little a class as of any other out of range.

    Where the target is the likelier half, it is ``−log(1 − q)`` with q the sum of the other probabilities, so that loss
    and gradient keep their digits however near to 1 the prediction is: torch's ``1 − p`` has none in float32 once the
    target's logit is 17 above the others.

    Raises:
        IndexError: an index out of range, on a CPU. The kernels of CUDA and XPU stop at their own check of it.
    """
    log_p = logits.log_softmax(dim=1)
    losses = F.nll_loss(log_p, targets, reduction="none", ignore_index=NO_INDEX)
    others = log_p.exp().scatter(1, targets[:, None], 0).sum(dim=1)
    near = others < 0.5
    return torch.where(near, -(-torch.where(near, others, 0)).log1p(), losses)


def double_backprop(output: Output, inputs: Tensor, targets: Tensor, *, loss: Loss = cross_entropy) -> Tensor:
    """``1/B Σ_i ‖∂l_i/∂x_i‖₂²``, with ``l_i`` the loss of sample i.

    Sources: Drucker and LeCun, "Improving Generalization Performance Using Double Backpropagation" (IEEE Transactions
    on Neural Networks 3(6), 1992), who add a term in the squared input gradients to the energy; in this scaling Varga,
    Csiszárik and Zombori, "Gradient Regularization Improves Accuracy of Discriminative Models" (arXiv 1712.09936).

    ============================================================================  ==================
    another form of the term                                                      is
    ============================================================================  ==================
    summed over the batch, ``Σ_i ‖∂l_i/∂x_i‖²``                                   ``B`` times this
    half of the square                                                            ``1/2`` of this
    from the gradient of the mean loss, ``1/B Σ_i ‖∂L/∂x_i‖²``, ``L = 1/B Σ l``   ``1/B²`` of this
    the same summed over the batch, ``‖∂L/∂x‖²`` of the whole tensor              ``1/B`` of this
    ============================================================================  ==================

    Args:
        output: logits (B, C), or the model.
        inputs: (B, ...).
        targets: class indices (B,); with another ``loss``, what it takes, B in its first dimension.
        loss: a loss for each sample, (B,), from logits in float32 or float64 and targets; without autocast. A loss that
            scales by s gives s² times the penalty.

    Raises:
        TypeError, ValueError, RuntimeError: what no such gradient can be taken of, by name.
    """
    check_differentiable(inputs, output)
    check_targets(targets, inputs, classes=loss is cross_entropy)
    graph = graph_of(output, inputs)
    with without_autocast(graph.logits.device):
        losses = losses_of(loss, graph.logits, targets)
        return graph.mean_square(graph.gradient(losses.sum()))


def spect_reg(
    output: Output,
    inputs: Tensor,
    targets: Tensor | None = None,
    *,
    per_sample: bool = False,
    normalized: bool = False,
    projections: int = 1,
    generator: Generator | None = None,
    z: Tensor | None = None,
) -> Tensor:
    """``1/B Σ_i 1/n Σ_k ‖z_kᵀ J_g(x_i)‖₂²``: by default n = 1, with one ``z ~ N(0, I_C)`` for the whole batch.

    Its expectation over z is :func:`frob_reg`, since ``E[z zᵀ] = I``; with ``normalized`` it is ``frob_reg / C``. The
    standard deviation of a single sample's term is ``√2 ‖J Jᵀ‖_F``. A z for the whole batch has the samples err alike;
    one for each sample, or more projections, averages over them. Where samples depend on each other (batch norm in
    training mode) only one z for the batch has this expectation: with one for each sample it is the mean over i of
    ``Σ_j ‖∂g(x_j)/∂x_i‖_F²``, without the products of different j.

    Source: Varga, Csiszárik and Zombori, "Gradient Regularization Improves Accuracy of Discriminative Models" (arXiv
    1712.09936), SpectReg. Their code names ``slopes_i = ‖zᵀ J_g(x_i)‖₂``, with one z a batch that is not normalized;
    this is ``mean(slopes²)``.

    ==================================================================  ============================================
    another form                                                        is
    ==================================================================  ============================================
    Hoffman, Roberts and Yaida, "Robust Learning with Jacobian          ``1/2 · C`` times this, with
    Regularization" (arXiv 1908.02729), their JacobianReg(n): z on      ``per_sample=True, normalized=True,
    the sphere, times C, and half the square                            projections=n``; in expectation half of the
                                                                        default
    summed over the batch                                               ``B`` times this
    half of the square                                                  ``1/2`` of this
    ==================================================================  ============================================

    Args:
        output: logits (B, C), or the model.
        inputs: (B, ...).
        targets: not looked at; there so that all penalties are called alike.
        per_sample: draw a z for each sample.
        normalized: divide each z by its length, whatever its scale. One of zeros, which has none, is refused on a CPU;
            on a device, where that would be a wait, it makes the penalty NaN.
        projections: n. They take n times the memory and the work of one.
        generator: that z is drawn by, on its own device, in float32 (float64 for float64 logits); else torch's default
            of the logits' device.
        z: the projections themselves, (C,), (B, C) or (n, B, C), as constants, in place of drawn ones.

    Raises:
        TypeError, ValueError, RuntimeError: what no such gradient can be taken of, by name; z beside an option of
            the draw; z of zeros that are to be normalized.
    """
    check_count("projections", projections)
    _check_draw(z, per_sample, projections, generator)
    graph = graph_of(output, inputs)
    with without_autocast(graph.logits.device):
        cotangents = _drawn(graph.logits, per_sample, projections, generator) if z is None else _given(z, graph.logits)
        if normalized:
            cotangents = _unit(cotangents)
        return graph.mean_square(graph.derivatives(cotangents)) / len(cotangents)


def losses_of(loss: Loss, logits: Tensor, targets: Tensor, differentiable: bool = True) -> Tensor:
    """One a sample, in the precision of the logits.

    Args:
        differentiable: whether they have to be; those of a frozen model, at inputs that are data, are not.

    Raises:
        ValueError: targets out of range, or another result.
    """
    if loss is cross_entropy:
        check_classes(targets, logits)
    losses = loss(logits, targets)
    check_losses(losses, logits, differentiable)
    return losses.to(logits.dtype)


def _drawn(logits: Tensor, per_sample: bool, projections: int, generator: Generator | None) -> Tensor:
    """(n, B, C), of independent standard normal numbers, alike for all samples unless ``per_sample``."""
    samples, classes = logits.shape
    device = logits.device if generator is None else generator.device
    shape = (projections, samples if per_sample else 1, classes)
    z = torch.randn(shape, generator=generator, device=device, dtype=logits.dtype)
    return z.to(logits.device).expand(projections, samples, classes)


def _given(z: Tensor, logits: Tensor) -> Tensor:
    """(n, B, C).

    Raises:
        ValueError: of another shape, or on another device."""
    samples, classes = logits.shape
    fits = z.shape in ((classes,), (samples, classes)) or (z.dim() == 3 and z.shape[1:] == (samples, classes))
    if not fits or len(z) == 0:
        allowed = f"({classes},), ({samples}, {classes}) or (n, {samples}, {classes})"
        raise ValueError(f"z must be {allowed} for logits {tuple(logits.shape)}, got {tuple(z.shape)}")
    if z.device != logits.device:
        raise ValueError(f"z must be on the logits' device, {logits.device}, got {z.device}")
    z = z.detach().to(logits.dtype)
    return z if z.dim() == 3 else z.expand(1, samples, classes)


def _unit(z: Tensor) -> Tensor:
    """``z / ‖z‖₂`` along the last dimension, by way of the largest entry, whose square neither vanishes nor overflows.

    Raises:
        ValueError: zeros, on a CPU.
    """
    check_directions(z)
    z = z / z.abs().amax(dim=-1, keepdim=True)
    length: Tensor = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    return z / length


def _check_draw(z: Tensor | None, per_sample: bool, projections: int, generator: Generator | None) -> None:
    """Raises:
    TypeError: another type.
    ValueError: z, and an option of what it takes the place of."""
    if generator is not None and not isinstance(generator, Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if z is None:
        return
    check_projections(z)
    options = {"per_sample": per_sample, "projections": projections > 1, "generator": generator is not None}
    given = [name for name, differs in options.items() if differs]
    if given:
        raise ValueError(f"z takes the place of what is drawn, so that {given[0]} cannot be given beside it")
