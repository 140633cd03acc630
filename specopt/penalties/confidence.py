"""The confidence penalty: minus the entropy of the predicted distribution."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from .checking import check_kept, check_number
from .graph import logits_of, without_autocast


def confidence_penalty(
    output: Tensor | Callable[[Any], Tensor],
    inputs: Any = None,
    targets: Tensor | None = None,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    eps: float = 0.0,
) -> Tensor:
    """``1/B Σ_i Σ_c p_c log(p_c + eps)``: minus the mean entropy of ``p = softmax(logits)``, in [−log C, 0].

    Sources: Pereyra, Tucker, Chorowski, Kaiser and Hinton, "Regularizing Neural Networks by Penalizing Confident Output
    Distributions" (arXiv 1701.06548), where ``−β H(p)`` joins the loss of a sample: β times this beside a mean loss.
    Varga, Csiszárik and Zombori (arXiv 1712.09936) compare it as CP; their code takes ``reduction="sum"`` and
    ``eps=1e-6``, so that beside a mean loss their λ is ours divided by B: ``λ_sum = λ_mean / B``.

    With ``eps`` 0 the logarithm is that of log_softmax, exact however small p is. With ``eps > 0`` the value is up to
    ``C·eps`` above it. A class whose logit is ``-inf``, masked as not possible, adds 0 and has no gradient; the others
    have theirs. No gradient by the inputs is taken: they may be anything that the model takes, and under
    ``torch.no_grad()`` this is a number to log.

    Args:
        output: logits (B, C), or the model.
        inputs: what the model is called with; not needed beside logits.
        targets: not looked at; there so that all penalties are called alike.
        reduction: ``"mean"`` or ``"sum"`` over the batch.
        eps: added to p in the logarithm.

    Raises:
        TypeError, ValueError: no logits (B, C), by name; another reduction; eps that is not a finite number of at
            least 0; inputs from inference mode for a model, with gradients on.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    check_number("eps", eps)
    if not isinstance(output, Tensor):
        check_kept(inputs)
    logits = logits_of(output, inputs)
    with without_autocast(logits.device):
        log_p = logits.log_softmax(dim=1)
        p = log_p.exp()
        adds = eps >= torch.finfo(p.dtype).tiny  # less is nothing beside p, and log(0) where p has underflowed
        # 0 in place of -inf, as 0 times that would be NaN
        logarithm = (p + eps).log() if adds else log_p.masked_fill(log_p == -math.inf, 0)
        negative_entropy = (p * logarithm).sum()
        return negative_entropy / len(logits) if reduction == "mean" else negative_entropy
