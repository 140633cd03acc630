"""Matrix views: how a parameter is read as a matrix, and which bare tensors are read as one at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specopt.kernels import MAX_COLUMNS

VIEWS = ("auto", "flatten")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_controlled(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether the weight is controlled, from its shape and its group's ``spectral`` and ``view``.

    Without a module to ask, only shapes that can hardly be anything but a dense map are: 2-D tensors, and 4-D or 5-D
    tensors (conv kernels) with more than one input channel and more than one output channel. A position table, stacked
    experts, a depthwise kernel or a scan matrix read as one matrix would be scaled to nonsense. ``view="flatten"``
    vouches for any tensor of two or more dimensions, ``spectral=False`` turns control off.
    """
    if not group["spectral"] or param.dtype not in DTYPES or param.layout != torch.strided or param.numel() == 0:
        return False
    if group["view"] == "flatten":
        return param.ndim >= 2
    return param.ndim == 2 or (param.ndim in (4, 5) and param.shape[0] > 1 and param.shape[1] > 1)


def matrix_view(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """The view ``(out, in·k·k)`` of a weight, sharing its memory.

    Trailing dimensions are taken in the order of their strides (or of those of ``like``), which permutes columns
    and so leaves singular values alone; that is what makes a channels-last kernel a matrix without a copy.

    Raises:
        ValueError: memory with gaps between the trailing dimensions, which no matrix of two strides describes.
    """
    if tensor.ndim == 2:
        return tensor
    strides = (tensor if like is None else like).stride()
    order = sorted(range(1, tensor.ndim), key=lambda dim: (-strides[dim], dim))
    try:
        return tensor.permute(0, *order).view(tensor.shape[0], -1)
    except RuntimeError:
        raise ValueError(
            f"a weight of shape {tuple(tensor.shape)} and strides {tensor.stride()} cannot be read as a matrix without "
            "a copy; make it contiguous, or turn control off for it with spectral=False"
        ) from None


@dataclass(frozen=True)
class Matrix:
    """One controlled weight in one step."""

    param: Tensor
    group: dict[str, Any]
    state: dict[str, Any]
    """``optimizer.state[param]``."""
    weight: Tensor
    """The matrix view, transposed where ``flipped``."""
    columns: int
    """``k``, the columns of its block."""
    flipped: bool
    """A matrix with few rows is read transposed, so that the block spans its whole row space."""

    @property
    def complete(self) -> bool:
        """The block is the whole space: one product gives the exact triplets, and there is nothing to track."""
        return self.columns == self.weight.shape[1]

    @property
    def gradient(self) -> Tensor:
        """The gradient, read like the weight."""
        return self.view_of(self.gradient_storage)

    @property
    def gradient_storage(self) -> Tensor:
        """The gradient, in the parameter's shape and order in memory; a copy where it lies in another."""
        grad = self.param.grad
        assert grad is not None
        return grad if self.is_like(grad) else self.empty_like().copy_(grad)

    def empty_like(self) -> Tensor:
        """Laid out like the parameter, also where that has gaps in memory, which ``torch.empty_like`` closes."""
        return torch.empty_strided(
            self.param.shape, self.param.stride(), dtype=self.param.dtype, device=self.param.device
        )

    def is_like(self, tensor: Tensor) -> bool:
        """Whether a tensor shaped like the parameter is its like in dtype, device and order in memory."""
        if (tensor.shape, tensor.dtype, tensor.device) != (self.param.shape, self.param.dtype, self.param.device):
            return False
        if tensor.stride() == self.param.stride():
            return True
        try:
            return self.view_of(tensor).stride() == self.weight.stride()
        except ValueError:
            return False

    def view_of(self, tensor: Tensor) -> Tensor:
        """A tensor shaped and laid out like the parameter, read the same way as the weight."""
        view = matrix_view(tensor, like=self.param)
        return view.mT if self.flipped else view


def as_matrix(param: Tensor, group: dict[str, Any], state: dict[str, Any], columns: int) -> Matrix:
    """The controlled weight with a block of ``columns`` columns, or a complete one.

    Complete where the smaller side is at most twice the block: one product as wide as that side costs no more than a
    pair of products with the block, and leaves nothing to be missed.
    """
    view = matrix_view(param.detach())
    limit = min(2 * group["block"], MAX_COLUMNS)
    flipped = view.shape[0] < view.shape[1] and view.shape[0] <= limit
    weight = view.mT if flipped else view
    width = weight.shape[1]
    return Matrix(param, group, state, weight, width if width <= limit else columns, flipped)
