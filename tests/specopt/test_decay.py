"""SpectralDecay against the base update followed by the exact decay from SVD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer, RMSprop

import specopt
from specopt.tracker.common import STATS, STEP, Stat
from tests.specopt.helpers import clones, exact, gap_of, parameters, set_gradients

TIGHT: dict[str, Any] = {"tolerance": 1e-6, "max_passes": 150}
LAM = 2.0
BASES: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda params, lr: SGD(params, lr=lr, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda params, lr: AdamW(params, lr=lr),
    "AdamW, maximized": lambda params, lr: AdamW(params, lr=lr, maximize=True),
    "RMSprop": lambda params, lr: RMSprop(params, lr=lr),
}


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> Callable[..., Optimizer]:
    return BASES[str(request.param)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decay_equals_the_base_update_then_the_exact_decay(base: Callable[..., Optimizer], dtype: torch.dtype) -> None:
    params = parameters(dtype)
    others = clones(params)
    ours, plain = specopt.wrap(base(params, 0.02), specopt.SpectralDecay(LAM, **TIGHT)), base(others, 0.02)
    for step in range(3):
        with torch.no_grad():
            for param, other in zip(params, others, strict=True):
                other.copy_(param)
        set_gradients(params, others, seed=step)
        ours.step()
        plain.step()
        for mine, other in zip(params, others, strict=True):
            check(mine.detach(), other.detach())


def check(mine: Tensor, plain: Tensor) -> None:
    if mine.ndim == 1:
        assert torch.equal(mine, plain)
        return
    u, s, vh = exact(plain)
    decay = -0.02 * LAM * s[0] * torch.outer(u[:, 0], vh[0])
    if gap_of(s) >= 0.01:
        rounding = 2.0**-22 * plain.norm() if mine.dtype == torch.float32 else 0.0
        assert (mine.double().flatten(1) - plain.double().flatten(1) - decay).norm() <= 1e-4 * decay.norm() + rounding
    else:
        expected = torch.cat([s[1:], s[:1] * (1 - 0.02 * LAM)]).sort(descending=True)[0]
        assert torch.allclose(exact(mine)[1], expected, rtol=0, atol=1e-5 * float(s[0]))


def test_no_weight_moves_at_a_learning_rate_of_zero() -> None:
    for rate in (0.0, torch.tensor(0.0)):
        params = parameters(torch.float32)
        before = clones(params)
        optimizer = specopt.wrap(SGD(params, lr=rate), specopt.SpectralDecay(LAM))
        for step in range(2):
            set_gradients(params, clones(params), seed=step)
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


def test_the_learning_rate_of_the_step_counts_whether_number_or_tensor() -> None:
    runs = []
    for kind in (float, torch.tensor):
        params = parameters(torch.float32)
        optimizer = specopt.wrap(SGD(params, lr=kind(0.1), foreach=False), specopt.SpectralDecay(LAM))
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(3):
            set_gradients(params, clones(params), seed=step)
            optimizer.step()
            scheduler.step()
        runs.append(params)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*runs, strict=True))


def test_decay_lambda_of_zero_is_the_base_and_keeps_no_state() -> None:
    params, others = parameters(torch.float32), parameters(torch.float32)
    ours, plain = specopt.wrap(AdamW(params), specopt.SpectralDecay(0.0)), AdamW(others)
    set_gradients(params, others, seed=0)
    ours.step()
    plain.step()
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
    assert not any(STATS in state for state in ours.state.values())


def test_groups_override_the_strength() -> None:
    params = [param for param in parameters(torch.float64)[:2]]
    groups: list[dict[str, Any]] = [{"params": params[:1], "decay_lambda": 5.0}, {"params": params[1:]}]
    optimizer = specopt.wrap(SGD(groups, lr=0.1), specopt.SpectralDecay(1.0, **TIGHT))
    for param in params:
        param.grad = torch.zeros_like(param)
    before = [float(exact(param)[1][0]) for param in params]
    optimizer.step()
    found = [float((exact(p)[1] - b * f).abs().min()) for p, b, f in zip(params, before, (0.5, 0.9), strict=True)]
    assert max(found) < 1e-8


def test_a_matrix_with_a_non_finite_entry_is_left_as_the_base_left_it() -> None:
    params = parameters(torch.float32)
    with torch.no_grad():
        params[0][0, 0] = torch.inf
    others = clones(params)
    ours, plain = specopt.wrap(SGD(params, lr=0.1), specopt.SpectralDecay(LAM)), SGD(others, lr=0.1)
    set_gradients(params, others, seed=0)
    ours.step()
    plain.step()
    assert torch.equal(params[0], others[0]) and not torch.equal(params[1], others[1])
    assert ours.state[params[0]][STATS][Stat.VALID] == 0 and ours.state[params[0]][STEP] == 1


def test_lam_has_no_default_and_is_checked() -> None:
    with pytest.raises(TypeError, match="lam"):
        specopt.SpectralDecay()  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="lam must be a finite number >= 0, got inf"):
        specopt.SpectralDecay(float("inf"))
