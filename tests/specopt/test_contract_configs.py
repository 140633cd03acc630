"""Every configuration that torch lists for SGD and AdamW: without control torch bit for bit, under control torch's step
and the rule by float64 SVD."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import specopt
from tests.specopt.helpers import DEVICE, SHAPES, exact, set_gradients, with_spectrum
from tests.specopt.torch_configs import listed

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")
OURS: dict[str, Any] = {"SGD": specopt.SNRSGD, "AdamW": specopt.NormScaleAdamW}
IMPLEMENTATIONS: dict[str, dict[str, bool]] = {
    "default": {},
    "foreach": {"foreach": True},
    "for loop": {"foreach": False},
    "fused": {"fused": True},
}
TIGHT: dict[str, Any] = {"tolerance": 1e-11, "max_passes": 150}
LAMBDA = 0.3


@pytest.fixture(params=OURS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> dict[str, bool]:
    return IMPLEMENTATIONS[request.param]


def parameters(dtype: torch.dtype) -> list[Tensor]:
    """Tracked ones, exact ones, a kernel, and a bias. Dense: torch's fused kernels misread others."""
    generator = torch.Generator().manual_seed(0)
    chosen = [with_spectrum(shape, dtype, 0.1, generator) for shape in (SHAPES[0], SHAPES[1], SHAPES[2], SHAPES[4])]
    return [p.contiguous().to(DEVICE).requires_grad_() for p in (*chosen, torch.ones(7, dtype=dtype))]


MORE: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "SGD": [("tensor weight decay", {"weight_decay": torch.tensor(0.1), "momentum": 0.9})],
    "AdamW": [
        ("tensor weight decay", {"weight_decay": torch.tensor(0.1)}),
        ("tensor betas", {"betas": (torch.tensor(0.9), torch.tensor(0.99))}),
    ],
}


def configurations(name: str) -> list[tuple[str, dict[str, Any]]]:
    """All of torch's, and more; on the CPU also those that torch itself refuses there (capturable)."""
    found = listed(name, "cuda")
    assert len(found) >= 5
    return [*found, *MORE[name]]


def build(cls: Any, params: list[Tensor], config: dict[str, Any], **more: Any) -> Any:
    return cls(params, **copy.deepcopy(config), **more)


def attempt(cls: Any, params: list[Tensor], config: dict[str, Any], **more: Any) -> str:
    """Two steps; the error, where there is one."""
    try:
        optimizer = build(cls, params, config, **more)
        for seed in range(2):
            set_gradients(params, params, seed)
            optimizer.step()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_control_every_listed_configuration_is_torch_bit_for_bit(
    name: str, implementation: dict[str, bool], dtype: torch.dtype
) -> None:
    for what, config in configurations(name):
        for off in ({"spectral": False}, {"snr_lambda": 0.0}) if name == "SGD" else ({"spectral": False},):
            params, others = parameters(dtype), parameters(dtype)
            ours = attempt(OURS[name], params, config, **implementation, **off)
            assert ours == attempt(getattr(torch.optim, name), others, config, **implementation), what
            assert all(torch.equal(p, o) for p, o in zip(params, others, strict=True)), what


def test_a_group_of_adamw_whose_decay_is_not_decoupled_is_updated_as_torch_does() -> None:
    params, others = parameters(torch.float32), parameters(torch.float32)
    group = {"decoupled_weight_decay": False, "weight_decay": 0.5, "lr": 0.01}
    ours = specopt.NormScaleAdamW([{"params": params, **group}], mode="cap", target=1e6)
    theirs = torch.optim.AdamW([{"params": others, **group}])
    for seed in range(3):
        set_gradients(params, others, seed)
        ours.step()
        theirs.step()
    assert all(torch.allclose(p, o, rtol=1e-6, atol=1e-7) for p, o in zip(params, others, strict=True))


def penalty_gradient(weight: Tensor) -> Tensor:
    u, s, vh = exact(weight)
    return (LAMBDA * s[0] * torch.outer(u[:, 0], vh[0])).view(weight.shape)


def corrected(weight: Tensor, mode: str) -> Tensor:
    u, s, vh = exact(weight)
    target = (weight.shape[0] / weight.shape[1]) ** 0.5
    if mode == "rescale":
        return weight.double() * (target / s[0])
    change = target - s[0] if mode == "set" else min(target - s[0], s.new_zeros(()))
    return weight.double() + (change * torch.outer(u[:, 0], vh[0])).view(weight.shape)


def is_refused(base: Any, config: dict[str, Any], implementation: dict[str, bool]) -> bool:
    """Whether torch itself does not make this step here (capturable on a CPU)."""
    params = parameters(torch.float64)
    return bool(attempt(base, params, config, **implementation))


def judged_steps(
    name: str, config: dict[str, Any], implementation: dict[str, bool], mode: str
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(before, ours, expected) of each matrix in each of two steps, each from the state of ours."""
    params, others = parameters(torch.float64), parameters(torch.float64)
    options: dict[str, Any] = {"snr_lambda": LAMBDA} if name == "SGD" else {"mode": mode}
    ours = build(OURS[name], params, config, **implementation, **TIGHT, **options)
    theirs = build(getattr(torch.optim, name), others, config, **implementation)
    sign = -1 if config.get("maximize") else 1
    seen = []
    for seed in range(2):
        set_gradients(params, others, seed)
        before = [param.detach().clone() for param in params]
        for param, other in zip(params, others, strict=True):
            with torch.no_grad():
                other.copy_(param)
            if name == "SGD" and param.ndim > 1:
                assert other.grad is not None
                other.grad += sign * penalty_gradient(param)
        ours.step()
        theirs.step()
        for old, param, other in zip(before, params, others, strict=True):
            plain = other.detach().clone()
            expected = plain if name == "SGD" or param.ndim < 2 else corrected(plain, mode)
            seen.append((old, param.detach().clone(), expected))
    return seen


@pytest.mark.parametrize(("name", "mode"), [("SGD", ""), ("AdamW", "set"), ("AdamW", "cap"), ("AdamW", "rescale")])
def test_under_control_every_listed_configuration_is_torch_and_the_rule(
    name: str, mode: str, implementation: dict[str, bool]
) -> None:
    made = 0
    for what, config in configurations(name):
        if is_refused(getattr(torch.optim, name), config, implementation):
            continue
        made += 1
        # torch computes with a learning rate or betas in a float32 tensor to no more than that
        allowed = 1e-5 if any(isinstance(v, Tensor | tuple) for v in config.values()) else 1e-8
        for before, mine, expected in judged_steps(name, config, implementation, mode):
            update = (expected - before).norm()
            assert (mine - expected).norm() <= allowed * update + 1e-15 * before.norm(), what
    assert made >= 5


def test_configurations_that_torch_refuses_here_are_refused_alike_under_control(
    name: str, implementation: dict[str, bool]
) -> None:
    for what, config in configurations(name):
        params, others = parameters(torch.float32), parameters(torch.float32)
        theirs = attempt(getattr(torch.optim, name), others, config, **implementation)
        if theirs:
            before = [param.detach().clone() for param in params]
            assert attempt(OURS[name], params, config, **implementation) == theirs, what
            assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True)), what


def test_arguments_that_torch_refuses_are_refused_alike(name: str) -> None:
    wrong: list[dict[str, Any]] = [
        {"lr": -0.1},
        {"lr": torch.tensor([1e-3, 1e-3])},
        {"weight_decay": -1.0},
        {"foreach": True, "fused": True},
    ]
    wrong += {
        "SGD": [{"momentum": -0.5}, {"nesterov": True}, {"momentum": 0.9, "dampening": 0.1, "nesterov": True}],
        "AdamW": [
            {"betas": (1.0, 0.999)},
            {"betas": (0.9, -0.1)},
            {"eps": -1e-8},
            {"lr": torch.tensor(1e-3), "foreach": True},
            {"betas": (0.9, torch.tensor(0.999))},
        ],
    }[name]
    for config in wrong:
        told = []
        for cls in (OURS[name], getattr(torch.optim, name)):
            with pytest.raises((ValueError, RuntimeError)) as error:
                build(cls, parameters(torch.float32), config)
            told.append((error.type, str(error.value)))
        assert told[0] == told[1]
