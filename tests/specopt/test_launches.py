"""A step enqueues the same few launches however many layers there are: counted on the Triton backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import specopt
from specopt.kernels import tables
from specopt.tracker.common import COLD_STEPS, STATS, STEP, Stat
from tests.specopt.helpers import DEVICE

pytestmark = [
    pytest.mark.filterwarnings("ignore:the first step moves"),
    pytest.mark.usefixtures("triton_backend"),
]
WARM = {"snr": 4, "spectral": 6}
COLD = {"snr": [32, 33, 32], "spectral": [34, 34, 34]}
"""In the first steps; in the second the half product of SNR has still to be made, for torch made the first update."""


class Counter(TorchDispatchMode):
    """Operations of torch that do work on the device: not views, and not bare allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        alias = [r.alias_info for r in func._schema.returns]
        view = any(a is not None and not a.is_write for a in alias)
        if not view and "empty" not in func._schema.name and "unbind" not in func._schema.name:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


class Launches:
    """The kernels launched, in order; ``mute`` lets them do nothing, for an interpreted one calls torch itself."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.mute = False


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    from specopt.kernels.bucket import Bucket

    seen = Launches()
    for method in ("launch_pass", "launch_solve"):
        original = getattr(Bucket, method)

        def counted(self: Any, *args: Any, original: Any = original, method: str = method, **kwargs: Any) -> None:
            seen.names.append(method)
            if not seen.mute:
                original(self, *args, **kwargs)

        monkeypatch.setattr(Bucket, method, counted)
    return seen


def make(kind: str, shapes: list[tuple[int, ...]], **options: Any) -> tuple[Any, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(s, generator=generator).to(DEVICE).requires_grad_() for s in shapes]
    tracked: dict[str, Any] = {"block": 8, "tolerance": 1e-9, **options}
    if kind == "snr":
        return specopt.SNRSGD(params, momentum=0.9, **tracked), params
    return specopt.NormScaleAdamW(params, **tracked), params


def set_gradients(params: list[Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(DEVICE)


def warm_up(optimizer: Any, params: list[Tensor]) -> None:
    """Two steps, and the count of steps set past the cold phase."""
    for _ in range(2):
        set_gradients(params)
        optimizer.step()
    for param in params:
        if STATS in optimizer.state[param]:
            optimizer.state[param][STEP] += COLD_STEPS
            optimizer.state[param][STATS][Stat.COUNT] += COLD_STEPS


@pytest.mark.parametrize(
    ("kind", "count"),
    [("snr", 2), ("spectral", 2), ("spectral", 4), pytest.param("snr", 4, marks=pytest.mark.full)],
)
def test_launches_of_a_warm_step(kind: str, count: int, launches: Launches) -> None:
    shapes: list[tuple[int, ...]] = [(24 + 4 * i, 20 + 4 * i) for i in range(count)]  # tracked
    optimizer, params = make(kind, [*shapes, (30, 7), (5, 2, 3, 3)], max_passes=2)  # and two solved exactly
    warm_up(optimizer, params)
    set_gradients(params)
    launches.names.clear()
    optimizer.step()
    assert len(launches.names) == WARM[kind]
    pairs = [float(optimizer.state[param][STATS][Stat.PAIRS]) for param in params]
    assert pairs == [2.0 if kind == "spectral" else 1.5] * count + [0.5, 0.5]
    launches.mute = True
    with Counter() as counter:
        optimizer.step()
    on_host = {"aten::add_", "aten::_local_scalar_dense"} if kind == "spectral" else set()  # AdamW's counts of steps
    assert {name for name in counter.names if not name.startswith("profiler")} == on_host


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.full if kind == "snr" else ()) for kind in COLD])
def test_launches_of_a_cold_step(kind: str, launches: Launches) -> None:
    optimizer, params = make(kind, [(20, 18)], block=4)
    counts = []
    for _ in range(3):
        set_gradients(params)
        launches.names.clear()
        optimizer.step()
        counts.append(len(launches.names))
    assert counts == COLD[kind]


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.full) for kind in ("rank 2", "composed")])
def test_operations_on_lists_are_as_many_for_any_number_of_layers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes by no launches over a bucket: corrections of several triplets, and composed rules."""
    calls: list[object] = []
    original = tables.on
    monkeypatch.setattr(tables, "on", lambda device: calls.append(device) or original(device))

    def count(layers: int) -> int:
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(20 + 4 * i, 18 + 4 * i, generator=generator) for i in range(layers)]
        params = [param.to(DEVICE).requires_grad_() for param in params]
        scale = specopt.NormScale(mode="cap", rank=2, block=4, tolerance=1e-9, max_passes=2)
        rule = scale if kind == "rank 2" else specopt.Compose(specopt.SpectralPenalty(0.1), scale)
        optimizer = specopt.wrap(torch.optim.SGD(params, lr=0.1), rule)
        warm_up(optimizer, params)
        set_gradients(params)
        calls.clear()
        optimizer.step()
        return len(calls)

    assert 0 < count(1) == count(3) < 70


def test_counter_counts_work_and_no_views() -> None:
    x = torch.ones(3, 3)
    with Counter() as counter:
        y: Tensor = x.mT[:2] + 1
        y.unbind()
    assert counter.names == ["aten::add"]
