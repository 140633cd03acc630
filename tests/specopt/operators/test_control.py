"""Rules under ``conv="operator"``, against the SVD of the unrolled operator."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

import specopt
from specopt import LayerShapes, kernels
from specopt.operators import ConvOperator, Geometry, parse
from specopt.rules.operator import OperatorSession, kernels_of
from specopt.seeing.snapshot import STORED, Snapshot
from specopt.session import Gate
from specopt.sharding import exchange
from specopt.tracker.common import STATS
from tests.specopt.helpers import DEVICE
from tests.specopt.operators.cases import norm
from tests.specopt.test_monitor import NoSync

SIZE = (7, 7)
OTHERS: dict[str, Callable[[Any], Optimizer]] = {
    "penalty": lambda groups: specopt.SNRSGD(groups, lr=0.05, momentum=0.9, snr_lambda=0.1),
    "rescale": lambda groups: specopt.NormScaleAdamW(groups, lr=1e-3, mode="rescale"),
    "cap": lambda groups: specopt.NormScaleAdamW(groups, lr=1e-3, mode="cap", target=1.0),
    "both": lambda groups: specopt.wrap(
        torch.optim.AdamW(groups, lr=1e-3),
        specopt.Compose(specopt.SpectralPenalty(0.1), specopt.NormScale(mode="cap", target=1.0)),
    ),
    "decay": lambda groups: specopt.wrap(torch.optim.SGD(groups, lr=0.05), specopt.SpectralDecay(0.1)),
}


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, groups=2),
        nn.Flatten(),
        nn.Linear(36, 48),
    ).to(DEVICE, dtype)


SHAPES = {f"{i}.weight": LayerShapes((c, *SIZE), (0,)) for i, c in ((0, 2), (2, 4))}


def groups_of(network: nn.Module, **options: Any) -> Any:
    return specopt.param_groups(network, conv="operator", shapes=SHAPES, **options)


def operators(network: nn.Sequential) -> list[ConvOperator]:
    convs = [layer for layer in network if isinstance(layer, nn.Conv2d)]
    return [ConvOperator.of(conv.weight.cpu(), Geometry.of(conv, SIZE)) for conv in convs]


def exact(network: nn.Sequential) -> list[float]:
    return [norm(operator) for operator in operators(network)]


def step(network: nn.Module, optimizer: Optimizer, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(network.parameters()).dtype
    inputs = torch.randn(8, 2, *SIZE, generator=generator).to(DEVICE, dtype)
    optimizer.zero_grad()
    network(inputs).float().square().mean().backward()
    optimizer.step()


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_saved_state_goes_on_to_the_same_bits(name: str, dtype: torch.dtype) -> None:
    network = model(dtype)
    optimizer = OTHERS[name](groups_of(network))
    for number in range(3):
        step(network, optimizer, number)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(network)
    loaded = OTHERS[name](groups_of(other))
    loaded.load_state_dict(torch.load(file, weights_only=True))
    copied = copy.deepcopy((network, optimizer))
    for pair in ((network, optimizer), (other, loaded), copied):
        step(*pair, 3)
    for third in (other, copied[0]):
        assert all(torch.equal(a, b) for a, b in zip(network.parameters(), third.parameters(), strict=True))
    block = loaded.state[other[0].weight]["spectral_operator"]
    assert block.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_a_distributed_checkpoint_brings_geometries_and_blocks(flat: bool) -> None:
    network = model()
    optimizer = OTHERS["cap"](groups_of(network))
    for number in range(3):
        step(network, optimizer, number)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    saved = copy.deepcopy(get_optimizer_state_dict(network, optimizer, options=options))
    other = copy.deepcopy(network)
    loaded = OTHERS["cap"](groups_of(other))
    set_optimizer_state_dict(other, loaded, saved, options=options)
    for pair in ((network, optimizer), (other, loaded)):
        step(*pair, 3)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))


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


# --- groups and errors ----------------------------------------------------------------------------------------------


def test_param_groups_writes_the_geometries_beside_the_params() -> None:
    found = {}
    for group in groups_of(model()):
        for (name, _), text in zip(
            group["params"], group.get("geometry") or [None] * len(group["params"]), strict=True
        ):
            found[name] = text
    assert found["0.weight"] == "conv2d(7x7, padding=1x1, mode=circular)"
    assert found["2.weight"] == "conv2d(7x7, stride=2x2, groups=2)"
    assert found["4.weight"] is None
    assert parse(found["2.weight"]).groups == 2


def test_weights_of_three_dimensions_that_are_no_convolution_stay_matrices() -> None:
    network = nn.ModuleDict({"conv": nn.Conv2d(2, 4, 3), "mix": nn.Bilinear(5, 6, 7)})
    shapes = {"conv.weight": SHAPES["0.weight"]}
    optimizer = specopt.SNRSGD(specopt.param_groups(network, conv="operator", shapes=shapes))
    rows = {row.name: row for row in specopt.spectral_report(optimizer)}
    exact_norm = torch.linalg.matrix_norm(network["mix"].weight.detach().flatten(1), ord=2)
    assert rows["mix.weight"].sigma == pytest.approx(float(exact_norm), rel=1e-3)
    assert rows["conv.weight"].stable_rank != rows["conv.weight"].stable_rank


def test_a_convolution_of_unknown_size_is_named() -> None:
    with pytest.raises(ValueError, match=r"2\.weight is a convolution.*size of its input"):
        specopt.param_groups(model(), conv="operator", shapes={"0.weight": SHAPES["0.weight"]})
    with pytest.raises(ValueError, match=r"0\.weight is a convolution"):
        specopt.param_groups(model(), conv="operator")
    with pytest.raises(ValueError, match=r"0\.weight: size"):
        shapes = {**SHAPES, "0.weight": LayerShapes((2, 7), (0,))}
        specopt.param_groups(model(), conv="operator", shapes=shapes)


class Tied(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1, **options)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.other(self.one(x))
        return result


def test_a_kernel_of_different_convolutions_is_named() -> None:
    inputs = torch.randn(1, 3, 12, 12)
    with pytest.raises(ValueError, match=r"one\.weight is the kernel of different convolutions, .*stride=3x3"):
        specopt.param_groups(Tied(stride=3), conv="operator", inputs=inputs)
    (group, *_) = specopt.param_groups(Tied(), conv="operator", inputs=inputs)
    assert group["geometry"] == ["conv2d(12x12, padding=1x1)"]


def test_another_kind_of_control_is_refused() -> None:
    with pytest.raises(ValueError, match="conv must be one of 'matrix', 'operator', got 'op'"):
        specopt.param_groups(model(), conv="op")


def test_operator_without_a_geometry_is_refused_by_the_optimizer_too() -> None:
    conv = nn.Conv2d(2, 4, 3)
    group = {"params": [("body.weight", conv.weight)], "conv": "operator"}
    with pytest.raises(ValueError, match=r"body\.weight of shape .* needs a geometry"):
        specopt.SNRSGD([group])
    with pytest.raises(ValueError, match="needs a geometry"):
        specopt.wrap(torch.optim.SGD([group], lr=0.1), specopt.SpectralPenalty(0.1))


@pytest.mark.parametrize(("geometry", "named"), [(None, "needs a geometry"), ([], "entry for each of 2 params")])
def test_what_no_operator_can_be_made_of_is_refused_where_it_was_set_in_a_group(geometry: Any, named: str) -> None:
    conv = nn.Conv2d(2, 4, 3)
    optimizer = specopt.NormScaleAdamW(conv.parameters(), lr=1e-3, mode="cap")
    conv(torch.ones(1, 2, 5, 5)).sum().backward()
    saved = optimizer.state_dict()
    for groups in (optimizer.param_groups, saved["param_groups"]):
        groups[0].update(conv="operator", geometry=geometry)
    before = conv.weight.detach().clone()
    with pytest.raises(ValueError, match=named):
        optimizer.step()
    with pytest.raises(ValueError, match=named):
        specopt.NormScaleAdamW(conv.parameters(), lr=1e-3, mode="cap").load_state_dict(saved)
    assert torch.equal(conv.weight, before)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"conv": "fourier"}, "conv must be one of 'matrix', 'operator'"),
        ({"geometry": "conv2d(7x7)"}, "geometry must be a list"),
        ({"geometry": ["conv2d"]}, "geometry must be text like"),
        ({"geometry": ["conv2d(7x7)", None]}, "geometry must have an entry for each of 1 params"),
        ({"geometry": ["conv1d(7)"]}, "w: geometry"),
        ({"geometry": ["conv2d(2x2)"]}, "w: size"),
        ({"mode": "set"}, "mode must be 'rescale' or 'cap' with conv='operator', got 'set'"),
        ({"norm": "frobenius", "mode": "cap"}, "norm must be 'spectral' with conv='operator'"),
    ],
)
def test_options_that_make_no_operator_are_refused(options: dict[str, Any], named: str) -> None:
    weight = torch.zeros(4, 2, 3, 3, requires_grad=True)
    good = {"conv": "operator", "geometry": ["conv2d(7x7)"], "mode": "cap"}
    specopt.NormScaleAdamW([{"params": [("w", weight)], **good}])
    with pytest.raises(ValueError) as error:
        specopt.NormScaleAdamW([{"params": [("w", weight)], **good, **options}])
    assert named in str(error.value)


def test_a_kernel_whose_shape_alone_tells_nothing_is_controlled_without_a_warning() -> None:
    depthwise = nn.Conv2d(4, 4, 3, groups=4, bias=False)
    group = {"params": [depthwise.weight], "conv": "operator", "geometry": ["conv2d(7x7, groups=4)"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = specopt.SNRSGD([group])
    assert [row.shape for row in specopt.spectral_report(optimizer)] == [(4, 1, 3, 3)]
    for _ in range(3):
        depthwise.weight.grad = torch.ones_like(depthwise.weight)
        optimizer.step()
    assert optimizer.state[depthwise.weight]["spectral_step"] == 3


def test_complex_kernels_are_refused() -> None:
    weight = torch.zeros(4, 2, 3, 3, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"0\.0 must be a dense real kernel"):
        specopt.SNRSGD([{"params": [weight], "conv": "operator", "geometry": ["conv2d(7x7)"]}])


def test_state_of_another_kernel_is_refused() -> None:
    network = model()
    optimizer = OTHERS["cap"](groups_of(network))
    step(network, optimizer)
    saved = optimizer.state_dict()
    saved["state"] = copy.deepcopy(saved["state"])
    for state in saved["state"].values():
        if "spectral_operator" in state:
            state["spectral_operator"] = state["spectral_operator"][:-1]
    with pytest.raises(ValueError, match="spectral_operator of parameter"):
        optimizer.load_state_dict(saved)


def resized(size: int, network: nn.Module, name: str, **options: Any) -> Any:
    shapes = {layer: LayerShapes((c, size, size), (0,)) for layer, c in (("0.weight", 2), ("2.weight", 4))}
    return OTHERS[name](specopt.param_groups(network, conv="operator", shapes=shapes, **options))


def nudge(network: nn.Module, optimizer: Optimizer, seed: int) -> None:
    """A step on random gradients, for networks that take inputs of any size."""
    generator = torch.Generator().manual_seed(seed)
    for param in network.parameters():
        param.grad = torch.randn(param.shape, generator=generator).to(param)
    optimizer.step()


@pytest.mark.parametrize("size", [5, 9])
@pytest.mark.parametrize("name", OTHERS)
def test_after_training_on_inputs_of_another_size_the_groups_own_geometry_counts(name: str, size: int) -> None:
    network = model()
    first = resized(size, network, name)
    nudge(network, first, 0)
    second = resized(SIZE[0], network, name)
    geometries = [group["geometry"] for group in second.param_groups]
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert [group["geometry"] for group in second.param_groups] == geometries
    nudge(network, second, 1)
    assert [second.state[network[i].weight]["spectral_step"] for i in (0, 2)] == [1, 1]  # cold
    rows = {row.name: row.sigma for row in specopt.spectral_report(second)}
    assert [rows[f"{i}.weight"] for i in (0, 2)] == pytest.approx(exact(network), rel=1e-3)
    if name == "cap":
        assert max(exact(network)) <= 1 + 1e-3


def test_an_initial_norm_of_inputs_of_another_size_is_noted_anew() -> None:
    network = model()
    first = resized(3, network, "rescale", target="initial")
    nudge(network, first, 0)
    second = resized(SIZE[0], network, "rescale", target="initial")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    before = exact(network)
    nudge(network, second, 1)
    noted = [float(second.state[network[i].weight]["spectral_initial_operator"]) for i in (0, 2)]
    assert noted == pytest.approx(before, rel=2e-3)
    assert exact(network) == pytest.approx(before, rel=2e-3)


def test_a_group_without_a_geometry_takes_the_checkpoint_s() -> None:
    network = model()
    first = OTHERS["cap"](groups_of(network))
    step(network, first)
    saved = copy.deepcopy(first.state_dict())
    second = OTHERS["cap"](groups_of(network))
    for group in second.param_groups:
        group.update(conv="matrix", geometry=None)
    second.load_state_dict(saved)
    assert [group["geometry"] for group in second.param_groups] == [g["geometry"] for g in saved["param_groups"]]
    step(network, second, 1)
    assert second.state[network[0].weight]["spectral_step"] == 2


def test_a_state_of_the_same_size_of_input_goes_on() -> None:
    network = model()
    first = resized(SIZE[0], network, "cap")
    nudge(network, first, 0)
    second = resized(SIZE[0], network, "cap")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    nudge(network, second, 1)
    assert second.state[network[0].weight]["spectral_step"] == 2
