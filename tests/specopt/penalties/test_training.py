"""A few steps with a penalty in the loss lower what it penalizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specopt.penalties import adversarial, confidence_penalty, double_backprop, frob_reg, jac_reg, spect_reg
from tests.specopt.penalties.cases import images, labels, lenet

pytestmark = pytest.mark.usefixtures("on_device")

Penalty = Callable[[Tensor, Tensor, Tensor], Tensor]

PENALTIES: dict[str, tuple[Penalty, Penalty, float]] = {
    "double_backprop": (double_backprop, double_backprop, 10.0),
    "spect_reg": (lambda g, x, _: spect_reg(g, x), lambda g, x, _: frob_reg(g, x), 0.3),
    "frob_reg": (lambda g, x, _: frob_reg(g, x), lambda g, x, _: frob_reg(g, x), 0.3),
    "frob_reg in chunks": (lambda g, x, _: frob_reg(g, x, chunk=4), lambda g, x, _: frob_reg(g, x), 0.3),
    "jac_reg": (lambda g, x, _: jac_reg(g, x), lambda g, x, _: jac_reg(g, x), 10.0),
    "confidence_penalty": (lambda g, *_: confidence_penalty(g), lambda g, *_: confidence_penalty(g), 1.0),
}
"""By name: what is added to the loss, what is measured, and lambda."""


def trained(penalty: Penalty | None, weight: float, seed: int = 0) -> nn.Sequential:
    """LeNet-like, 30 steps of Adam on one batch."""
    net, x, targets = lenet(norm=True), images(20, 1, 12, 12, dtype=torch.float32), labels(20, 10)
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(30):
        inputs = x.clone().requires_grad_()
        logits = net(inputs)
        loss = F.cross_entropy(logits, targets)
        if penalty:
            loss = loss + weight * penalty(logits, inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


@pytest.fixture(scope="module")
def plain() -> nn.Sequential:
    return trained(None, 0.0)


@pytest.mark.parametrize("name", PENALTIES)
def test_training_with_the_penalty_ends_at_a_lower_one_than_without(name: str, plain: nn.Sequential) -> None:
    penalty, measure, weight = PENALTIES[name]
    x, targets = images(20, 1, 12, 12, dtype=torch.float32), labels(20, 10)
    values = []
    for net in (trained(penalty, weight), plain):
        inputs = x.clone().requires_grad_()
        values.append(measure(net(inputs), inputs, targets).item())
    with_penalty, without = values
    assert with_penalty < without - 0.3 * abs(without)


def test_adversarial_training_lowers_the_loss_at_moved_inputs(plain: nn.Sequential) -> None:
    x, targets = images(20, 1, 12, 12, dtype=torch.float32), labels(20, 10)
    net = lenet(norm=True)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        adversarial(net, x, targets, epsilon=2.0, alpha=0.5).backward()
        optimizer.step()
    assert adversarial(net, x, targets, epsilon=2.0) < 0.7 * adversarial(plain, x, targets, epsilon=2.0)
