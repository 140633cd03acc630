"""What a rank holds of a matrix that is cut up over a device mesh."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor, Placement

Index = slice | Tensor
"""Places along a dimension, rising: a range where they follow one another."""
OUTSIDE = "a rank outside of a parameter's mesh makes no step"


@dataclass(frozen=True)
class Sharers:
    """Those among whom a tensor is cut up: equal where they are the same ranks."""

    ranks: tuple[int, ...]
    """Rising, as the default process group counts them."""
    groups: tuple[ProcessGroup, ...] = field(compare=False)
    """One for each dimension of the mesh that cuts the tensor. A sum over all of them is one over each in turn."""


@dataclass(frozen=True)
class Cut:
    """The rows and columns of an (m, n) matrix that lie on this rank."""

    shape: tuple[int, int]
    rows: Index
    columns: Index
    sharers: Sharers
    cuts: tuple[bool, bool]
    """Whether rows, and whether columns, are cut up: the same on every rank, also where one happens to have all."""

    @property
    def mT(self) -> Cut:
        """Of the transposed matrix."""
        return replace(self, shape=self.shape[::-1], rows=self.columns, columns=self.rows, cuts=self.cuts[::-1])

    @property
    def by_rows(self) -> bool:
        """Whether every rank has whole rows, each another's: ``Y = W V`` is then complete where it is made."""
        return not self.cuts[1]


class Part(NamedTuple):
    """What a rank holds of a tensor."""

    here: Tensor
    places: Sequence[Index]
    """Along each dimension."""
    shape: tuple[int, ...]
    """Of the whole."""

    @classmethod
    def all_of(cls, tensor: Tensor) -> Part:
        return cls(tensor, [slice(None)] * tensor.ndim, tuple(tensor.shape))

    def share_of(self, whole: Tensor) -> Tensor:
        """What lies in its places of a tensor of the shape of the whole."""
        for dimension, index in enumerate(self.places):
            whole = whole[(slice(None),) * dimension + (index,)]
        return whole

    def take(self, whole: Tensor) -> None:
        """Its values from a tensor of the shape of the whole."""
        self.here.copy_(self.share_of(whole))

    def amid_zeros(self) -> Tensor:
        """Of the shape of the whole, zero in all other places: summed over the ranks, the whole. The zeros are
        negative, which added to any number, to a zero too, leave its bits. Where a rank has all, that itself."""
        found = self.here
        for dimension, (index, length) in enumerate(zip(self.places, self.shape, strict=True)):
            if found.shape[dimension] < length:
                wide = found.new_full((*found.shape[:dimension], length, *found.shape[dimension + 1 :]), -0.0)
                wide[(slice(None),) * dimension + (index,)] = found
                found = wide
        return found


def is_distributed(tensor: object) -> TypeGuard[DTensor]:
    """Whether it is a DTensor. Where none has been made, ``torch.distributed`` is not imported to find that out."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory. Without a graph: under ``torch.no_grad()``."""
    if not is_distributed(tensor):
        return tensor
    local = tensor.to_local()
    wait = getattr(local, "wait", None)  # a collective of DTensor's own may still be on its way
    found: Tensor = local if wait is None else wait()
    return found


def placed_like(tensor: Any, like: DTensor) -> DTensor:
    """A DTensor with the same numbers, cut up as another of its shape is: where it is not yet, by a collective of its
    own. (``copy_`` refuses that where a dimension is shorter than the mesh that cuts it.)"""
    if tensor.placements == like.placements:
        return cast("DTensor", tensor)
    return cast("DTensor", tensor.redistribute(like.device_mesh, like.placements))


def is_cut(tensor: object) -> TypeGuard[DTensor]:
    """Whether ranks have different parts of it."""
    return is_distributed(tensor) and bool(_cutting(tensor))


def sharers_of(tensor: DTensor) -> Sharers:
    """Among whom a DTensor is cut up, this rank one of them: along the dimensions of the mesh that cut it. Nobody
    else where every rank has all of it."""
    mesh, cutting = tensor.device_mesh, _cutting(tensor)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, OUTSIDE
    line = tuple(slice(None) if d in cutting else at for d, at in enumerate(coordinate))
    return Sharers(tuple(sorted(mesh.mesh[line].flatten().tolist())), tuple(mesh.get_group(d) for d in cutting))


def cut_dimensions(tensor: DTensor) -> set[int]:
    """The dimensions along which a DTensor is cut up."""
    placements = enumerate(tensor.placements)
    return {_dimension(place) for d, place in placements if _cuts(tensor, d, place)}


def _dimension(placement: Any) -> int:
    """Along which it cuts: all placements but replicas and partial sums do."""
    return int(placement.dim)


def _cutting(tensor: DTensor) -> list[int]:
    """The dimensions of the mesh that cut it."""
    return [dimension for dimension, place in enumerate(tensor.placements) if _cuts(tensor, dimension, place)]


def _cuts(tensor: DTensor, dimension: int, placement: Placement) -> bool:
    return not placement.is_replicate() and tensor.device_mesh.size(dimension) > 1


def held(tensor: DTensor) -> list[Index]:
    """By dimension the places that this rank holds.

    Placements act from the first to the last, each on what those before it have left. A placement with a split factor
    (FSDP2 over tensor parallelism) takes its share of each of so many pieces.
    """
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, OUTSIDE
    places = [torch.arange(length) for length in tensor.shape]
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        cut = _dimension(placement)
        size, mine = tensor.device_mesh.size(dimension), coordinate[dimension]
        pieces = _chunks(places[cut], getattr(placement, "split_factor", 1))
        places[cut] = torch.cat([_chunks(piece, size)[mine] for piece in pieces])
    return [_index(found) for found in places]


def _chunks(places: Tensor, count: int) -> list[Tensor]:
    """As ``torch.chunk``, filled up with empty ones."""
    found = list(places.chunk(count)) if len(places) else []
    return found + [places[:0]] * (count - len(found))


def _index(places: Tensor) -> Index:
    if len(places) == 0:
        return slice(0, 0)
    first, last = int(places[0]), int(places[-1])
    return slice(first, last + 1) if last - first + 1 == len(places) else places


def count_of(index: Index) -> int:
    return index.stop - index.start if isinstance(index, slice) else len(index)


def narrowed(index: Index, start: int, stop: int) -> tuple[slice, Index]:
    """Of places held, where those from ``start`` to before ``stop`` lie, and these counted from ``start``."""
    places = torch.arange(index.start, index.stop) if isinstance(index, slice) else index
    first, last = (int(torch.searchsorted(places, bound)) for bound in (start, stop))
    return slice(first, last), _index(places[first:last] - start)


def flattened(indices: Sequence[Index], lengths: Sequence[int]) -> Index:
    """Places along dimensions that are read as one, the first moving slowest."""
    places = torch.zeros((), dtype=torch.long)
    for index, length in zip(indices, lengths, strict=True):
        along = torch.arange(index.start, index.stop) if isinstance(index, slice) else index
        places = places[..., None] * length + along
    return _index(places.flatten())


def spread(part: Tensor, index: Index, length: int) -> Tensor:
    """Rows in their places among ``length``, the others zero: summed over the ranks, the whole."""
    whole = part.new_zeros(length, part.shape[1])
    whole[index] = part
    return whole
