"""The fast gradient method: its step, its objective, and what two forwards have in common."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specopt.penalties import adversarial, fgm_step
from tests.specopt.penalties.cases import assert_same, images, labels, lenet, random_state, smooth_net

pytestmark = pytest.mark.usefixtures("on_device")


def moved(net: nn.Module, x: Tensor, targets: Tensor, epsilon: float) -> Tensor:
    """Inputs that are each moved by a step along their own gradient, one sample after the other."""
    steps = []
    for sample, target in zip(x, targets, strict=True):
        point = sample[None].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(point), target[None]), point)
        steps.append(epsilon * gradient[0] / gradient.norm())
    return x + torch.stack(steps)


@pytest.mark.parametrize("shape", [(4,), (4, 5), (4, 3, 2, 2), (1, 7)])
def test_step_has_length_epsilon_along_the_gradient(shape: tuple[int, ...]) -> None:
    gradient = images(*shape)
    step = fgm_step(gradient, 0.25)
    rows = gradient.reshape(len(gradient), -1)
    torch.testing.assert_close(step.reshape(len(step), -1), 0.25 * F.normalize(rows, eps=0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_step_is_the_same_for_gradients_of_any_scale(dtype: torch.dtype, scale: float) -> None:
    gradient = images(4, 3, 5)
    gradient[2] = 0
    step = fgm_step((gradient * scale).to(dtype), 2.0)
    assert step.dtype == dtype
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(step.double(), fgm_step(gradient, 2.0), rtol=tolerance, atol=tolerance)
    assert step[2].count_nonzero() == 0


def test_step_of_float16_gradients_is_made_in_float32() -> None:
    for value in (6e-8, 6e4):
        step = fgm_step(torch.full((2, 64), value, dtype=torch.float16), 1.0)
        assert step.dtype == torch.float16
        torch.testing.assert_close(step, torch.full((2, 64), 0.125, dtype=torch.float16))


def test_step_keeps_nan_within_its_sample() -> None:
    gradient = torch.ones(3, 4)
    gradient[0, 1], gradient[1, 2] = torch.nan, torch.inf
    step = fgm_step(gradient, 1.0)
    assert step[0].isnan().any() and step[1].isnan().any()
    torch.testing.assert_close(step[2], torch.full((4,), 0.5))


def test_step_is_a_constant_and_zero_for_epsilon_zero() -> None:
    gradient = images(2, 3).requires_grad_()
    step = fgm_step(gradient, 0)
    assert not step.requires_grad and step.count_nonzero() == 0


@pytest.mark.parametrize("gap", [10, 17, 20])
def test_step_of_an_almost_certain_prediction_has_the_direction_of_that_in_float64(gap: float) -> None:
    linear, x, targets = nn.Linear(6, 4), images(3, 6, dtype=torch.float32), labels(3, 1)
    linear.bias.data[0] += gap
    seen: list[Tensor] = []
    linear.register_forward_pre_hook(lambda _, taken: seen.append(taken[0]))
    adversarial(linear, x, targets, epsilon=1.0)
    expected = moved(copy.deepcopy(linear).double(), x.double(), targets, 1.0)
    torch.testing.assert_close(seen[1].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [smooth_net, lambda: lenet(size=12).double()])
def test_adversarial_is_the_mean_loss_at_inputs_moved_by_a_constant_step(make: object) -> None:
    assert callable(make)
    net = make()
    x = images(4, 1, 4, 4) if len(net) == 4 else images(4, 1, 12, 12)
    targets = labels(4)
    expected = F.cross_entropy(net(moved(net, x, targets, 0.3)), targets)
    assert_same(adversarial(net, x, targets, epsilon=0.3), expected, net)


@pytest.mark.parametrize("alpha", [0, 0.5, 0.9, 1])
def test_mixed_objective_weighs_the_clean_and_the_moved_loss(alpha: float) -> None:
    net, x, targets = smooth_net(), images(4, 1, 4, 4), labels(4)
    clean = F.cross_entropy(net(x), targets)
    there = F.cross_entropy(net(moved(net, x, targets, 1.0)), targets)
    found = adversarial(net, x, targets, epsilon=1.0, alpha=alpha)
    assert_same(found, alpha * clean + (1 - alpha) * there, net)


def test_epsilon_zero_is_the_clean_loss() -> None:
    net, x, targets = smooth_net(), images(4, 1, 4, 4), labels(4)
    assert_same(adversarial(net, x, targets, epsilon=0), F.cross_entropy(net(x), targets), net)


def test_a_step_up_the_loss_raises_it() -> None:
    net, x, targets = smooth_net(), images(4, 1, 4, 4), labels(4)
    assert adversarial(net, x, targets, epsilon=0.1) > F.cross_entropy(net(x), targets)


def test_another_loss_gives_both_the_direction_and_the_value() -> None:
    net, x, targets = smooth_net(), images(4, 1, 4, 4), labels(4)
    found = adversarial(net, x, targets, epsilon=0.3, loss=lambda g, t: -F.cross_entropy(g, t, reduction="none"))
    assert_same(found, -F.cross_entropy(net(moved(net, x, targets, -0.3)), targets), net)


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_both_forwards_see_one_dropout_mask_and_leave_the_random_state_as_one_does(alpha: float | None) -> None:
    net, x, targets = lenet(dropout=0.5).double(), images(4, 1, 12, 12), labels(4, 10)
    masks: list[Tensor] = []
    dropout = next(module for module in net if isinstance(module, nn.Dropout))
    dropout.register_forward_hook(lambda _, taken, given: masks.append((given[0] == 0) & (taken[0][0] != 0)))
    torch.manual_seed(5)
    adversarial(net, x, targets, epsilon=1e-9, alpha=alpha)
    after = random_state()
    assert len(masks) == 2 and masks[0].any() and torch.equal(*masks)
    torch.manual_seed(5)
    net(x)
    assert torch.equal(after, random_state())


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_running_statistics_are_updated_by_both_forwards_in_turn(alpha: float | None) -> None:
    net, x, targets = lenet(norm=True).double(), images(4, 1, 12, 12), labels(4, 10)
    other = copy.deepcopy(net)
    adversarial(net, x, targets, epsilon=0.3, alpha=alpha).backward()
    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(other(point), targets, reduction="sum"), point)
    other(x + fgm_step(gradient, 0.3))
    torch.testing.assert_close(dict(net.named_buffers()), dict(other.named_buffers()))
    assert net[3].num_batches_tracked == 2


def test_eval_mode_changes_nothing_of_the_model_and_training_mode_stays() -> None:
    net, x, targets = lenet(norm=True, dropout=0.5).double().eval(), images(4, 1, 12, 12), labels(4, 10)
    before = copy.deepcopy(net.state_dict())
    adversarial(net, x, targets, epsilon=0.3).backward()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert not net.training
