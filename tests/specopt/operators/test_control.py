"""Rules under ``conv="operator"``, against the SVD of the unrolled operator."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import specopt
from specopt.operators import ConvOperator, Geometry
from specopt.rules.operator import OperatorSession, kernels_of
from specopt.session import Gate
from specopt.sharding import exchange
from tests.specopt.helpers import DEVICE
from tests.specopt.operators.cases import norm
from tests.specopt.operators.networks import OTHERS, exact, groups_of, model, operators, step


def slope(kernel: Tensor, geometry: Geometry, function: Callable[[Tensor], Tensor]) -> Tensor:
    """The derivative of a function of the norm by the kernel, by autograd through the SVD of the unrolled operator."""
    kernel = kernel.detach().double().clone().requires_grad_()
    exact = ConvOperator(kernel.detach(), geometry)
    count = torch.Size(exact.input_shape).numel()
    unit = torch.eye(count, dtype=torch.float64).view(count, *exact.input_shape)
    padded = exact._pad(unit)
    stride, padding = geometry.stride, exact._inner_padding
    out = nn.functional.conv2d(padded, kernel, None, stride, padding, geometry.dilation, geometry.groups)
    (gradient,) = torch.autograd.grad(function(torch.linalg.matrix_norm(out.flatten(1), ord=2)), kernel)
    return gradient


def test_penalty_gradient_is_autograd_s_of_half_lambda_norm_squared() -> None:
    network = model()
    optimizer = specopt.SNRSGD(groups_of(network), lr=1.0, snr_lambda=0.3)
    kernels = [operator.kernel.clone() for operator in operators(network)]
    geometries = [operator.geometry for operator in operators(network)]
    for param in network.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for kernel, geometry, now in zip(kernels, geometries, operators(network), strict=True):
        expected = slope(kernel, geometry, lambda sigma: 0.15 * sigma**2)
        torch.testing.assert_close((kernel - now.kernel).double(), expected, rtol=0, atol=0.02 * float(expected.norm()))


def test_penalty_leaves_the_gradient_as_it_was_and_is_minimized_under_maximize() -> None:
    network = model()
    optimizer = specopt.SNRSGD(groups_of(network, maximize=True), lr=0.01, snr_lambda=1.0)
    for param in network.parameters():
        param.grad = torch.zeros_like(param)
    before, grad = exact(network), network[0].weight.grad
    optimizer.step()
    assert network[0].weight.grad is grad
    assert not grad.any()
    assert all(now < was for now, was in zip(exact(network), before, strict=True))


def test_decay_moves_the_kernel_along_the_norm_s_derivative() -> None:
    network = model()
    optimizer = specopt.wrap(torch.optim.SGD(groups_of(network), lr=0.5), specopt.SpectralDecay(0.1))
    kernel, geometry = operators(network)[0].kernel.clone(), operators(network)[0].geometry
    for param in network.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    expected = slope(kernel, geometry, lambda sigma: 0.025 * sigma**2)
    moved = (kernel - operators(network)[0].kernel).double()
    torch.testing.assert_close(moved, expected, rtol=0, atol=0.02 * float(expected.norm()))


def test_rescale_holds_every_operator_norm_at_its_target() -> None:
    network = model()
    optimizer = specopt.NormScaleAdamW(groups_of(network), lr=1e-3, mode="rescale")
    for number in range(30):
        step(network, optimizer, number)
        assert exact(network) == pytest.approx([2**0.5, 1.0], rel=1e-3)


def test_cap_only_lowers_and_holds() -> None:
    network = model()
    with torch.no_grad():
        network[0].weight.mul_(5)
        network[2].weight.mul_(0.1)
    optimizer = specopt.NormScaleAdamW(groups_of(network), lr=1e-3, mode="cap", target=0.9)
    small = exact(network)[1]
    for number in range(20):
        step(network, optimizer, number)
        first, second = exact(network)
        assert first <= 0.9 * (1 + 1e-3)
        assert second < 2 * small
    assert first > 0.8


def test_composed_rules_act_in_their_order() -> None:
    """A decay after the cap leaves the norm below it by its part; a cap after the decay leaves it there."""
    decay, cap = specopt.SpectralDecay(0.5), specopt.NormScale(mode="cap", target=0.5)
    norms = []
    for rule in (specopt.Compose(decay, cap), specopt.Compose(cap, decay)):
        network = model()
        optimizer = specopt.wrap(torch.optim.SGD(groups_of(network), lr=0.1), rule)
        step(network, optimizer)
        norms.append(exact(network)[0])
    assert norms[0] == pytest.approx(0.5, rel=1e-3)
    assert norms[1] < 0.49


def test_initial_target_keeps_the_norms_of_the_start() -> None:
    network = model()
    start = exact(network)
    optimizer = specopt.NormScaleAdamW(groups_of(network), lr=1e-3, mode="rescale", target="initial")
    for number in range(5):
        step(network, optimizer, number)
    assert exact(network) == pytest.approx(start, rel=2e-3)


@pytest.mark.parametrize("mode", ["rescale", "cap"])
def test_a_kernel_that_starts_at_zero_has_no_initial_norm_and_trains_as_under_adamw(mode: str) -> None:
    networks = model(), model()
    for network in networks:
        torch.nn.init.zeros_(network[0].weight)
    optimizer = specopt.NormScaleAdamW(groups_of(networks[0])[:1], lr=1e-3, mode=mode, target="initial")
    plain = torch.optim.AdamW([p for group in groups_of(networks[1])[:1] for p in group["params"]], lr=1e-3)
    for number in range(3):
        step(networks[0], optimizer, number)
        step(networks[1], plain, number)
    assert float(networks[0][0].weight.detach().norm()) > 0
    mine, plainly = (network[0].weight.detach() for network in networks)  # the layer behind is held
    assert torch.allclose(mine, plainly, rtol=1e-2, atol=1e-5)


def test_a_projected_gradient_would_leave_the_cap_exceeded() -> None:
    """Why a cap rescales: the first-order step to the target ends above it."""
    operator = operators(model())[0]
    sigma = norm(operator)
    gradient = slope(operator.kernel, operator.geometry, lambda value: value)
    target = 0.7 * sigma
    stepped = operator.kernel.double() - (sigma - target) * gradient / gradient.square().sum()
    assert norm(ConvOperator(stepped, operator.geometry)) > 1.01 * target


@pytest.mark.parametrize("name", OTHERS)
def test_linear_layers_beside_them_are_controlled_as_matrices(name: str) -> None:
    network = model()
    optimizer = OTHERS[name](groups_of(network))
    step(network, optimizer)
    assert "spectral_operator" in optimizer.state[network[0].weight]
    assert "spectral_operator" not in optimizer.state[network[4].weight]
    assert "spectral_stats" in optimizer.state[network[4].weight]


@pytest.mark.parametrize("name", OTHERS)
def test_a_learning_rate_of_zero_changes_no_weight(name: str) -> None:
    network = model()
    optimizer = OTHERS[name](groups_of(network, lr=0.0))
    before = copy.deepcopy(network)
    for number in range(2):
        step(network, optimizer, number)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("name", OTHERS)
def test_a_step_with_found_inf_changes_nothing(name: str) -> None:
    network = model()
    optimizer: Any = OTHERS[name](groups_of(network))
    step(network, optimizer)
    before, state = copy.deepcopy(network), copy.deepcopy(optimizer.state[network[0].weight])
    optimizer.found_inf, optimizer.grad_scale = torch.ones((), device=DEVICE), torch.ones((), device=DEVICE)
    step(network, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), before.parameters(), strict=True))
    for key, value in optimizer.state[network[0].weight].items():
        if isinstance(value, Tensor):
            assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("name", OTHERS)
def test_a_skip_that_only_the_device_knows_of_changes_neither_kernels_nor_their_state(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session alone: it may not ask, and puts its state back."""
    network = model()
    optimizer: Any = OTHERS[name](groups_of(network))
    step(network, optimizer)
    monkeypatch.setattr(Gate, "is_undecided", True)
    before = [
        copy.deepcopy((kernel.param, kernel.state["spectral_operator"], kernel.state["spectral_stats"]))
        for kernel in kernels_of(optimizer)
    ]
    with torch.no_grad():
        session = OperatorSession(
            kernels_of(optimizer), optimizer.rule.names, Gate(found_inf=torch.ones((), device=DEVICE))
        )
        exchange.run([session.before()])
        exchange.run([session.after()])
    for kernel, kept in zip(kernels_of(optimizer), before, strict=True):
        now = kernel.param, kernel.state["spectral_operator"], kernel.state["spectral_stats"]
        assert all(torch.equal(a, b) for a, b in zip(now, kept, strict=True))


@pytest.mark.parametrize("name", OTHERS)
def test_a_kernel_that_is_not_finite_is_left_as_the_base_leaves_it(name: str) -> None:
    network = model()
    optimizer = OTHERS[name](groups_of(network))
    step(network, optimizer)
    with torch.no_grad():
        network[0].weight[0, 0, 0, 0] = torch.nan
    for param in network.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert int(network[0].weight.isnan().sum()) == 1
    assert network[2].weight.isfinite().all()


def test_a_zero_kernel_is_not_raised_to_its_target_at_once() -> None:
    network = model()
    nn.init.zeros_(network[0].weight)
    optimizer = specopt.NormScaleAdamW(groups_of(network), lr=1e-3, mode="rescale")
    for param in network.parameters():
        param.grad = torch.full_like(param, 1e-3)
    optimizer.step()
    assert 0 < exact(network)[0] < 0.1
    row = next(row for row in specopt.spectral_report(optimizer) if row.name == "0.weight")
    assert row.capped


def test_the_global_random_state_is_untouched() -> None:
    network = model()
    optimizer = OTHERS["rescale"](groups_of(network))
    for param in network.parameters():
        param.grad = torch.ones_like(param)
    before = torch.get_rng_state()
    optimizer.step()
    assert torch.equal(before, torch.get_rng_state())


def test_control_may_change_between_matrix_and_operator_while_training_runs() -> None:
    network = model()
    optimizer = specopt.NormScaleAdamW(groups_of(network), lr=1e-3, mode="rescale")
    for number, conv in enumerate(("operator", "matrix", "operator")):
        for group in optimizer.param_groups:
            group["conv"] = conv
        for more in range(2):
            step(network, optimizer, 2 * number + more)
        state = optimizer.state[network[0].weight]
        assert ("spectral_operator" in state) == (conv == "operator")
    assert exact(network) == pytest.approx([2**0.5, 1.0], rel=1e-3)
