"""Exact Frobenius norms of Jacobians: all classes in one backward pass, or some at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .checking import check_count
from .graph import Graph, Output, graph_of, nodes_of, without_autocast

BUDGET = 2**31
"""Bytes that the gradients of all classes may take, unless told otherwise."""


def frob_reg(
    output: Output,
    inputs: Tensor,
    targets: Tensor | None = None,
    *,
    chunk: int | None = None,
    max_bytes: int = BUDGET,
) -> Tensor:
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
    again in the backward pass. Of a LeNet (20 and 50 channels) on 28 x 28 images that is 30 times C·B·n when the
    penalty is computed, and 47 times at the peak of the backward pass. Before anything is allocated for it, the shapes
    in the graph give the bytes needed, ``2·C·Σ activations`` (63 times) and the rows that the Jacobian is multiplied
    by, and more than ``max_bytes`` is a ValueError. They are an estimate: measured peaks were 0.75 (LeNet) and 1.35
    (batch norm after every convolution) of it, beside gradients as large as the weights and the logits. Of a node that
    computes several steps inside, only what flows into it is seen: the peak was 3.7 to 6.4 times the estimate with
    torch's fused nn.LSTM on a CPU, and a torch.autograd.Function may keep what it likes.

    ``chunk`` classes at a time need ``chunk/C`` of this, in the backward pass too: each chunk is computed again there
    (torch.utils.checkpoint), for one more backward pass through the model.

    Where torch's vmap fails on the model's backward pass, as with batch or layer norm under autocast, there is one pass
    for each class in place of one for all: of the same memory, C times the launches.

    Args:
        output: logits (B, C), or the model.
        inputs: (B, ...).
        targets: not looked at; there so that all penalties are called alike.
        chunk: classes at once; None for all.
        max_bytes: the budget.

    Raises:
        TypeError, ValueError, RuntimeError: what no such gradient can be taken of, by name; a chunk that needs more
            than the budget, with one that does not.
    """
    return _squared_norm(output, inputs, UNITS, chunk, max_bytes)


def jac_reg(
    output: Output,
    inputs: Tensor,
    targets: Tensor | None = None,
    *,
    chunk: int | None = None,
    max_bytes: int = BUDGET,
) -> Tensor:
    """``1/B Σ_i ‖J_f(x_i)‖_F²``, exact, with ``J_f(x_i)`` (C, ...) the Jacobian of sample i's softmax probabilities.

    ``J_f = (diag(p) − p pᵀ) J_g``: row c is the logits' Jacobian under the cotangent ``p_c (e_c − p)``, with p as much
    a function of the weights as ``J_g`` is. The 1 − p_c of a prediction that is almost certain is made from the other
    classes, and as exact as they are.

    Source: Varga, Csiszárik and Zombori, "Gradient Regularization Improves Accuracy of Discriminative Models" (arXiv
    1712.09936), JacReg. Other forms, memory, arguments and errors are as for :func:`frob_reg`; the rows of the
    softmax take ``2·C·B·C`` numbers more.
    """
    return _squared_norm(output, inputs, OF_SOFTMAX, chunk, max_bytes)


@dataclass(frozen=True)
class Rows:
    """What the logits' Jacobian is multiplied by, for some classes at a time."""

    make: Callable[[Tensor, Tensor], Tensor]
    """Of class indices (K,) and logits (B, C): cotangents (K, B, C)."""
    numbers: Callable[[int, int], int]
    """Of B and C: those that are made for one class beside what flows into the graph, the most at once."""


def _units(classes: Tensor, logits: Tensor) -> Tensor:
    """``e_c``, alike for all samples."""
    zeros = logits.new_zeros(len(classes), logits.shape[1])
    return zeros.scatter_(1, classes[:, None], 1)[:, None].expand(-1, len(logits), -1)


def _of_softmax(classes: Tensor, logits: Tensor) -> Tensor:
    """``p_c (e_c − p)``."""
    p = logits.softmax(dim=1)
    differences = (-p).expand(len(classes), -1, -1)
    own = classes[:, None, None].expand(-1, len(p), 1)
    return p.t()[classes, :, None] * differences.scatter(2, own, _others(p).t()[classes, :, None])


def _others(p: Tensor) -> Tensor:
    """``1 − p_c`` (B, C), of a sample's likeliest class as the sum of the others: near 1 the difference is rounding."""
    top = p.argmax(dim=1, keepdim=True)
    return (1 - p).scatter(1, top, p.scatter(1, top, 0).sum(dim=1, keepdim=True))


UNITS = Rows(_units, lambda samples, classes: classes)
OF_SOFTMAX = Rows(_of_softmax, lambda samples, classes: 2 * samples * classes)


def _squared_norm(output: Output, inputs: Tensor, rows: Rows, chunk: int | None, max_bytes: int) -> Tensor:
    """``1/B Σ_i Σ_c ‖r_ciᵀ J_g(x_i)‖²``, with rows r for some classes at a time."""
    if chunk is not None:
        check_count("chunk", chunk)
    check_count("max_bytes", max_bytes)
    graph = graph_of(output, inputs)
    total = graph.logits.shape[1]
    at_once = min(chunk or total, total)
    check_budget(at_once, class_bytes(graph, rows), max_bytes)

    def part(classes: Tensor) -> Tensor:
        with without_autocast(graph.logits.device):
            return graph.mean_square(graph.derivatives(rows.make(classes, graph.logits)))

    classes = torch.arange(total, device=graph.logits.device)
    if at_once == total:
        return part(classes)
    chunks = (classes[start : start + at_once] for start in range(0, total, at_once))
    parts = [checkpoint(part, some, use_reentrant=False, preserve_rng_state=False) for some in chunks]
    return torch.stack(parts).sum()


def check_budget(classes: int, each: int, max_bytes: int) -> None:
    """Raises:
    ValueError: so many classes, of so many bytes each, need more than the budget."""
    if classes * each <= max_bytes:
        return
    fitting = max_bytes // each
    advice = f"chunk={fitting} would fit" if fitting else f"one class alone needs {each}, so max_bytes must be raised"
    raise ValueError(f"{classes} classes at once need {classes * each} bytes, max_bytes allows {max_bytes}: {advice}")


def class_bytes(graph: Graph, rows: Rows) -> int:
    """Of one class: the gradients that flow into the nodes of the graph, kept for the backward pass, as many in the
    backward pass itself, and the numbers of its row. A clone hands on the gradient that it gets."""
    flowing = (
        metadata for node in nodes_of(graph) if node.name() != "CloneBackward0" for metadata in node._input_metadata
    )
    once: int = sum(math.prod(gradient.shape) * gradient.dtype.itemsize for gradient in flowing)
    return 2 * once + rows.numbers(*graph.logits.shape) * graph.logits.dtype.itemsize
