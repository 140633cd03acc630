"""spectral_report tells what the weights are now, whatever the tracker last saw."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import specopt
from tests.specopt.helpers import clones, exact, parameters, set_gradients

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("norm", ["spectral", "frobenius"])
def test_report_agrees_with_svd_and_changes_nothing(norm: str, steps: int) -> None:
    params = parameters(torch.float32)
    optimizer = specopt.NormScaleAdamW(params, lr=1e-2, norm=norm)
    for step in range(steps):
        set_gradients(params, clones(params), seed=step)
        optimizer.step()
    before = [param.detach().clone() for param in params]
    rows = specopt.spectral_report(optimizer)
    assert all(torch.equal(param.detach(), old) for param, old in zip(params, before, strict=True))
    matrices = [param for param in params if param.ndim > 1]
    assert [row.shape for row in rows] == [tuple(param.shape) for param in matrices]
    for row, param in zip(rows, matrices, strict=True):
        values = exact(param)[1]
        assert row.sigma == pytest.approx(float(values[0]), rel=1e-4)
        assert row.frobenius == pytest.approx(float(values.norm()), rel=1e-5)
        assert row.stable_rank == pytest.approx(float((values.norm() / values[0]) ** 2), rel=1e-3)
        assert row.residual <= 1e-3
        target = math.sqrt(param.shape[0] / param.shape[1])
        scale = 1.0 if norm == "spectral" else math.sqrt(min(param.flatten(1).shape))
        assert row.target == pytest.approx(scale * target)
        assert row.finite and not row.capped


def test_report_of_a_penalty_has_no_target_and_says_what_is_not_finite() -> None:
    weights = [nn.Parameter(torch.randn(70, 80)), nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.zeros(70, 70))]
    with torch.no_grad():
        weights[0][0, 0] = torch.nan
    first, second, third = specopt.spectral_report(specopt.SNRSGD(weights))
    assert first.target is None and not first.finite
    assert second.finite and second.name == "0.1"
    assert third.sigma == 0 and math.isnan(third.stable_rank) and third.finite


def test_report_of_nothing_is_empty() -> None:
    assert specopt.spectral_report(specopt.SNRSGD([nn.Parameter(torch.zeros(3))])) == []
