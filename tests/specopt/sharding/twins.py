"""A sharded optimizer beside one that has every weight whole: steps from the same state, compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from specopt.tracker.common import STATS, Stat
from tests.specopt.helpers import exact, gap_of

Make = Callable[[list[dict[str, Any]]], Any]
GAP = 0.01
"""Between singular values that follow one another, over the first: below it directions are not to be told apart."""


def wholes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """All of each tensor on every rank, by one sum over the ranks; of plain tensors themselves."""
    parts = [_in_place(t) for t in tensors if isinstance(t, DTensor)]
    if not parts:
        return list(tensors)
    packed = torch.cat([part.reshape(-1).double() for part in parts])
    dist.all_reduce(packed)
    found = iter(zip(parts, packed.split([part.numel() for part in parts]), strict=True))
    out = []
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            like, summed = next(found)
            tensor = summed.view(like.shape).to(like.dtype)
        out.append(tensor.detach())
    return out


def _in_place(tensor: DTensor) -> Tensor:
    """The local part where it belongs, the rest zero; nothing where another rank has the same."""
    mesh, places = tensor.device_mesh, tensor.placements
    whole = torch.zeros(tensor.shape, dtype=tensor.dtype)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    if any(place.is_replicate() and coordinate[d] != 0 for d, place in enumerate(places)):
        return whole
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, places)
    whole[tuple(slice(at, at + length) for at, length in zip(offset, shape, strict=True))] = tensor.to_local().detach()
    return whole


class Gap(NamedTuple):
    """How one weight came out of a step."""

    error: float
    """Of the update, over the norm of the unsharded one, beyond what rounding the weights themselves makes."""
    gap: float
    """The least of those behind a singular value that may be corrected, as the unsharded step found the weight and left
    it."""
    spectrum: float
    """The largest difference of sorted singular values, over the largest."""
    pairs: tuple[float, float]
    """Made by both."""

    @property
    def is_close(self) -> bool:
        return self.is_within(1e-5)

    def is_within(self, tolerance: float) -> bool:
        """The same update from as many products; where several directions are first, the same singular values."""
        same_pairs = self.pairs[0] == self.pairs[1] or math.isnan(self.pairs[0])
        return same_pairs and (self.error if self.gap > GAP else self.spectrum) <= tolerance


class Twins:
    """The same weights under two optimizers: DTensors under ``ours``, and whole ones under ``other``.

    What the tracker of pairs reads transposed (``turned``: it is cut by columns alone) is whole as its transposed
    matrix, so that both have the same state.
    """

    def __init__(
        self,
        ours: Any,
        other: Any,
        sharded: Sequence[nn.Parameter],
        plain: Sequence[nn.Parameter],
        turned: Sequence[bool] | None = None,
    ) -> None:
        self.ours, self.other, self.sharded, self.plain = ours, other, sharded, plain
        self.turned = [False] * len(plain) if turned is None else turned
        self.before = wholes(sharded)
        self.rank = 1
        """How many singular values the rule may correct."""

    @classmethod
    def of(
        cls,
        make: Make,
        weights: Sequence[Tensor],
        mesh: DeviceMesh,
        placements: Sequence[Placement],
        turned: Sequence[bool] | None = None,
        **options: Sequence[Any],
    ) -> Twins:
        """Of weights, all cut up alike, under optimizers that ``make`` makes of a group with these options."""
        sharded = [nn.Parameter(distribute_tensor(weight, mesh, list(placements))) for weight in weights]
        are_turned = [False] * len(weights) if turned is None else turned
        plain = [nn.Parameter(as_plain(x, t).clone()) for x, t in zip(weights, are_turned, strict=True)]
        groups = [{"params": params, **{k: list(v) for k, v in options.items()}} for params in (sharded, plain)]
        return cls(make([groups[0]]), make([groups[1]]), sharded, plain, are_turned)

    def give(self, gradients: Sequence[Tensor]) -> None:
        """Gradients that every rank has whole."""
        for param, grad in zip(self.sharded, gradients, strict=True):
            assert isinstance(param, DTensor)
            param.grad = distribute_tensor(grad, param.device_mesh, param.placements, src_data_rank=None)

    def step(self) -> list[Gap]:
        """One step of both, from the state and with the gradients of the sharded one."""
        self.ours._take_up()
        states = [dict(self.ours.state[param]) for param in self.sharded]
        tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        found = iter(wholes([*(param.grad for param in self.sharded if param.grad is not None), *tensors]))
        for param, turned in zip(self.plain, self.turned, strict=True):
            param.grad = as_plain(next(found), turned).clone()
        for i, (mine, other) in enumerate(zip(self.sharded, self.plain, strict=True)):
            other.data.copy_(as_plain(self.before[i], self.turned[i]))
            state = self.other.state[other]
            state.clear()
            for key, value in states[i].items():
                whole = next(found).clone() if isinstance(value, Tensor) else value
                like_weight = isinstance(value, Tensor) and value.shape == mine.shape
                state[key] = as_plain(whole, self.turned[i]) if like_weight else whole
        self.ours.step()
        self.other.step()
        before, self.before = self.before, wholes(self.sharded)
        return [self._compared(i, old) for i, old in enumerate(before)]

    def _compared(self, i: int, old: Tensor) -> Gap:
        mine, old = (as_plain(weight, self.turned[i]) for weight in (self.before[i], old))
        other = self.plain[i].detach()
        rounding = 8 * torch.finfo(other.dtype).eps * float(other.norm())
        beyond, moved = max(0.0, float((mine - other).norm()) - rounding), float((other - old).norm())
        error = beyond / moved if beyond else 0.0
        if other.ndim < 2:
            return Gap(error, 1.0, 0.0, (math.nan, math.nan))
        (_, values, _), (_, others, _), (_, start, _) = (exact(weight) for weight in (mine, other, old))
        spectrum = float((values - others).abs().max() / others[0])
        pairs = self._pairs(self.ours, self.sharded[i]), self._pairs(self.other, self.plain[i])
        gap = min(gap_of(each[i:]) for each in (others, start) for i in range(min(self.rank, len(each))))
        return Gap(error, gap, spectrum, pairs)

    def _pairs(self, optimizer: Any, param: Tensor) -> float:
        stats = optimizer.state[param].get(STATS)
        return math.nan if stats is None else float(stats.reshape(-1, len(Stat))[0, Stat.PAIRS])


def as_plain(tensor: Tensor, turned: bool) -> Tensor:
    return tensor.flatten(1).mT.contiguous() if turned else tensor
