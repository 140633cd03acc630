"""What tests of SpectralMonitor share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Noted = list[tuple[int, dict[str, dict[str, float]]]]


def small(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(70, 66), (12, 5), (8, 4, 3, 3), (7,)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def noted() -> tuple[Noted, Callable[[int, dict[str, dict[str, float]]], None]]:
    rows: Noted = []
    return rows, lambda step, found: rows.append((step, found))


class NoSync(TorchDispatchMode):
    """Refuses what would read a value back from a device."""

    READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "allclose")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.split("::")[1] in self.READS:
            raise AssertionError(f"the host waits for {func._schema.name}")
        return func(*args, **(kwargs or {}))
