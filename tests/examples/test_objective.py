"""What is minimized with a penalty, against the formula of each."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from papers.methods import Method, groups_of, optimizer_of
from papers.models import build
from papers.objective import PENALTIES, Batch, Objective
from torch import Tensor, nn

LABELS = torch.arange(6) % 10
WEIGHT = 0.3


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return build("lenet", (1, 16, 16), 10, scale=0.2).double().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 1, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def jacobians(net: nn.Module, images: Tensor, of: str) -> Tensor:
    """(N, classes, pixels) of logits or probabilities, class by class."""
    x = images.clone().requires_grad_()
    outputs = net(x) if of == "logits" else net(x).softmax(1)
    rows = [torch.autograd.grad(outputs[:, c].sum(), x, create_graph=True)[0].flatten(1) for c in range(10)]
    return torch.stack(rows, 1)


def by_formula(name: str, net: nn.Module, images: Tensor, z: Tensor) -> Tensor:
    """The penalty as the report adds it to the loss."""
    if name == "double-back":
        x = images.clone().requires_grad_()
        losses = F.cross_entropy(net(x), LABELS, reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
        return gradient.flatten(1).square().sum(1).mean()
    if name == "spect-reg":
        return torch.einsum("c,ncp->np", z, jacobians(net, images, "logits")).square().sum(1).mean()
    if name == "confidence-penalty":
        p = net(images).softmax(1)
        return (p * (p + 1e-6).log()).sum()
    of = "logits" if name == "frob-reg" else "probabilities"
    return jacobians(net, images, of).square().sum((1, 2)).mean()


@pytest.mark.parametrize("name", PENALTIES)
def test_gradients_are_those_of_the_mean_loss_and_the_weighted_penalty(
    name: str, net: nn.Module, images: Tensor
) -> None:
    z = torch.randn(10, dtype=torch.float64)
    weights = list(net.parameters())
    expected = F.cross_entropy(net(images), LABELS) + WEIGHT * by_formula(name, net, images, z)
    wanted = torch.autograd.grad(expected, weights)
    method = Method(name, penalty=name, penalty_weight=WEIGHT)
    Objective(method, net, weights).fill_gradients(Batch(images, LABELS, projection=z))
    torch.testing.assert_close([weight.grad for weight in weights], list(wanted), rtol=1e-5, atol=1e-8)
    plain = torch.autograd.grad(F.cross_entropy(net(images), LABELS), weights)
    assert max((a - b).norm() / b.norm() for a, b in zip(wanted, plain, strict=True)) > 1e-3


@pytest.mark.parametrize("name", PENALTIES)
def test_several_networks_get_each_its_own_gradients(name: str, net: nn.Module, images: Tensor) -> None:
    """Here one network that has both batches, as two would."""
    z = torch.randn(2, 10, dtype=torch.float64)
    weights, method = list(net.parameters()), Method(name, penalty=name, penalty_weight=WEIGHT)
    objective = Objective(method, net, weights)
    for part, labels, one in zip(images.split(3), LABELS.split(3), z, strict=True):
        objective.fill_gradients(Batch(part, labels, projection=one))
    apart = [weight.grad for weight in weights]
    for weight in weights:
        weight.grad = None
    objective.fill_gradients(Batch(images, LABELS, 2, z.repeat_interleave(3, 0)))
    torch.testing.assert_close([weight.grad for weight in weights], apart)


@pytest.mark.parametrize("rule", [{}, {"snr_lambda": 0.01}], ids=("no rule", "rule"))
@pytest.mark.parametrize("base", ["sgd", "adam", "adamw"])
def test_filters_alone_decay_where_the_method_says_so(base: str, rule: dict[str, float], net: nn.Module) -> None:
    method = Method("some", base=base, weight_decay=5e-4, decayed="convolutions", **rule)  # type: ignore[arg-type]
    groups = groups_of(method, net, torch.zeros(1, 1, 16, 16, dtype=torch.float64))
    optimizer = optimizer_of(method, groups, lr=1e-3, momentum=0.9)
    decay = {param: group["weight_decay"] for group in optimizer.param_groups for param in group["params"]}
    found = {name: decay[param] for name, param in net.named_parameters()}
    assert {name for name, value in found.items() if value} == {"conv1.weight", "conv2.weight"}
    assert len(found) == 8 and set(found.values()) == {0.0, 5e-4}
    assert isinstance(optimizer, {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[base])


def test_adversarial_training_drops_the_same_units_in_both_forwards_and_draws_once(images: Tensor) -> None:
    net = build("lenet", (1, 16, 16), 10, scale=0.2, dropout=0.5).double()
    seen: list[Tensor] = []
    net.dropout.register_forward_hook(lambda _, inputs, output: seen.append((output == 0) & (inputs[0] != 0)))  # type: ignore[union-attr]
    torch.manual_seed(3)
    Objective(Method("adversarial", adversarial=1e-9), net, list(net.parameters())).fill_gradients(
        Batch(images, LABELS)
    )
    after = torch.rand(1)
    assert len(seen) == 2 and torch.equal(*seen) and seen[0].any()
    torch.manual_seed(3)
    net(images)
    assert torch.equal(torch.rand(1), after)
