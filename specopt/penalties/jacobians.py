"""Exact Frobenius norms of Jacobians: all classes in one backward pass, or some at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .checking import check_count
from .graph import Graph, Output, graph_of, nodes_of, without_autocast

BUDGET = 2**31
"""Bytes that the gradients of all classes may take, unless told otherwise."""


def frob_reg(output: Output, inputs: Tensor, *, chunk: int | None = None, max_bytes: int = BUDGET) -> Tensor:
    """``1/B Σ_i ‖J_g(x_i)‖_F²``, exact, with ``J_g(x_i)`` (C, ...) the Jacobian of sample i's logits.

    Source: Varga, Csiszárik and Zombori, "Gradient Regularization Improves Accuracy of Discriminative Models" (arXiv
    1712.09936), FrobReg; their code makes a backward pass a class.

    ============================================================  ==========================================
    another form                                                  is
    ============================================================  ==========================================
    Hoffman, Roberts and Yaida, "Robust Learning with Jacobian    ``1/2`` of this
    Regularization" (arXiv 1908.02729), their JacobianReg(-1)
    summed over the batch                                         ``B`` times this
    mean over the entries of the Jacobian                         ``1/(C·n)`` of this, n the numbers of an input
    the unsquared norm, averaged over samples                     no multiple: it weighs samples otherwise
    ============================================================  ==========================================

    **Memory.** The Jacobian is C·B·n numbers, but a gradient for each class passes through every layer, and the
    backward pass wants them all: ``C`` times the sum of all activations between inputs and logits, and about as much
    again in the backward pass. Of LeNet-5 (20 and 50 channels) on 28 x 28 images that is 30 times C·B·n when the
    penalty is computed, and 47 times at the peak of the backward pass. Before anything is allocated for it, the shapes
    in the graph give the bytes needed, ``2·C·Σ activations`` (63 times), and more than ``max_bytes`` is a ValueError.
    They are an estimate: measured peaks were 0.75 (LeNet-5) and 1.35 (batch norm after every convolution) of it, beside
    gradients as large as the weights.

    ``chunk`` classes at a time need ``chunk/C`` of this, in the backward pass too: each chunk is computed again there
    (torch.utils.checkpoint), for one more backward pass through the model.

    Where torch's vmap fails on the model's backward pass, as with batch or layer norm under autocast, there is one pass
    for each class in place of one for all: of the same memory, C times the launches.

    Args:
        output: logits (B, C), or the model.
        inputs: (B, ...).
        chunk: classes at once; None for all.
        max_bytes: the budget.

    Raises:
        TypeError, ValueError, RuntimeError: what no such gradient can be taken of, by name; a chunk that needs more
            than the budget, with one that does not.
    """

    def rows(classes: Tensor, logits: Tensor) -> Tensor:
        identity = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
        return identity[classes, None].expand(-1, len(logits), -1)

    return _squared_norm(output, inputs, rows, chunk, max_bytes)


def jac_reg(output: Output, inputs: Tensor, *, chunk: int | None = None, max_bytes: int = BUDGET) -> Tensor:
    """``1/B Σ_i ‖J_f(x_i)‖_F²``, exact, with ``J_f(x_i)`` (C, ...) the Jacobian of sample i's softmax probabilities.

    ``J_f = (diag(p) − p pᵀ) J_g``: row c is the logits' Jacobian under the cotangent ``p_c (e_c − p)``, with p as much
    a function of the weights as ``J_g`` is.

    Source: Varga, Csiszárik and Zombori, "Gradient Regularization Improves Accuracy of Discriminative Models" (arXiv
    1712.09936), JacReg. Other forms, memory, arguments and errors are as for :func:`frob_reg`.
    """

    def rows(classes: Tensor, logits: Tensor) -> Tensor:
        p = logits.softmax(dim=1)
        identity = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
        return p.t()[classes, :, None] * (identity[classes, None] - p)

    return _squared_norm(output, inputs, rows, chunk, max_bytes)


def _squared_norm(
    output: Output, inputs: Tensor, rows: Callable[[Tensor, Tensor], Tensor], chunk: int | None, max_bytes: int
) -> Tensor:
    """``1/B Σ_i Σ_c ‖r_ciᵀ J_g(x_i)‖²``, with rows r (classes, B, C) for some classes at a time."""
    if chunk is not None:
        check_count("chunk", chunk)
    check_count("max_bytes", max_bytes)
    graph = graph_of(output, inputs)
    total = graph.logits.shape[1]
    at_once = min(chunk or total, total)
    check_budget(graph, at_once, max_bytes)

    def part(classes: Tensor) -> Tensor:
        with without_autocast(graph.logits.device):
            return graph.mean_square(graph.derivatives(rows(classes, graph.logits)))

    classes = torch.arange(total, device=graph.logits.device)
    if at_once == total:
        return part(classes)
    chunks = torch.split(classes, at_once)
    parts = [checkpoint(part, some, use_reentrant=False, preserve_rng_state=False) for some in chunks]
    return torch.stack(parts).sum()


def check_budget(graph: Graph, classes: int, max_bytes: int) -> None:
    """Raises:
    ValueError: the gradients of so many classes need more bytes than the budget."""
    each = class_bytes(graph)
    if classes * each <= max_bytes:
        return
    fitting = max_bytes // each
    advice = f"chunk={fitting} would fit" if fitting else f"one class alone needs {each}, so max_bytes must be raised"
    raise ValueError(f"{classes} classes at once need {classes * each} bytes, max_bytes allows {max_bytes}: {advice}")


def class_bytes(graph: Graph) -> int:
    """Of the gradients of one class: those that flow into the nodes of the graph, kept for the backward pass, and as
    many in the backward pass itself."""
    flowing = (metadata for node in nodes_of(graph) for metadata in node._input_metadata)
    once: int = sum(math.prod(gradient.shape) * gradient.dtype.itemsize for gradient in flowing)
    return 2 * once
