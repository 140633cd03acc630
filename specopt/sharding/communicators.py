"""Whom sums go through: communicators of our own, beside those that gradients and gathered weights go through.

A communicator does one thing after the other (NCCL's has one stream): a gather of the next forward that shares it with
a late sum waits for that. And where several dimensions of a mesh cut a weight, a sum over all of its ranks is one over
a group of all of them, in one order, not one over each dimension in turn. So in the first step that sums over some
ranks these make a process group among themselves, of which the others need to know nothing. It has the backend and the
time-out of the weights' own group, is shared by all optimizers, and ends with ``destroy_process_group()``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import ref

import torch

if TYPE_CHECKING:
    from datetime import timedelta

    from torch.distributed import ProcessGroup

    from .cut import Sharers

_made: dict[tuple[tuple[int, ...], str], list[ref[ProcessGroup]]] = {}
"""By ranks and type of device. That a group is there is for ``torch.distributed`` to say, which alone holds it."""


def communicators(sharers: Sharers, device: torch.device) -> tuple[ProcessGroup, ...]:
    """The process groups through which a sum over the sharers goes, over one after the other: one of our own, or those
    of the mesh where its ranks cannot tell that they would find each other in a new one.

    All sharers have to call it alike, as they do a collective: the first time it is one.

    Raises:
        ValueError: a device that the weights' process group does not serve.
    """
    key = sharers.ranks, device.type
    wanted = _made.get(key, [])
    found = tuple(group for known in wanted if (group := known()) is not None and _is_registered(group))
    if not wanted or len(found) < len(wanted):
        found = _new(sharers, device)
        _made[key] = [ref(group) for group in found]
    return found


def _is_registered(group: ProcessGroup) -> bool:
    """Whether it has not been destroyed."""
    from torch.distributed import get_process_group_ranks

    try:
        return bool(get_process_group_ranks(group))
    except KeyError:
        return False


def _new(sharers: Sharers, device: torch.device) -> tuple[ProcessGroup, ...]:
    from torch.distributed import get_backend, new_group

    served = [_served(group, device) for group in sharers.groups]
    if not _can_meet(sharers, device):
        return sharers.groups
    try:
        found: ProcessGroup = new_group(
            list(sharers.ranks),
            timeout=_timeout(served[0]),
            backend=get_backend(sharers.groups[0]),
            use_local_synchronization=True,
            group_desc="specopt",
        )
    except (NotImplementedError, ValueError):  # of a backend whose groups take all ranks of the world, as MPI's do
        return sharers.groups
    return (found,)


def _served(group: ProcessGroup, device: torch.device) -> Any:
    """The part of a process group that serves a device."""
    try:
        return group._get_backend(device)
    except RuntimeError:
        from torch.distributed import get_backend

        raise ValueError(
            f"the process group of weights on the device {device.type!r} must serve it, got one of the backend "
            f"{get_backend(group)!r}: name one for each device that parameters are on, offloaded ones too, as in "
            "init_process_group('cpu:gloo,cuda:nccl')"
        ) from None


def _timeout(backend: Any) -> timedelta | None:
    """That of a backend; None, which stands for torch's own, of one that tells none."""
    try:
        found: timedelta = backend.options._timeout
    except (AttributeError, RuntimeError):
        return None
    return found


def _can_meet(sharers: Sharers, device: torch.device) -> bool:
    """Whether a process group that some ranks make by themselves is the same on all of them.

    They find each other by its name, which torch makes of the ranks and of how many groups each of them is in (pytorch
    issue 173608). And where the default group is bound to a device, a new one is split from it, which takes all ranks
    of the world (pull request 129965).
    """
    from torch.distributed import ReduceOp, all_reduce, distributed_c10d, get_world_size

    world: Any = distributed_c10d._get_default_group()
    count = len(distributed_c10d._world.pg_names)
    extremes = torch.tensor([count, -count], device=device)
    for group in sharers.groups:
        all_reduce(extremes, ReduceOp.MAX, group=group)
    most, least = extremes.tolist()
    is_split = world.bound_device_id is not None and len(sharers.ranks) < get_world_size()
    return most == -least and not is_split
