"""Values in a traced graph: a Lipschitz constant, and an example where inputs were given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from ..sharding.cut import local_of


@dataclass(frozen=True)
class Value:
    """A value of the graph that is not known as it is."""

    constant: float | None
    """Its Lipschitz constant; None where it is not known."""
    example: Any = None
    """What it is for the inputs given; None where none were."""


DTYPE = Value(0.0)
"""The dtype of a tensor that is not there; to be told by ``is``."""


def map_aggregate(tree: Any, change: Callable[[Any], Any]) -> Any:
    """torch.fx's, over leaves of any kind."""
    return fx.node.map_aggregate(tree, change)


def values_in(tree: Any) -> list[Value]:
    found: list[Value] = []

    def note(leaf: Any) -> Any:
        if isinstance(leaf, Value):
            found.append(leaf)
        return leaf

    map_aggregate(tree, note)
    return found


def examples(tree: Any) -> Any:
    return map_aggregate(tree, lambda leaf: leaf.example if isinstance(leaf, Value) else leaf)


def versions(tree: Any) -> list[int]:
    """Of all tensors: a change in place raises it."""
    found: list[int] = []
    map_aggregate(examples(tree), lambda leaf: found.append(leaf._version) if isinstance(leaf, Tensor) else None)
    return found


def listed(result: Any) -> Any:
    """torch.return_types and such as plain tuples."""
    return tuple(result) if isinstance(result, tuple) and not hasattr(result, "_fields") else result


def memory_of(tensor: Any) -> int | None:
    """Where a tensor begins, or this rank's part of one that is cut up."""
    return local_of(tensor).untyped_storage().data_ptr() if isinstance(tensor, Tensor) else None
