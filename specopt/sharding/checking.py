"""What cannot be controlled on shards: said where a group is added, and again where its options have changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..rules.operator import geometries_in
from ..views import is_controlled
from .cut import count_of, held, is_cut, is_distributed, local_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

INSTEAD = "or put it into a group with spectral=False"


def check_whole(params: Iterable[Tensor], what: str) -> None:
    """
    Raises:
        ValueError: a parameter of which a rank has a part only, for what reads whole weights.
    """
    for param in params:
        if is_cut(param):
            raise ValueError(
                f"{what} reads whole weights, got one of shape {tuple(param.shape)} that is cut up over ranks: ask for "
                "spectral_report(optimizer) on all of them, or take what the last step has found of it, "
                "optimizer.state[param]['spectral_stats']"
            )


def is_flattened(param: Tensor) -> bool:
    """Whether it is FSDP1's shard of several parameters, laid out in a row."""
    return param.ndim == 1 and getattr(param, "_fsdp_flattened", False)


def flattened(param: Tensor, name: str) -> ValueError:
    return ValueError(
        f"parameter {name} is a flattened shard of FullyShardedDataParallel, {param.numel()} numbers of which no "
        "matrix can be made: use torch.distributed.fsdp.fully_shard (FSDP2), whose parameters keep their shape, "
        f"{INSTEAD}"
    )


def check_sharded(param: Tensor, group: Mapping[str, Any], names: Callable[[], Mapping[Tensor, str]]) -> None:
    """Whether a parameter that is cut up over ranks can be controlled as its group asks for.

    Raises:
        ValueError: it cannot, naming it and what to do.
    """
    if group["spectral"] and is_flattened(param):
        raise flattened(param, names()[param])
    if not is_distributed(param) or not group["spectral"]:
        return
    if any(placement.is_partial() for placement in param.placements):
        raise ValueError(
            f"parameter {names()[param]} must be cut up (Shard) or repeated (Replicate), got the placements "
            f"{param.placements}: sum it up with redistribute"
        )
    told = f"the sharded {names()[param]} of shape {tuple(param.shape)}"
    if id(param) in geometries_in(group):
        _check_parts(param, told)
        return
    if is_controlled(param, group):
        _check_parts(param, told)
        _check_rounding(param, group, told)


def _check_parts(param: DTensor, told: str) -> None:
    if param.device_mesh.get_coordinate() is None:
        raise ValueError(
            f"the mesh of {told} must have in it every rank that makes an optimizer of it, got {param.device_mesh} on "
            f"the rank {param.device_mesh.get_rank()}: leave it out there, {INSTEAD}"
        )
    here, placed = tuple(local_of(param.detach()).shape), tuple(map(count_of, held(param)))
    if here != placed:
        raise ValueError(
            f"what a rank holds of {told} must have the shape {placed} that its mesh and placements {param.placements} "
            f"give it, got {here}: cut it up with fully_shard or distribute_tensor"
        )


def _check_rounding(param: DTensor, group: Mapping[str, Any], told: str) -> None:
    if group["stochastic_rounding"] and param.dtype.itemsize == 2:
        raise ValueError(
            f"stochastic_rounding must be False for {told} and {param.dtype}, got True: it does not reach base updates "
            f"of parts; keep float32 weights and let fully_shard's MixedPrecisionPolicy compute in {param.dtype}"
        )
