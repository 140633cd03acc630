"""Which steps can be captured in a CUDA graph, what the others say, and what a captured one reads."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import specopt
from specopt.kernels import subspace, tables
from specopt.tracker.common import COLD_STEPS, HostCopy
from tests.specopt.device_steps import engines, make, past_the_cold_phase, set_gradients, warm
from tests.specopt.helpers import DEVICE

pytestmark = [
    pytest.mark.filterwarnings("ignore:the first step moves"),
    pytest.mark.usefixtures("triton_backend"),
]


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether a graph is being captured, as far as the package can tell."""
    answer = [False]
    monkeypatch.setattr(tables, "capturing", lambda device: answer[0])
    return answer


def test_a_warm_step_of_the_same_tensors_can_be_captured(capturing: list[bool]) -> None:
    optimizer, params = make("snr")
    past_the_cold_phase(optimizer, params)
    set_gradients(params, 1)
    optimizer.step()
    optimizer.step()  # the step after the buffers were made
    capturing[0] = True
    before = [param.detach().clone() for param in params]
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, params, strict=True))


def test_a_captured_step_asks_for_no_first_ratio(capturing: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, params = make("snr")
    warm(optimizer, params)
    copied = HostCopy(torch.tensor([0.1]))
    optimizer._waiting.append((list(optimizer.matrices())[:1], copied))
    with monkeypatch.context() as patch:
        patch.setattr(HostCopy, "peek", lambda copy: pytest.fail("an event was asked for in a capture"))
        capturing[0] = True
        optimizer.step()
        capturing[0] = False
    with pytest.warns(UserWarning, match="the first step moves"):
        optimizer.step()


def test_noise_made_in_a_capture_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = [True]
    monkeypatch.setattr(subspace, "capturing", lambda device: answer[0])
    monkeypatch.setattr(subspace, "_noise", {})
    made = subspace.noise_buffer(10, torch.float32, DEVICE)
    assert not subspace._noise
    answer[0] = False
    assert torch.equal(subspace.noise_buffer(10, torch.float32, DEVICE), made)
    assert subspace._noise


def test_a_capture_is_asked_for_on_the_devices_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]

    class Current:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.index

        def __exit__(self, *_: object) -> None:
            current[0] = self.before

    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[0] == 1)
    assert tables.capturing(torch.device("cuda", 1))
    assert not tables.capturing(torch.device("cuda", 0))
    assert not tables.capturing(torch.device("cpu"))


def test_what_a_captured_step_reads_outlives_later_steps_with_other_gradients(capturing: list[bool]) -> None:
    optimizer, params = make("snr")
    warm(optimizer, params)
    capturing[0] = True
    optimizer.step()
    capturing[0] = False
    (bucket,) = [engine.bucket for engine in engines(optimizer)]
    read = [weakref.ref(tensor) for tensor in (bucket.table, bucket.numbers, bucket._scratch)]
    del bucket
    for count in (1, len(params)):  # other matrices, then other addresses
        for param in params:
            param.grad = None
        set_gradients(params[:count], 2)
        optimizer.param_groups[0]["snr_lambda"] *= 2
        optimizer.step()
    assert all(reference() is not None for reference in read)


def test_a_cold_step_cannot_be_captured(capturing: list[bool]) -> None:
    optimizer, params = make("snr", max_passes=1)
    for _ in range(2):
        set_gradients(params, 1)
        optimizer.step()
    capturing[0] = True
    with pytest.raises(RuntimeError, match="first 20 steps"):
        optimizer.step()


def test_a_step_whose_gradients_have_moved_cannot_be_captured(capturing: list[bool]) -> None:
    optimizer, params = make("snr")
    warm(optimizer, params)
    kept = [param.grad for param in params]
    for param in params:
        param.grad = None
    set_gradients(params, 2)
    capturing[0] = True
    with pytest.raises(RuntimeError, match=r"a tensor has moved.*set_to_none=False"):
        optimizer.step()
    del kept


def test_a_step_whose_options_have_changed_cannot_be_captured(capturing: list[bool]) -> None:
    optimizer, params = make("snr")
    warm(optimizer, params)
    optimizer.param_groups[0]["lr"] *= 2
    capturing[0] = True
    with pytest.raises(RuntimeError, match=r"an option has changed.*hold lr in a tensor"):
        optimizer.step()


def test_a_step_counted_on_the_host_cannot_be_captured(capturing: list[bool]) -> None:
    optimizer, params = make("set")
    warm(optimizer, params)
    capturing[0] = True
    with pytest.raises(RuntimeError, match=r"on the host unless it has capturable=True"):
        optimizer.step()
    counts = {float(optimizer.state[param]["step"]) for param in params if "step" in optimizer.state[param]}
    capturing[0] = False
    optimizer.step()
    assert {float(optimizer.state[param]["step"]) - 1 for param in params if "step" in optimizer.state[param]} == counts


def packed(weight: Tensor) -> Any:
    group = {"params": [weight], "view": "rows:2"}
    return specopt.SNRSGD([group], lr=0.1, block=8)


def as_operator() -> Any:
    model = torch.nn.Conv2d(3, 4, 3).to(DEVICE)
    groups = specopt.param_groups(model, conv="operator", inputs=torch.zeros(1, 3, 8, 8, device=DEVICE))
    return specopt.SNRSGD(groups, lr=0.1)


NOT_CAPTURED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "frobenius": (lambda w: specopt.NormScaleAdamW([w], norm="frobenius", block=8), "lists of matrices"),
    "rank": (lambda w: specopt.NormScaleAdamW([w], mode="cap", rank=2, block=8), "lists of matrices"),
    "float64": (lambda w: specopt.SNRSGD([w.detach().double().requires_grad_()], block=8), "lists of matrices"),
    "composed": (
        lambda w: specopt.wrap(
            torch.optim.SGD([w], lr=0.1), specopt.Compose(specopt.SpectralPenalty(), specopt.NormScale(mode="cap"))
        ),
        "lists of matrices",
    ),
    "every": (lambda w: specopt.wrap(torch.optim.SGD([w], lr=0.1), specopt.NormScale(every=2)), "every=2"),
    "packed": (packed, "several matrices"),
    "operator": (lambda w: as_operator(), "conv='operator'"),
}


@pytest.mark.parametrize("kind", NOT_CAPTURED)
def test_a_step_that_goes_by_the_host_cannot_be_captured(
    kind: str, capturing: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_one, reason = NOT_CAPTURED[kind]
    optimizer = make_one(torch.randn(40, 30).to(DEVICE).requires_grad_())
    params = [param for group in optimizer.param_groups for param in group["params"]]
    set_gradients(params, 1)
    with monkeypatch.context() as patch:
        patch.setenv("SPECOPT_BACKEND", "reference")
        optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    weights = [param.detach().clone() for param in params]
    capturing[0] = True
    with pytest.raises(RuntimeError, match=f"cannot be captured in a graph: .*{reason}.*spectral=False"):
        optimizer.step()
    torch.testing.assert_close(optimizer.state_dict()["state"], before, rtol=0, atol=0, equal_nan=True)
    assert all(torch.equal(weight, param) for weight, param in zip(weights, params, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a graph on a GPU")
@pytest.mark.parametrize("kind", ["snr", "set"])
def test_a_captured_step_replays_with_another_learning_rate(kind: str) -> None:
    results = []
    for captured in (False, True):
        lr = torch.tensor(0.01, device=DEVICE)
        optimizer, params = make(kind, **({"capturable": True} if kind == "set" else {}))
        optimizer.param_groups[0]["lr"] = lr
        for step in range(COLD_STEPS + 2):
            set_gradients(params, step)
            optimizer.step()
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
        for step in range(3):
            set_gradients(params, 100 + step)
            lr.fill_(0.01 / (step + 1))
            graph.replay() if captured else optimizer.step()
        torch.cuda.synchronize()
        results.append([param.detach().clone() for param in params])
    for eager, replayed in zip(*results, strict=True):
        assert torch.allclose(eager, replayed, rtol=1e-5, atol=1e-6)
