"""The random projections of SpectReg: their law, their expectation, and who draws them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from specopt.penalties import frob_reg, spect_reg
from tests.specopt.helpers import DEVICE
from tests.specopt.penalties.cases import images, lenet, random_state, smooth_net

pytestmark = pytest.mark.usefixtures("on_device")

CLASSES, SAMPLES = 5, 3


def generator(seed: int) -> torch.Generator:
    """On the CPU, wherever the network is."""
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int) -> Tensor:
    """What a generator of the seed draws, on the device."""
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64, device="cpu").to(DEVICE)


@pytest.fixture
def net() -> nn.Sequential:
    return smooth_net(CLASSES)


@pytest.fixture
def x() -> Tensor:
    return images(SAMPLES, 1, 4, 4)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
def test_the_expectation_is_frob_reg_or_a_class_th_of_it(
    net: nn.Sequential, x: Tensor, per_sample: bool, normalized: bool
) -> None:
    """Within four standard errors of 400 draws of 50 projections each, and these errors are below 1 %."""
    options = {"per_sample": per_sample, "normalized": normalized, "projections": 50}
    source = generator(4)
    inputs = x.clone().requires_grad_()
    logits = net(inputs)
    draws = torch.stack([spect_reg(logits, inputs, generator=source, **options).detach() for _ in range(400)])
    exact = frob_reg(logits, inputs).item() / (CLASSES if normalized else 1)
    error = draws.std().item() / math.sqrt(len(draws))
    assert error < 0.01 * exact
    assert abs(draws.mean().item() - exact) < 4 * error


@pytest.mark.parametrize("training", [False, True])
def test_projections_on_every_class_add_up_to_frob_reg(training: bool) -> None:
    net, x = lenet(norm=True).double().train(training), images(SAMPLES, 1, 12, 12)
    each = torch.stack([spect_reg(net, x, z=unit) for unit in torch.eye(10, dtype=torch.float64)])
    torch.testing.assert_close(each.sum(), frob_reg(net, x))


@pytest.mark.parametrize("training", [False, True])
def test_projections_on_every_class_of_every_sample_add_up_to_frob_reg_only_where_samples_do_not_mix(
    training: bool,
) -> None:
    net, x = lenet(norm=True).double().train(training), images(SAMPLES, 1, 12, 12)
    units = torch.eye(SAMPLES * 10, dtype=torch.float64).view(-1, SAMPLES, 10)
    inputs = x.clone().requires_grad_()
    rows = [torch.autograd.grad(logit, inputs, retain_graph=True)[0] for logit in net(inputs).flatten()]
    found = len(units) * spect_reg(net, x, z=units)
    torch.testing.assert_close(found, torch.stack(rows).square().sum() / SAMPLES)
    assert torch.allclose(found, frob_reg(net, x)) is not training


def test_the_standard_deviation_of_a_term_is_that_of_the_docstring() -> None:
    linear = nn.Linear(6, CLASSES).double()
    x = torch.zeros(1, 6, dtype=torch.float64).requires_grad_()
    logits, source = linear(x), generator(1)
    draws = torch.stack([spect_reg(logits, x, generator=source).detach() for _ in range(3000)])
    expected = math.sqrt(2) * (linear.weight @ linear.weight.t()).norm().item()
    assert draws.std().item() == pytest.approx(expected, rel=0.15)


def test_by_default_one_gaussian_is_drawn_for_the_batch(net: nn.Sequential, x: Tensor) -> None:
    z = drawn(CLASSES, seed=7)
    torch.testing.assert_close(spect_reg(net, x, generator=generator(7)), spect_reg(net, x, z=z))


def test_per_sample_draws_one_for_each_and_projections_as_many_as_they_say(net: nn.Sequential, x: Tensor) -> None:
    z = drawn(2, SAMPLES, CLASSES, seed=7)
    found = spect_reg(net, x, generator=generator(7), per_sample=True, projections=2)
    torch.testing.assert_close(found, spect_reg(net, x, z=z))


def test_several_projections_are_the_mean_of_each(net: nn.Sequential, x: Tensor) -> None:
    z = images(4, SAMPLES, CLASSES, seed=9)
    each = torch.stack([spect_reg(net, x, z=one) for one in z])
    torch.testing.assert_close(spect_reg(net, x, z=z), each.mean())


def test_hoffmans_regularizer_is_half_of_c_times_the_normalized_one(net: nn.Sequential, x: Tensor) -> None:
    """Written out as their text has it: unit projections v, ``C/2 · mean ‖v J‖²``."""
    inputs = x.clone().requires_grad_()
    logits = net(inputs)
    v = torch.nn.functional.normalize(images(SAMPLES, CLASSES, seed=9))
    (product,) = torch.autograd.grad(logits, inputs, v, create_graph=True)
    theirs = CLASSES * product.square().sum() / SAMPLES / 2
    torch.testing.assert_close(CLASSES / 2 * spect_reg(net, x, z=5 * v, normalized=True), theirs)


def test_without_a_generator_torchs_own_draws_and_a_generator_leaves_that_alone(net: nn.Sequential, x: Tensor) -> None:
    torch.manual_seed(2)
    first = spect_reg(net, x)
    torch.manual_seed(2)
    torch.testing.assert_close(spect_reg(net, x), first)
    assert spect_reg(net, x) != first
    state = random_state()
    spect_reg(net, x, generator=generator(0))
    assert torch.equal(random_state(), state)


def test_given_projections_are_constants(net: nn.Sequential, x: Tensor) -> None:
    z = images(CLASSES, seed=2).requires_grad_()
    spect_reg(net, x, z=z).backward()
    assert z.grad is None


@pytest.mark.skipif(DEVICE.type == "cpu", reason="on a CPU it is refused")
def test_on_a_device_a_normalized_projection_of_zeros_makes_the_penalty_nan(net: nn.Sequential, x: Tensor) -> None:
    assert spect_reg(net, x, z=torch.zeros(CLASSES), normalized=True).isnan()


def test_a_generator_of_the_device_draws_there(net: nn.Sequential, x: Tensor) -> None:
    first, second = (spect_reg(net, x, generator=torch.Generator(DEVICE).manual_seed(3)) for _ in range(2))
    torch.testing.assert_close(first, second)
