"""Batch norm, dropout, autocast, dtypes and layouts: what is differentiated, and in which precision."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from specopt.penalties import adversarial, confidence_penalty, double_backprop, frob_reg, jac_reg, spect_reg
from tests.specopt.helpers import DEVICE
from tests.specopt.penalties.cases import assert_same, images, labels, lenet, random_state, smooth_net

pytestmark = pytest.mark.usefixtures("on_device")

Z = images(10, seed=2)
TARGETS = labels(4, 10)
PENALTIES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "double_backprop": lambda output, x: double_backprop(output, x, TARGETS),
    "spect_reg": lambda output, x: spect_reg(output, x, z=Z),
    "frob_reg": frob_reg,
    "jac_reg": jac_reg,
}
EVERY = PENALTIES | {
    "confidence_penalty": lambda output, x: confidence_penalty(output, x),
    "adversarial": lambda output, x: adversarial(output, x, TARGETS, epsilon=0.1, alpha=0.5),
}
SCALARS: dict[str, Callable[[Tensor], Tensor]] = {
    "double_backprop": lambda logits: F.cross_entropy(logits, TARGETS, reduction="sum")[None],
    "spect_reg": lambda logits: (logits @ Z.to(logits.dtype)).sum()[None],
    "frob_reg": lambda logits: logits.sum(0),
    "jac_reg": lambda logits: logits.softmax(1).sum(0),
}
"""Sums over the batch whose gradients the penalties are made of."""


def by_sums(name: str, logits: Tensor, inputs: Tensor) -> Tensor:
    """The mean over samples of the squared gradients of the batch's sums, one after the other."""
    found = [torch.autograd.grad(value, inputs, create_graph=True)[0] for value in SCALARS[name](logits)]
    return torch.stack(found).square().sum() / len(logits)


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_gradients_are_those_of_the_sum_over_the_batch(name: str, training: bool) -> None:
    net = lenet(norm=True).double().train(training)
    x = images(4, 1, 12, 12).requires_grad_()
    assert_same(PENALTIES[name](net, x), by_sums(name, net(x), x), net)


@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_makes_one_forward_which_updates_running_statistics_once(name: str) -> None:
    net, x = lenet(norm=True).double(), images(4, 1, 12, 12)
    other = copy.deepcopy(net)
    PENALTIES[name](net, x)
    other(x)
    torch.testing.assert_close(dict(net.named_buffers()), dict(other.named_buffers()), rtol=0, atol=0)


@pytest.mark.parametrize("name", PENALTIES)
def test_a_model_that_is_checkpointed_updates_running_statistics_again_with_every_recomputation(name: str) -> None:
    net, x = lenet(norm=True).double(), images(4, 1, 12, 12)
    PENALTIES[name](lambda x: checkpoint(net, x, use_reentrant=False), x).backward()
    assert net[3].num_batches_tracked > 1


@pytest.mark.parametrize("name", PENALTIES)
def test_dropout_has_one_mask_in_the_output_and_in_its_gradient(name: str) -> None:
    net = lenet(dropout=0.5).double()
    x = images(4, 1, 12, 12).requires_grad_()
    torch.manual_seed(3)
    found = PENALTIES[name](net, x)
    after = random_state()
    torch.manual_seed(3)
    logits = net(x)
    assert_same(found, by_sums(name, logits, x), net)
    assert torch.equal(after, random_state())


@pytest.mark.parametrize("name", PENALTIES)
def test_a_model_that_is_checkpointed_computes_its_mask_again(name: str) -> None:
    """Its forward runs again within the derivative: there, for all classes, under the mask that it had."""
    net = lenet(dropout=0.5).double()
    x = images(4, 1, 12, 12)
    torch.manual_seed(3)
    expected = PENALTIES[name](net, x)
    torch.manual_seed(3)
    found = PENALTIES[name](lambda x: checkpoint(net, x, use_reentrant=False), x)
    assert_same(found, expected, net)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_of_a_model_in_half_precision_are_float32_and_near_those_in_float64(
    name: str, dtype: torch.dtype
) -> None:
    net, x = lenet(norm=True).eval(), images(4, 1, 12, 12)
    exact = EVERY[name](net.double(), x)
    net = net.to(dtype)
    found = EVERY[name](net, x.to(dtype))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.shape == ()
    assert found.item() == pytest.approx(exact.item(), rel=8 * torch.finfo(dtype).eps + 1e-6)
    found.backward()
    assert all(param.grad is None or param.grad.isfinite().all() for param in net.parameters())


@pytest.mark.parametrize(
    ("name", "given"), [*((name, "model") for name in EVERY), *((name, "logits") for name in PENALTIES)]
)
def test_under_autocast_the_forward_alone_is_in_bfloat16(name: str, given: str) -> None:
    net, x = lenet(), images(4, 1, 12, 12, dtype=torch.float32).requires_grad_()
    exact = EVERY[name](net, x)
    seen = []
    net[-1].register_forward_hook(lambda _, __, logits: seen.append(logits.dtype))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = EVERY[name](net if given == "model" else net(x), x)
        found.backward()
    assert set(seen) == {torch.bfloat16}
    assert found.dtype == torch.float32
    assert 0 < abs(found.item() - exact.item()) < 0.1 * abs(exact.item())


def test_squares_are_summed_in_float32() -> None:
    """An input's gradient of 300 has a square beyond float16's range, and one of 2^-12 a square below it."""
    for weight in (300.0, 2.0**-12):
        linear = nn.Linear(4, 2, bias=False).half()
        nn.init.constant_(linear.weight, weight)
        x = torch.zeros(3, 4, dtype=torch.float16)
        assert frob_reg(linear, x).item() == pytest.approx(8 * weight**2)


@pytest.mark.parametrize("name", EVERY)
def test_layout_of_the_inputs_does_not_matter(name: str) -> None:
    net, x = lenet(channels=3).double(), images(4, 3, 12, 12)
    wide = torch.zeros(4, 3, 12, 24, dtype=torch.float64)
    wide[..., ::2] = x
    for other in (x.to(memory_format=torch.channels_last), wide[..., ::2], x.mT.contiguous().mT):
        assert other.stride() != x.stride()
        assert_same(EVERY[name](net, other), EVERY[name](net, x), net)


@pytest.mark.parametrize("name", EVERY)
def test_the_callers_inputs_are_left_as_they_are(name: str) -> None:
    net, x = lenet().double(), images(4, 1, 12, 12)
    held, version = x.clone(), x._version
    EVERY[name](net, x).backward()
    assert torch.equal(x, held) and x._version == version and x.grad is None and not x.requires_grad


class Overwriting(nn.Module):
    """Writes to what it is called with, as a model does that begins with nn.ReLU(inplace=True); clamps it unseen."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x.clamp_(-1, 1)
        logits: Tensor = self.net(x.relu_())
        return logits


@pytest.mark.parametrize("name", [*PENALTIES, "adversarial"])
def test_a_model_may_write_to_its_inputs_which_are_a_copy(name: str) -> None:
    net, x = lenet().double(), images(4, 1, 12, 12)
    held = x.clone()
    value = EVERY[name](Overwriting(net), x)
    value.backward(retain_graph=True)
    assert torch.equal(x, held)
    if name != "adversarial":
        assert_same(value, EVERY[name](lambda z: net(z.relu()), x.clamp(-1, 1)), net)


@pytest.mark.parametrize("name", EVERY)
def test_nan_in_a_sample_is_passed_on(name: str) -> None:
    net, x = (
        nn.Sequential(nn.Flatten(), nn.Linear(144, 20), nn.Tanh(), nn.Linear(20, 10)).double(),
        images(4, 1, 12, 12),
    )
    x[1, 0, 3, 3] = torch.nan
    assert EVERY[name](net, x).isnan()


@pytest.mark.parametrize("name", EVERY)
def test_weights_that_are_frozen_get_no_gradient_and_the_others_theirs(name: str) -> None:
    net, x = lenet().double(), images(4, 1, 12, 12)
    net[0].requires_grad_(False)
    EVERY[name](net, x).backward()
    assert net[0].weight.grad is None
    assert net[4].weight.grad.count_nonzero() > 0


@pytest.mark.parametrize("name", EVERY)
def test_of_a_frozen_model_the_value_is_that_of_any(name: str) -> None:
    net, x = lenet().double(), images(4, 1, 12, 12)
    wanted = EVERY[name](net, x)
    torch.testing.assert_close(EVERY[name](net.requires_grad_(False), x).detach(), wanted.detach())


def test_a_stack_of_models_is_one_batch_and_gives_the_mean_over_the_models() -> None:
    """Seeds side by side, by torch.func: samples do not mix, so that the penalty of all is the mean of theirs."""
    nets = [smooth_net() for _ in range(3)]
    for i, net in enumerate(nets):
        net[0].weight.data.mul_(1 + i)
    params, _ = torch.func.stack_module_state(nets)
    x = images(3 * 4, 1, 4, 4).requires_grad_()
    logits = torch.func.vmap(lambda p, x: torch.func.functional_call(nets[0], p, (x,)))(params, x.unflatten(0, (3, 4)))
    for penalty in (frob_reg, jac_reg):
        each = [penalty(net, part) for net, part in zip(nets, x.detach().chunk(3), strict=True)]
        torch.testing.assert_close(penalty(logits.flatten(0, 1), x), torch.stack(each).mean())
