"""Parameters that every rank takes whole: one sum brings them, and each rank keeps its own part of what they become."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from .communicators import communicators
from .cut import Part, held, is_cut, is_distributed, local_of, sharers_of
from .exchange import Asked, Exchange


class Whole:
    """All of a parameter: its own memory; or, where it is cut up over ranks, what :func:`gather` has brought."""

    def __init__(self, param: Tensor) -> None:
        here = local_of(param.detach())
        self.param, self.part, self.values = param, Part.all_of(here), here
        """``values`` is of the shape of the whole and of the parameter's dtype. Before anything is gathered it has no
        memory, and so cannot be taken for the parameter's."""
        if is_cut(param):
            self.part = Part(here, held(param), tuple(param.shape))
            self.values = torch.empty(param.shape, dtype=param.dtype, device="meta")

    @property
    def is_cut(self) -> bool:
        return is_cut(self.param)

    def store(self, values: Tensor) -> None:
        """Into the parameter, of which other ranks store theirs, rounded to its dtype."""
        self.values.copy_(values)
        if self.is_cut:
            self.part.take(self.values)

    def gradient_with(self, gained: Tensor) -> Tensor:
        """The parameter's gradient, cut up as that is, with what the whole gains added."""
        grad = cast(Tensor, self.param.grad)
        if not is_distributed(self.param):
            return grad.to(gained.dtype).add(gained).to(grad.dtype)
        copy = torch.empty_like(self.param).copy_(grad)  # which may be cut up otherwise
        here = local_of(copy)
        here.copy_(here.to(gained.dtype).add(self.part.share_of(gained)))
        return copy


def meet(wholes: Sequence[Whole]) -> None:
    """As :func:`specopt.sharding.exchange.meet`, of parameters that are cut up."""
    for whole in wholes:
        if is_cut(whole.param):
            communicators(sharers_of(whole.param), whole.part.here.device)


def gather(wholes: Sequence[Whole]) -> Exchange[None]:
    """Brings what is cut up, as it is now. Exact: of every number one rank has it, and the others add −0."""
    cut = [(whole, sharers_of(whole.param)) for whole in wholes if is_cut(whole.param)]
    if not cut:
        return
    sums = yield Asked([whole.part.amid_zeros() for whole, _ in cut], [sharers for _, sharers in cut])
    for (whole, _), total in zip(cut, sums, strict=True):
        whole.values = total
