"""What the report and the monitor tell of operators."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import specopt
from specopt import kernels
from specopt.seeing.snapshot import STORED, Snapshot
from specopt.tracker.common import STATS
from tests.specopt.monitored import NoSync
from tests.specopt.operators.networks import OTHERS, exact, groups_of, model, step


def test_report_shows_the_operator_norm_and_its_residual() -> None:
    network = model()
    optimizer = specopt.NormScaleAdamW(groups_of(network), lr=1e-3, mode="cap", target=7.0)
    before = copy.deepcopy(optimizer.state_dict())
    rows = {row.name: row for row in specopt.spectral_report(optimizer)}
    assert optimizer.state_dict()["state"] == before["state"]
    assert [rows[name].sigma for name in ("0.weight", "2.weight")] == pytest.approx(exact(network), rel=1e-4)
    assert rows["0.weight"].residual < 1e-2
    assert rows["0.weight"].target == 7.0
    assert rows["2.weight"].shape == (4, 2, 3, 3)
    assert rows["4.weight"].sigma == pytest.approx(float(torch.linalg.matrix_norm(network[4].weight, ord=2)), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", OTHERS)
def test_monitor_notes_operators_behind_the_matrices_as_the_step_left_them(name: str, dtype: torch.dtype) -> None:
    network = model(dtype)
    optimizer: Any = OTHERS[name](groups_of(network))
    with specopt.SpectralMonitor(optimizer, every=1, weights=True) as monitor:
        for number in range(3):
            step(network, optimizer, number)
    assert monitor.history.names == ("4.weight", "0.weight", "2.weight")
    for place, conv in ((1, network[0]), (2, network[2])):
        stats = optimizer.state[conv.weight][STATS].tolist()
        found = {quantity: monitor.history[quantity][-1, place] for quantity in (*STORED, "target", "frobenius")}
        assert {quantity: found[quantity] for quantity in STORED} == {key: stats[at] for key, at in STORED.items()}
        assert found["frobenius"] == pytest.approx(float(conv.weight.detach().double().norm()), rel=1e-5)
        targets = {"rescale": (2**0.5, 1.0), "cap": (1.0, 1.0), "both": (1.0, 1.0)}.get(name, (np.nan, np.nan))
        assert found["target"] == pytest.approx(targets[place - 1], nan_ok=True)
    assert np.isfinite(monitor.history["stable_rank"][:, 0]).all()
    assert np.isnan(monitor.history["stable_rank"][:, 1:]).all()
    if name in ("rescale", "cap", "both"):
        after = monitor.history["sigma_after"][-1, 1:]
        assert after == pytest.approx(exact(network), rel=2e-2 if dtype == torch.bfloat16 else 1e-3)


def test_monitor_knows_nothing_of_an_operator_before_its_first_step_and_waits_for_no_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # the reference of a CPU reads a norm to see whether it overflowed
    monkeypatch.setattr(
        kernels, "frobenius_norms", lambda weights: torch.stack([torch.linalg.matrix_norm(w) for w in weights])
    )
    network = model()
    optimizer: Any = OTHERS["cap"](groups_of(network))
    with NoSync():
        before = Snapshot.of(optimizer, 0, weights=True, gradients=False)
    step(network, optimizer)
    with NoSync():
        after = Snapshot.of(optimizer, 1, weights=True, gradients=False)
    first, second = before.record().values, after.record().values
    assert np.isnan(first["sigma"]).all() and np.isfinite(second["sigma"]).all()
    assert np.isfinite(first["frobenius"]).all() and np.isfinite(second["residual"]).all()


def test_monitor_leaves_operators_out_whose_control_is_off() -> None:
    network = model()
    optimizer: Any = specopt.SNRSGD(groups_of(network), lr=0.05, snr_lambda=0.0)
    monitor = specopt.SpectralMonitor(optimizer, every=1)
    step(network, optimizer)
    assert monitor.history.names == ()
