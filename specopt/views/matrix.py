"""Matrix views: how a parameter is read as matrices, and which bare tensors are read as one at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from specopt.kernels import MAX_COLUMNS

from ..sharding.cut import is_distributed
from .part_state import PartState
from .parts import parse, piece, piece_shape, pieces

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


SCALING = ("norm", "mode", "target", "rank", "every", "raise_small")
"""What a group has of Norm Scaling."""


def scaling(group: Mapping[str, Any], name: str, default: Any) -> Any:
    """An option of Norm Scaling's where the group is under it; the base may have one of the same name, as GaLore has
    ``rank``."""
    return group[name] if all(option in group for option in SCALING) else default


def block_of(group: Mapping[str, Any]) -> int:
    """The group's ``block``; four columns for each triplet where a rule corrects more than one, if that is more."""
    rank = scaling(group, "rank", 1)
    return int(group["block"] if rank in (1, "full") else min(max(group["block"], 4 * rank), MAX_COLUMNS))


def is_controlled(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether the weight is controlled, from its shape and its group's ``spectral`` and ``view``.

    Without a module to ask, only shapes that can hardly be anything but a dense map are: 2-D tensors, and 4-D or 5-D
    tensors (conv kernels) with more than one input channel and more than one output channel. A position table, stacked
    experts, a depthwise kernel or a scan matrix read as one matrix would be scaled to nonsense. Another view than
    ``"auto"`` vouches for any tensor of two or more dimensions, ``spectral=False`` turns control off.
    """
    if not group["spectral"] or not could_be_controlled(param):
        return False
    return group["view"] != "auto" or param.ndim == 2 or (param.ndim in (4, 5) and min(param.shape[:2]) > 1)


def could_be_controlled(param: Tensor) -> bool:
    """Whether it is a dense real tensor with two dimensions or more, and not empty; no frozen one that holds other
    tensors in the place of its numbers, as a quantized weight does. (DTensors do so too, and can be read.)"""
    if is_traceable_wrapper_subclass(param) and not (param.requires_grad or is_distributed(param)):
        return False
    return param.ndim >= 2 and param.dtype in DTYPES and param.layout == torch.strided and param.numel() > 0


def check_readable(param: Tensor, group: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: a parameter not yet initialized; one that its group's view does not fit, or no view without a copy.
    """
    if group["spectral"] and is_lazy(param):
        raise ValueError(
            "a parameter is not initialized yet: run the model once, so that its lazy modules take their shapes, "
            "before the optimizer is made"
        )
    if is_controlled(param, group):
        view = parse(group["view"])
        whole = torch.empty_strided(param.shape, param.stride(), device="meta") if is_distributed(param) else param
        readable(pieces(whole.detach(), view)[0], copies=view.moves_dimensions)


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


def readable(part: Tensor, *, copies: bool) -> bool:
    """Whether a piece is a matrix where it lies. A transposed conv's is one in channels-last memory alone, so with
    ``copies`` another has to be read through a copy."""
    try:
        matrix_view(part)
    except ValueError:
        if copies:
            return False
        raise
    return True


@dataclass(frozen=True)
class Matrix:
    """One matrix of a controlled weight in one step."""

    param: Tensor
    group: dict[str, Any]
    state: MutableMapping[str, Any]
    """``optimizer.state[param]``, or the part's share of it."""
    piece: Tensor
    """The weight, or its part that is this matrix, as ``(out, in, *kernel)``; shares memory with the parameter."""
    weight: Tensor
    """The piece's matrix view, transposed where ``flipped``. Where the piece is no matrix in memory, that of a copy."""
    columns: int
    """``k``, the columns of its block."""
    flipped: bool
    """A matrix with few rows is read transposed, so that the block spans its whole row space."""
    part: int | None = None
    """Which of the matrices of its parameter; None for the only one."""
    copy: Tensor | None = None
    """The piece once more, in memory of its own, where only so it can be read as a matrix."""
    place: int = 0
    """Of the parameter in its group."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out, in, *kernel)``; where the parameter is sharded, of the whole of it."""
        return piece_shape(tuple(self.param.shape), parse(self.group["view"]))[1]

    @property
    def sizes(self) -> tuple[int, int]:
        """Rows and columns of the whole matrix, as it is read."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def complete(self) -> bool:
        """The block is the whole space: one product gives the exact triplets, and there is nothing to track."""
        return self.columns == self.weight.shape[1]

    @property
    def block(self) -> int:
        """The columns of a product with it."""
        return block_of(self.group)

    @property
    def fills_parameter(self) -> bool:
        """It is the whole parameter, where that lies."""
        return self.part is None and self.copy is None

    @property
    def suffix(self) -> str:
        """What tells it from the other matrices of its parameter, behind the parameter's name."""
        return "" if self.part is None else f"[{self.part}]"

    @property
    def gradient(self) -> Tensor:
        """The gradient, read like the weight; maybe of a copy."""
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
        """A tensor shaped and laid out like the parameter, read the same way as the weight: through a copy if it is."""
        part = self._piece_of(tensor)
        if self.copy is None:
            view = matrix_view(part, like=self.piece)
        else:
            view = torch.empty_like(self.copy).copy_(part).flatten(1)
        return view.mT if self.flipped else view

    def store(self, view: Tensor, tensor: Tensor) -> None:
        """Takes what was written into a :meth:`view_of` the tensor back into it, where that was of a copy."""
        if self.copy is not None:
            matrix = view.mT if self.flipped else view
            self._piece_of(tensor).copy_(matrix.view(self.piece.shape))

    def _piece_of(self, tensor: Tensor) -> Tensor:
        return piece(tensor, parse(self.group["view"]), self.part or 0)


def matrices_of(
    param: Tensor, group: dict[str, Any], state: MutableMapping[str, Any], columns: int, place: int = 0
) -> list[Matrix]:
    """The matrices of a controlled weight, each with a block of ``columns`` columns, or a complete one.

    Complete where the smaller side is at most twice the block: one product as wide as that side costs no more than a
    pair of products with the block, and leaves nothing to be missed.
    """
    if is_distributed(param):
        from ..sharding.views import matrices_of_distributed

        return matrices_of_distributed(param, group, state, columns, place)
    view = parse(group["view"])
    parts = pieces(param.detach(), view)
    if len(parts) == 1:
        return [_matrix(param, group, state, parts[0], None, columns, view.moves_dimensions, place)]
    states = PartState.of(state, len(parts))
    return [
        _matrix(param, group, state, found, part, columns, view.moves_dimensions, place)
        for part, (found, state) in enumerate(zip(parts, states, strict=True))
    ]


def _matrix(
    param: Tensor,
    group: dict[str, Any],
    state: MutableMapping[str, Any],
    found: Tensor,
    part: int | None,
    columns: int,
    copies: bool,
    place: int = 0,
) -> Matrix:
    copy = None if readable(found, copies=copies) else found.clone(memory_format=torch.contiguous_format)
    view = matrix_view(found if copy is None else copy)
    limit = min(2 * block_of(group), MAX_COLUMNS)
    flipped = view.shape[0] < view.shape[1] and view.shape[0] <= limit
    weight = view.mT if flipped else view
    width = weight.shape[1]
    return Matrix(param, group, state, found, weight, width if width <= limit else columns, flipped, part, copy, place)


def with_options(matrix: Matrix, options: dict[str, Any], columns: int) -> Matrix:
    """The same matrix under other options, with no state."""
    group, copies = {**options, "view": matrix.group["view"]}, matrix.copy is not None
    return _matrix(matrix.param, group, {}, matrix.piece, matrix.part, columns, copies)


def refresh_copies(matrices: Sequence[Matrix]) -> None:
    """What is read through a copy, as it is now."""
    for matrix in matrices:
        if matrix.copy is not None:
            matrix.copy.copy_(matrix.piece)


@contextmanager
def written_back(matrices: Sequence[Matrix]) -> Iterator[None]:
    """Where weights that are read through a copy may be written to: the copy is of now, and goes back at the end."""
    refresh_copies(matrices)
    yield
    for matrix in matrices:
        if matrix.copy is not None:
            matrix.piece.copy_(matrix.copy)
