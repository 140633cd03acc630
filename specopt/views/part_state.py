"""State of a parameter that holds several matrices: one entry for all of them, stacked.

The keys are those of a single matrix, a tensor having one dimension more in front: 3 matrices with blocks (n, k) keep
one ``spectral_block`` of (3, n, k), and a depthwise conv of 1,000 channels one ``spectral_stats``, not 1,000. So what
copies, casts and saves state needs to know nothing of parts.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor


class PartState(MutableMapping[str, Any]):
    """The state of one part: a view of its share of ``optimizer.state[param]``.

    A new entry is kept aside until every part has brought its own; numbers are then the same for all. (The parts of a
    parameter are always in the same step.)
    """

    def __init__(self, whole: MutableMapping[str, Any], index: int, aside: dict[str, dict[int, Any]], count: int):
        self._whole, self._index, self._aside, self._count = whole, index, aside, count

    @classmethod
    def of(cls, whole: MutableMapping[str, Any], count: int) -> list[PartState]:
        aside: dict[str, dict[int, Any]] = {}
        return [cls(whole, index, aside, count) for index in range(count)]

    def __getitem__(self, key: str) -> Any:
        brought = self._aside.get(key, {})
        if self._index in brought:
            return brought[self._index]
        value = self._whole[key]
        if not isinstance(value, Tensor):
            return value
        if value.ndim == 0 or len(value) != self._count:  # of another view
            raise KeyError(key)
        return value[self._index]

    def __setitem__(self, key: str, value: Any) -> None:
        brought = self._aside.setdefault(key, {})
        brought[self._index] = value
        if len(brought) == self._count:
            del self._aside[key]
            together = [brought[index] for index in range(self._count)]
            self._whole[key] = torch.stack(together) if isinstance(value, Tensor) else value

    def __delitem__(self, key: str) -> None:
        self._aside.pop(key, None)
        del self._whole[key]

    def __iter__(self) -> Iterator[str]:
        return (key for key in {**self._whole, **self._aside} if key in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)
