"""Kernels that are controlled as operators, cut up and whole, under optimizers of every rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor

import specopt
from tests.specopt.sharding.twins import wholes

KERNELS: dict[str, tuple[int, ...]] = {
    "conv2d(6x6, padding=1x1, mode=circular)": (6, 3, 3, 3),
    "conv2d(7x5, stride=2x2, groups=2)": (4, 2, 3, 3),
    "conv1d(9)": (1, 5, 3),
    "conv3d(3x4x3)": (3, 2, 2, 1, 2),
    "transposed2d(4x4, stride=2x2)": (5, 3, 2, 2),
}
"""By geometry. Of one output channel all ranks but the first have nothing, of three one rank of four."""
CAP = specopt.NormScale(mode="cap", target=0.9)
RULES: dict[str, Any] = {
    "penalty": specopt.SpectralPenalty(0.1),
    "rescale": specopt.NormScale(mode="rescale"),
    "initial": specopt.NormScale(mode="rescale", target="initial"),
    "cap": CAP,
    "decay": specopt.SpectralDecay(1.0),
    "penalty and cap": specopt.Compose(specopt.SpectralPenalty(0.1), CAP),
    "cap and decay": specopt.Compose(CAP, specopt.SpectralDecay(1.0)),
}


def optimizer_of(kind: str, groups: Any) -> Any:
    """Of a base that makes the same bits of any part of a tensor: products with powers of 2 are exact, so it is all the
    same whether a product and a sum are rounded together, as torch does of whole vectors alone."""
    return specopt.wrap(torch.optim.SGD(groups, lr=1 / 16, momentum=0.5), RULES[kind])


def group_of(params: Sequence[Tensor], geometries: Sequence[str | None] = (), **options: Any) -> dict[str, Any]:
    texts = list(geometries or KERNELS)
    return {"params": list(params), "conv": "operator", "geometry": texts, "max_passes": 2, **options}


def kernels(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Of about the norm of a convolution's default start."""
    generator = torch.Generator().manual_seed(seed)
    found = (torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:])) for shape in KERNELS.values())
    return [kernel.to(dtype) for kernel in found]


def cut(tensor: Tensor, mesh: Any, placements: Sequence[Placement]) -> Any:
    return distribute_tensor(tensor, mesh, list(placements), src_data_rank=None)


def mesh() -> Any:
    """Of all ranks, on a line."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


def made(kind: str) -> tuple[list[Any], Any]:
    """Kernels that are cut up by output channels, and their optimizer."""
    params: list[Any] = [nn.Parameter(cut(kernel, mesh(), [Shard(0)])) for kernel in kernels()]
    return params, optimizer_of(kind, [group_of(params)])


def step(params: Sequence[Tensor], optimizer: Any) -> None:
    for param in params:
        param.grad = torch.full_like(param, 0.01)
    optimizer.step()


class Pair:
    """The same kernels under two optimizers of a kind: one has them cut up, the other whole on every rank."""

    def __init__(
        self, kind: str, mesh: Any, placements: Sequence[Placement], dtype: torch.dtype = torch.float32
    ) -> None:
        self.mesh, self.placements = mesh, placements
        self.sharded: list[Any] = [nn.Parameter(cut(kernel, mesh, placements)) for kernel in kernels(dtype)]
        self.plain = [nn.Parameter(kernel) for kernel in kernels(dtype)]
        self.ours, self.other = (optimizer_of(kind, [group_of(params)]) for params in (self.sharded, self.plain))

    def step(self, number: int, placed: Sequence[Placement] = ()) -> None:
        """With gradients that are cut up as the kernels are, or otherwise."""
        for mine, other, grad in zip(self.sharded, self.plain, kernels(self.plain[0].dtype, 1 + number), strict=True):
            other.grad, mine.grad = 0.1 * grad, cut(0.1 * grad, self.mesh, placed or self.placements)
        self.ours.step()
        self.other.step()

    def differences(self) -> list[str]:
        """What of weights and state has other bits in both, by geometry and name."""
        found = []
        for text, mine, other in zip(KERNELS, self.sharded, self.plain, strict=True):
            ours = {"weight": mine.detach(), **self.ours.state[mine]}
            others = {"weight": other.detach(), **self.other.state[other]}
            assert ours.keys() == others.keys()
            found += [f"{text}: {key}" for key in ours if not same(ours[key], others[key])]
        return found


def same(mine: Any, other: Any) -> bool:
    if not isinstance(mine, Tensor):
        return bool(mine == other)
    (whole,) = wholes([mine]) if isinstance(mine, DTensor) else (mine,)
    return torch.equal(torch.nan_to_num(whole, 7.0), torch.nan_to_num(other, 7.0))
