"""Collectives counted: what a piece of code asks of ``torch.distributed``, with its bytes, exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NAMESPACES = ("c10d", "_c10d_functional")
"""Where the operators of process groups live: those that write in place, and those that return."""
NOT_COUNTED = ("monitored_barrier_", "wait_tensor", "_wrap_tensor_autograd")
"""Of them, what moves nothing."""


class Collective(NamedTuple):
    """One call."""

    name: str
    """Of the operator: ``"allreduce_"``."""
    bytes: int
    """Of the tensors that this rank hands in."""
    dtype: torch.dtype | None
    """Of the first of them."""


class Collectives(TorchDispatchMode):
    """Lists the collectives that are called while it is entered, by this thread.

    It sits below ``torch.distributed`` and DTensor, where both call operators of a process group: whatever a library
    calls is seen, and a payload is counted as it leaves, once for each call. (What a ring or a tree makes of it on the
    wire depends on the backend: an all-reduce of b bytes over R ranks sends about ``2 b (R - 1) / R`` from each.)

    Example::

        with Collectives() as made:
            optimizer.step()
        print(made.count, made.bytes)
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Collective] = []

    @property
    def count(self) -> int:
        return len(self.calls)

    @property
    def bytes(self) -> int:
        return sum(call.bytes for call in self.calls)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace in NAMESPACES and (name := func._schema.name.split("::")[1]) not in NOT_COUNTED:
            tensors = _tensors(_handed_in(args))
            self.calls.append(
                Collective(
                    name, sum(t.numel() * t.element_size() for t in tensors), tensors[0].dtype if tensors else None
                )
            )
        return func(*args, **(kwargs or {}))


def _handed_in(args: Sequence[Any]) -> Any:
    """The argument that holds this rank's payload: behind the results where an operator takes those first."""
    with_tensors = [arg for arg in args if _tensors(arg)]
    return with_tensors[-1] if with_tensors else ()


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
