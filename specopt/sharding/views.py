"""DTensor parameters as matrices: of each, what this rank holds."""

from __future__ import annotations

import math
import sys
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from specopt.kernels import MAX_COLUMNS

from ..views.matrix import Matrix, block_of, readable
from ..views.part_state import PartState
from ..views.parts import View, parse, pieces
from .cut import (
    Cut,
    Index,
    Part,
    Sharers,
    count_of,
    cut_dimensions,
    flattened,
    held,
    is_cut,
    local_of,
    narrowed,
    placed_like,
    sharers_of,
)

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class LocalMatrix(Matrix):
    """A matrix of a DTensor. ``piece`` and ``weight`` are of the memory of this rank, which may be none; shapes that
    options go by, ``shape`` and ``columns``, are of the whole."""

    order: tuple[int, ...] = ()
    """The dimensions of a piece behind the first, as the columns run through them: slowest first."""
    held: tuple[Index, ...] = ()
    """By dimension of the parameter the places that this rank holds."""

    @property
    def gradient_storage(self) -> Tensor:
        """This rank's part of the gradient, cut up and laid out like the weight."""
        param: Any = self.param
        found, like = local_of(placed_like(param.grad, param)), local_of(param.detach())
        if found.stride() == like.stride():
            return found
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device).copy_(found)

    def view_of(self, tensor: Tensor) -> Tensor:
        part = self._piece_of(tensor)
        if self.copy is not None:
            part = torch.empty_like(self.copy).copy_(part)
        view = _flat(part, self.order)
        return view.mT if self.flipped else view

    def store(self, view: Tensor, tensor: Tensor) -> None:
        if self.copy is not None:
            matrix = view.mT if self.flipped else view
            part = self._piece_of(tensor)
            moved = part.permute(0, *self.order)
            moved.copy_(matrix.view(moved.shape))

    def _piece_of(self, tensor: Tensor) -> Tensor:
        shape, view = tuple(self.param.shape), parse(self.group["view"])
        return local_piece(local_of(tensor), self.held, shape, view, self.part or 0)[0]


@dataclass(frozen=True)
class ShardedMatrix(LocalMatrix):
    """One that is cut up over the ranks of a mesh."""

    cut: Cut = field(default_factory=lambda: Cut((0, 0), slice(0, 0), slice(0, 0), Sharers((), ()), (False, False)))

    @property
    def complete(self) -> bool:
        return self.columns == self.cut.shape[1]

    @property
    def sizes(self) -> tuple[int, int]:
        return self.cut.shape

    @property
    def turned(self) -> ShardedMatrix:
        """The same matrix, read transposed."""
        return replace(self, weight=self.weight.mT, flipped=not self.flipped, cut=self.cut.mT)

    def in_pieces(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """A DTensor of what every rank has of a block that is cut up as the matrix is: what a checkpoint knows how to
        cut up otherwise."""
        module: Any = sys.modules["torch.distributed.tensor"]
        param: Any = self.param
        placements = [place if place.is_replicate() else _along_rows(place) for place in param.placements]
        stride = (shape[1], 1)
        found: Any = module.DTensor.from_local(
            rows.to("meta"), param.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
        )
        found._local_tensor = rows  # from_local would move it to the mesh's device; FSDP may keep weights on the CPU
        return cast(Tensor, found)


def matrices_of_distributed(
    param: DTensor, group: dict[str, Any], state: MutableMapping[str, Any], columns: int, place: int = 0
) -> list[Matrix]:
    """As :func:`specopt.views.matrices_of`: of a DTensor, :class:`LocalMatrix` where every rank has all of it, else
    :class:`ShardedMatrix`."""
    view = parse(group["view"])
    whole = _whole_pieces(param, view)
    states: Sequence[MutableMapping[str, Any]] = [state] if len(whole) == 1 else PartState.of(state, len(whole))
    made = _Maker(param, group, columns, place, view)
    parts: Sequence[int | None] = [None] if len(whole) == 1 else range(len(whole))
    return [made(own, like, part) for part, own, like in zip(parts, states, whole, strict=True)]


def with_options(matrix: ShardedMatrix, options: dict[str, Any], columns: int) -> ShardedMatrix:
    """The same matrix under other options, with no state, as the parameter's view reads it."""
    param: Any = matrix.param
    made = matrices_of_distributed(param, {**options, "view": matrix.group["view"]}, {}, columns)[matrix.part or 0]
    assert isinstance(made, ShardedMatrix)
    return replace(made, state={})


def local_parts(param: DTensor, view: View) -> list[Part]:
    """The matrices of a parameter, as far as they lie here."""
    local, places = local_of(param.detach()), held(param)
    shapes = [tuple(whole.shape) for whole in _whole_pieces(param, view)]
    found = (local_piece(local, places, tuple(param.shape), view, i) for i in range(len(shapes)))
    return [Part(here, kept, shape) for (here, kept), shape in zip(found, shapes, strict=True)]


def _whole_pieces(param: DTensor, view: View) -> list[Tensor]:
    """Laid out as the pieces of the whole parameter, without memory. Dimensions that a view joins are left apart: each
    of them may be cut."""
    like = torch.empty_strided(param.shape, param.stride(), device="meta")
    return [like] if view.kind == "bilinear" else pieces(like, view)


class _Maker:
    """Makes the matrices of one parameter."""

    def __init__(self, param: DTensor, group: dict[str, Any], columns: int, place: int, view: View) -> None:
        self.param, self.group, self.columns, self.place, self.view = param, group, columns, place, view
        self.local = local_of(param.detach())
        self.held = tuple(held(param))
        self.sharers = sharers_of(param)

    def __call__(self, state: MutableMapping[str, Any], like: Tensor, part: int | None) -> Matrix:
        """The matrix whose whole piece is laid out like a tensor (without memory)."""
        found, places = local_piece(self.local, self.held, tuple(self.param.shape), self.view, part or 0)
        order = _order(like, copies=self.view.moves_dimensions)
        copy = None if _lies_in(found, order) else _rearranged(found, order)
        view = _flat(found if copy is None else copy, order)
        shape = like.shape[0], math.prod(like.shape[1:])
        limit = min(2 * block_of(self.group), MAX_COLUMNS)
        flipped = shape[0] < shape[1] and shape[0] <= limit
        width = min(shape) if flipped else shape[1]
        common: dict[str, Any] = {
            "param": self.param,
            "group": self.group,
            "state": state,
            "piece": found,
            "weight": view.mT if flipped else view,
            "columns": width if width <= limit else self.columns,
            "flipped": flipped,
            "part": part,
            "copy": copy,
            "place": self.place,
            "order": order,
            "held": self.held,
        }
        if not is_cut(self.param):
            return LocalMatrix(**common)
        trailing = [places[dimension] for dimension in order], [like.shape[dimension] for dimension in order]
        cut = Cut(shape, places[0], flattened(*trailing), self.sharers, _cuts(cut_dimensions(self.param), self.view))
        return ShardedMatrix(**common, cut=cut.mT if flipped else cut)


def local_piece(
    local: Tensor, places: Sequence[Index], shape: tuple[int, ...], view: View, part: int
) -> tuple[Tensor, list[Index]]:
    """What a rank holds of one of the pieces of a parameter of this shape: a view of its memory, and by dimension of
    the piece the places."""
    found, kept = local, list(places)
    if view.kind.startswith("stack"):
        at, here = narrowed(kept[0], part, part + 1)
        kept = kept[1:]
        if count_of(here) == 1:
            found = local[at.start]
        else:  # of a matrix that lies on other ranks
            found, kept[0] = local.new_empty(0, *local.shape[2:]), slice(0, 0)
    elif view.groups > 1:
        cut = 1 if view.kind == "columns" else 0
        length = shape[cut] // view.groups
        at, kept[cut] = narrowed(kept[cut], part * length, (part + 1) * length)
        found = local.narrow(cut, at.start, at.stop - at.start)
    if view.moves_dimensions:
        found, kept[:2] = found.transpose(0, 1), kept[1::-1]
    return found, kept


def _cuts(dimensions: set[int], view: View) -> tuple[bool, bool]:
    """Whether the rows and whether the columns of pieces are cut up, as these dimensions of the parameter are. A piece
    of a stack that lies on some ranks alone counts as cut where the others have nothing: see :func:`local_piece`."""
    if view.kind.startswith("stack"):
        dimensions = {max(dimension - 1, 0) for dimension in dimensions}
    first = 1 if view.moves_dimensions else 0
    return first in dimensions, bool(dimensions - {first})


def _order(like: Tensor, *, copies: bool) -> tuple[int, ...]:
    """Of the dimensions behind the first: by their strides where the whole is a matrix in memory, which is what every
    rank can know alike, else as they are."""
    trailing = range(1, like.ndim)
    if not readable(like, copies=copies):
        return tuple(trailing)
    return tuple(sorted(trailing, key=lambda dimension: (-like.stride()[dimension], dimension)))


def _along_rows(placement: Any) -> Any:
    """The placement of a parameter's dimension, for the rows of a block."""
    module: Any = sys.modules["torch.distributed.tensor"]
    factor = getattr(placement, "split_factor", None)
    return module.Shard(0) if factor is None else type(placement)(0, split_factor=factor)


def _flat(part: Tensor, order: Sequence[int]) -> Tensor:
    moved = part.permute(0, *order)
    return moved.view(moved.shape[0], math.prod(moved.shape[1:]))


def _lies_in(part: Tensor, order: Sequence[int]) -> bool:
    """Whether a piece can be read as a matrix where it lies, its columns in this order."""
    try:
        _flat(part, order)
    except RuntimeError:
        return False
    return True


def _rearranged(part: Tensor, order: Sequence[int]) -> Tensor:
    """A copy that can."""
    back = [0, *(1 + list(order).index(dimension) for dimension in range(1, part.ndim))]
    return part.permute(0, *order).clone(memory_format=torch.contiguous_format).permute(back)
