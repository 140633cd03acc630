"""SpectralMonitor beside a device: nothing is read back, and no step waits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import specopt
from specopt import kernels
from specopt.seeing import snapshot
from specopt.tracker.common import STATS, HostCopy, Stat
from tests.specopt.helpers import DEVICE, OURS, parameters, train
from tests.specopt.monitored import NoSync, noted, small

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")


class Flight:
    """An event of copies that are under way until they are let arrive, or waited for."""

    def __init__(self) -> None:
        self.landed = self.waited = False

    def query(self) -> bool:
        return self.landed

    def synchronize(self) -> None:
        self.landed = self.waited = True


@pytest.fixture
def flights(monkeypatch: pytest.MonkeyPatch) -> list[Flight]:
    """Copies of the monitor arrive when they are told to, as from a GPU."""
    found: list[Flight] = []

    class InFlight(HostCopy):
        @classmethod
        def of(cls, tensor: Tensor) -> HostCopy:
            found.append(Flight())
            return HostCopy(tensor.clone(), found[-1])  # type: ignore[arg-type]

    monkeypatch.setattr(snapshot, "HostCopy", InFlight)
    return found


def test_nothing_is_waited_for_before_the_end_and_records_keep_their_order(flights: list[Flight]) -> None:
    params = small()
    optimizer = specopt.NormScaleAdamW(params, lr=1e-3)
    rows, function = noted()
    monitor = specopt.SpectralMonitor(optimizer, every=1, to=function)
    train(optimizer, params, range(2))
    sigmas = [float(optimizer.state[params[0]][STATS][Stat.SIGMA])]
    assert rows == [] and len(flights) == 2
    flights[1].landed = True
    train(optimizer, params, range(2, 3))
    assert rows == []  # the second is there, the first is not
    flights[0].landed = True
    train(optimizer, params, range(3, 4))
    assert [step for step, _ in rows] == [1, 2] and rows[1][1]["0.0"]["sigma"] == sigmas[0]
    assert not any(flight.waited for flight in flights)
    monitor.close()
    assert [step for step, _ in rows] == [1, 2, 3, 4]
    assert [flight.waited for flight in flights] == [False, False, True, True]


@pytest.mark.usefixtures("triton_backend")
def test_monitor_reads_nothing_back_from_the_device(flights: list[Flight], monkeypatch: pytest.MonkeyPatch) -> None:
    # an interpreted kernel reads memory itself; that its launch does not wait is tested where the kernels are
    monkeypatch.setattr(
        kernels, "frobenius_norms", lambda weights: torch.stack([torch.linalg.matrix_norm(w) for w in weights])
    )
    params = [torch.randn(20, 18).requires_grad_(), torch.randn(6, 5).requires_grad_(), torch.ones(3).requires_grad_()]
    groups = [{"params": params[:1]}, {"params": params[1:], "target": "initial"}]
    optimizer = specopt.NormScaleAdamW(groups, lr=1e-3, block=4, max_passes=1)
    monitor = specopt.SpectralMonitor(optimizer, every=1, weights=True, gradients=True)
    train(optimizer, params, range(1))

    def refuse(*_: object) -> Any:
        raise AssertionError("the host waits")

    with pytest.MonkeyPatch.context() as patch, NoSync():
        for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__"):
            patch.setattr(Tensor, name, refuse)
        monitor._after_step(optimizer)
        with pytest.raises(AssertionError, match="the host waits"):
            bool(params[0].detach().sum() > 0)
    assert len(flights) == 4 and not any(flight.waited for flight in flights)
    monitor.close()
    assert monitor.history.steps.tolist() == [1, 2] and np.isfinite(monitor.history["frobenius"]).all()


@pytest.mark.usefixtures("triton_backend")
def test_whole_step_with_a_monitor_reads_nothing_back(flights: list[Flight], monkeypatch: pytest.MonkeyPatch) -> None:
    from specopt.kernels.bucket import Bucket

    params = [torch.randn(20, 18).requires_grad_(), torch.randn(6, 5).requires_grad_()]
    optimizer = specopt.SNRSGD(params, lr=0.01, block=4, max_passes=1, momentum=0.9)
    monitor = specopt.SpectralMonitor(optimizer, every=1, gradients=True)
    train(optimizer, params, range(2))
    for launch in ("launch_pass", "launch_solve"):  # an interpreted kernel reads memory itself
        monkeypatch.setattr(Bucket, launch, lambda *_, **__: None)
    with NoSync():
        optimizer.step()
    assert len(flights) == 6 and not any(flight.waited for flight in flights)
    monitor.close()
    assert monitor.history.steps.tolist() == [1, 2, 3]


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("kind", ["snr", "set"])
def test_record_of_a_step_by_the_kernels_is_that_of_the_reference(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    histories = []
    for backend in ("triton", "reference"):
        monkeypatch.setenv("SPECOPT_BACKEND", backend)
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(shape, generator=generator).to(DEVICE).requires_grad_() for shape in ((30, 24), (9, 4))]
        optimizer = OURS[kind](params, block=8, max_passes=2)
        monitor = specopt.SpectralMonitor(optimizer, every=1, weights=True)
        for _ in range(2):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).to(DEVICE)
            optimizer.step()
        monitor.close()
        histories.append(monitor.history)
    for name in ("sigma", "target", "valid", "frobenius"):
        np.testing.assert_allclose(histories[0][name], histories[1][name], rtol=1e-2)
    # the kernels know the first direction alone, and of the others norms of columns, which are lower bounds
    np.testing.assert_allclose(histories[0]["sigma_after"], histories[1]["sigma_after"], rtol=5e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", OURS)
def test_monitored_steps_on_a_gpu_never_synchronize(kind: str) -> None:
    params = [param.detach().to(DEVICE).requires_grad_() for param in parameters(torch.float32)]
    optimizer = OURS[kind](params)
    monitor = specopt.SpectralMonitor(optimizer, every=1, weights=True, gradients=True)
    for step in range(24):
        generator = torch.Generator(DEVICE).manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator, device=DEVICE)
        torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    monitor.close()
    assert monitor.history.steps.tolist() == list(range(1, 25))
    assert monitor.history["frobenius"][-1, 0] == pytest.approx(float(params[0].norm()), rel=1e-5)


def test_what_a_device_sends_lands_on_the_host_whatever_the_default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a tensor of the CPU can be pinned."""
    asked: list[Any] = []

    def empty(*_: Any, **options: Any) -> Tensor:
        asked.append(options)
        raise NotImplementedError

    class OnDevice:
        shape, dtype, device = (2,), torch.float32, torch.device("cuda")

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(NotImplementedError):
        HostCopy.of(OnDevice())  # type: ignore[arg-type]
    assert asked == [{"dtype": torch.float32, "device": "cpu", "pin_memory": True}]
