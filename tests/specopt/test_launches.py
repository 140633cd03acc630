"""A step enqueues the same number of operations however many layers there are: counted on the Triton backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import specopt
from specopt.rules import Gate
from specopt.tracker.common import COLD_STEPS, STEP

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Counter(TorchDispatchMode):
    """Operations that do work on the device: not views, and not bare allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        alias = [r.alias_info for r in func._schema.returns]
        view = any(a is not None and not a.is_write for a in alias)
        if not view and "empty" not in func._schema.name and "unbind" not in func._schema.name:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def operations(kind: str, count: int, launches: list[int]) -> tuple[list[str], int]:
    """What torch and Triton are asked to do by the rule in one warm step with its conditional pair."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(24 + 4 * i, 20 + 4 * i) for i in range(count)]
    params = [torch.randn(s, generator=generator).to(DEVICE).requires_grad_() for s in shapes]
    tracked: dict[str, Any] = {"block": 8, "max_passes": 2, "tolerance": 1e-9}
    optimizer: Any = (
        specopt.SNRSGD(params, **tracked) if kind == "snr" else specopt.NormScaleAdamW(params, norm=kind, **tracked)
    )

    def gradients() -> None:
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(DEVICE)

    for _ in range(2):
        gradients()
        optimizer.step()
    for param in params:
        optimizer.state[param][STEP] += COLD_STEPS
    gradients()
    matrices = list(optimizer.matrices())
    launches.clear()
    with torch.no_grad(), Counter() as counter:
        optimizer.rule.begin(matrices, Gate()).finish()
    return sorted(counter.names), len(launches)


@pytest.mark.parametrize("kind", ["snr", "spectral", "frobenius"])
def test_operations_of_a_warm_step_do_not_grow_with_the_number_of_layers(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECOPT_BACKEND", "triton")
    launches: list[int] = []
    _count_launches(monkeypatch, launches)
    assert operations(kind, 2, launches) == operations(kind, 5, launches)
    assert 0 < len(launches) <= 64


def _count_launches(monkeypatch: pytest.MonkeyPatch, launches: list[int]) -> None:
    from specopt.kernels.blocks import device as blocks
    from specopt.kernels.products import device as products
    from specopt.kernels.small import device as small
    from specopt.kernels.updates import device as updates

    for module in (blocks, products, small, updates):
        for name, function in vars(module).items():
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, _Counted(function, launches))


class _Counted:
    def __init__(self, kernel: Any, launches: list[int]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        self.launches.append(1)
        return self.kernel[grid]


def test_counter_counts_work_and_no_views() -> None:
    x = torch.ones(3, 3)
    with Counter() as counter:
        y: Tensor = x.mT[:2] + 1
        y.unbind()
    assert counter.names == ["aten::add"]
