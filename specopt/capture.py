"""CUDA graphs: whether one is being captured, and which steps one cannot hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from specopt.kernels import tables

from .session import Ruled

if TYPE_CHECKING:
    from .batches import Batch
    from .rules.operator import Kernel


def is_captured(optimizer: Ruled) -> bool:
    """Whether a graph is being captured on a device of the optimizer's parameters."""
    devices = {group["params"][0].device for group in optimizer.param_groups if group["params"]}
    return any(tables.capturing(device) for device in devices)


def check_capture(optimizer: Ruled, batches: Iterable[Batch], kernels: Sequence[Kernel]) -> None:
    """Before anything is changed: a replay goes by what the host has counted, chosen and uploaded in the capture.

    Raises:
        RuntimeError: something of the step would be another in the next one; names a weight, why, and what to do.
    """
    found = [(kernel.param, "conv='operator' is followed from the host") for kernel in kernels]
    for batch in batches:
        reason = _reason(batch, penalizes="snr_lambda" in optimizer.rule.names)
        if reason is not None:
            found.append((batch.matrices[0].param, reason))
    if found:
        param, reason = found[0]
        raise RuntimeError(
            f"the step of {optimizer.names()[param]} {tuple(param.shape)} cannot be captured in a graph: {reason}. "
            "Capture the forward and backward pass alone and call step() after each replay, or put such weights into "
            "a group with spectral=False"
        )


def _reason(batch: Batch, penalizes: bool) -> str | None:
    if batch.is_sharded:
        return "it is cut up over ranks, and the host waits for their sums"
    if batch.period > 1 or batch.wait:
        return f"with every={batch.period} the next step is another, and a graph that is replayed makes the same one"
    if not batch.is_fused:
        return (
            "what goes by operations on lists of matrices (a rank above 1, norm='frobenius', composed rules, float64 "
            "weights) counts its steps on the host"
        )
    if penalizes and batch.base is None:
        return (
            "torch makes the base update of a penalized weight where that holds several matrices, has no state yet, or "
            "the base is another than SGD without tensors for options, and what that needs is uploaded in every step"
        )
    if any("betas" in matrix.group and not matrix.group["capturable"] for matrix in batch.matrices):
        return "AdamW counts its steps on the host unless it has capturable=True"
    return None
