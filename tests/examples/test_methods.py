"""Methods: the optimizer and the loss that each stands for."""

from __future__ import annotations

import math
from weakref import WeakSet

import pytest
import torch
import torch.nn.functional as F
from papers.methods import Method, optimizer_for, start_orthogonal
from papers.objective import Batch, Objective
from torch import nn

import specopt

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


class Net(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.downsample = nn.Conv2d(4, 8, 1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(8 * 16, 5)


def optimizer_of(method: Method, **how: bool) -> tuple[Net, torch.optim.Optimizer]:
    net = Net()
    return net, optimizer_for(method, net, IMAGES, lr=0.1, momentum=0.9, **how)


def targets(net: Net, optimizer: torch.optim.Optimizer) -> dict[str, float | None]:
    names = {param: name for name, param in net.named_parameters()}
    return {
        names[param]: entry
        for group in optimizer.param_groups
        if isinstance(group["target"], list)
        for param, entry in zip(group["params"], group["target"], strict=True)
    }


@pytest.mark.parametrize(("base", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_method_without_control_is_the_plain_optimizer_of_all_parameters(base: str, kind: type) -> None:
    net, optimizer = optimizer_of(Method("plain", base=base, weight_decay=1e-4))
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert group["params"] == list(net.parameters())
    assert group["weight_decay"] == 1e-4


def test_targets_are_roots_of_size_ratios_times_the_gain_and_shortcuts_are_spared() -> None:
    net, optimizer = optimizer_of(Method("set", base="adamw", norm_scale={"mode": "set"}, gain=2.0))
    found = {name: target for name, target in targets(net, optimizer).items() if target is not None}
    expected = {"conv.weight": 2 * math.sqrt(4 * 16 / (3 * 64)), "head.weight": 2 * math.sqrt(5 / 128)}
    assert found == pytest.approx(expected)


def test_one_target_is_the_first_layers_everywhere() -> None:
    net, optimizer = optimizer_of(Method("set", base="adamw", norm_scale={"mode": "set"}), one_target=True)
    found = [target for target in targets(net, optimizer).values() if target is not None]
    assert found == pytest.approx([math.sqrt(4 * 16 / (3 * 64))] * 2)


def frobenius_norms_after_a_step(model: nn.Module, images: torch.Tensor, **how: bool) -> list[float]:
    method = Method("frobenius", base="adamw", norm_scale={"norm": "frobenius", "mode": "set"})
    optimizer = optimizer_for(method, model, images, lr=1e-3, momentum=0.0, **how)
    model(images).square().mean().backward()
    optimizer.step()
    return [weight.norm().item() for weight in model.parameters() if weight.ndim > 1]


@pytest.mark.filterwarnings("ignore:the first step moves")
def test_frobenius_norms_are_the_stated_ones_of_layer_sizes() -> None:
    images = torch.randn(2, 64, 32, 32)
    convolutions = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 16, 3, stride=2, padding=1))
    assert frobenius_norms_after_a_step(convolutions, images) == pytest.approx([256.0, math.sqrt(4096 * 4096 / 65536)])
    linear = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 5))
    assert frobenius_norms_after_a_step(linear, torch.randn(2, 12)) == pytest.approx([math.sqrt(20), math.sqrt(5 / 4)])


def test_frobenius_targets_of_linear_layers_are_those_of_their_shapes_to_the_bit() -> None:
    net, images = nn.Sequential(nn.Linear(3072, 200), nn.Linear(200, 200), nn.Linear(200, 100)), torch.randn(2, 3072)
    spectral, frobenius = (
        optimizer_for(Method("x", norm_scale={"norm": norm}, gain=0.7), net, images, lr=0.1, momentum=0.0)
        for norm in ("spectral", "frobenius")
    )
    assert [group["target"] for group in spectral.param_groups] == [group["target"] for group in frobenius.param_groups]


@pytest.mark.filterwarnings("ignore:the first step moves")
def test_one_target_of_frobenius_norms_is_the_first_layers_norm() -> None:
    images = torch.randn(2, 3, 8, 8)
    norms = frobenius_norms_after_a_step(Net(), images, one_target=True)
    first = math.sqrt(min(3 * 64, 4 * 16) * 4 * 16 / (3 * 64))
    assert (norms[0], norms[2]) == pytest.approx((first, first))  # norms[1] is the shortcut's


def test_patterns_that_a_model_has_not_are_no_error() -> None:
    optimizer_for(Method("snr", snr_lambda=0.1), nn.Sequential(nn.Linear(4, 4)), torch.ones(2, 4), lr=0.1, momentum=0.0)


def test_penalty_and_cap_compose() -> None:
    net, optimizer = optimizer_of(Method("both", base="adamw", snr_lambda=0.1, norm_scale={"mode": "cap"}))
    F.cross_entropy(net(IMAGES), LABELS).backward()
    optimizer.step()
    assert {row.name for row in specopt.spectral_report(optimizer)} == {"conv.weight", "head.weight"}


def test_snr_step_is_that_of_the_optimizer_class() -> None:
    net, optimizer = optimizer_of(Method("snr", snr_lambda=0.5, spared=()))
    other = Net()
    same = specopt.SNRSGD(other, lr=0.1, momentum=0.9, snr_lambda=0.5)
    for model, one in ((net, optimizer), (other, same)):
        for _ in range(3):
            one.zero_grad()
            F.cross_entropy(model(IMAGES), LABELS).backward()
            one.step()
    torch.testing.assert_close(list(net.parameters()), list(other.parameters()), rtol=0, atol=0)


ADVERSARIAL = Method("adversarial", adversarial=0.3)


def test_adversarial_loss_is_half_clean_and_half_at_inputs_moved_along_their_gradients() -> None:
    net, epsilon = Net().double(), ADVERSARIAL.adversarial
    images = IMAGES.double()
    Objective(ADVERSARIAL, net, list(net.parameters())).fill_gradients(Batch(images, LABELS))
    found = [weight.grad for weight in net.parameters()]
    clean = F.cross_entropy(net(images), LABELS)
    moved = []
    for image, label in zip(images, LABELS, strict=True):
        x = image[None].clone().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(net(x), label[None]), x)
        moved.append(x.detach() + epsilon * g / g.norm())
    expected = 0.5 * clean + 0.5 * F.cross_entropy(net(torch.cat(moved)), LABELS)
    torch.testing.assert_close(found, list(torch.autograd.grad(expected, list(net.parameters()))))
    assert expected > clean
    assert images.grad is None and not images.requires_grad


class Saved:
    """What autograd keeps of a tensor for a backward that has not been."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def test_adversarial_training_holds_one_graph_at_a_time() -> None:
    net, kept, at_forwards = Net(), WeakSet[Saved](), list[int]()

    def pack(tensor: torch.Tensor) -> Saved:
        saved = Saved(tensor)
        kept.add(saved)
        return saved

    net.register_forward_pre_hook(lambda *_: at_forwards.append(len(kept)))
    net.register_forward_hook(lambda *_: at_forwards.append(len(kept)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        Objective(ADVERSARIAL, net, list(net.parameters())).fill_gradients(Batch(IMAGES, LABELS))
    before_first, after_first, before_second, after_second = at_forwards
    assert before_first == before_second == 0 < after_first
    assert after_second <= after_first


@pytest.mark.parametrize("method", [Method("vanilla"), ADVERSARIAL], ids=lambda method: method.name)
def test_every_forward_is_under_autocast_and_no_backward_is(method: Method) -> None:
    net, forwards, backwards = Net(), list[bool](), list[bool]()
    net.register_forward_hook(lambda *_: forwards.append(torch.is_autocast_enabled("cpu")))
    net.head.weight.register_hook(lambda _: backwards.append(torch.is_autocast_enabled("cpu")))
    Objective(method, net, list(net.parameters()), lambda: torch.autocast("cpu", torch.bfloat16)).fill_gradients(
        Batch(IMAGES, LABELS)
    )
    assert forwards == [True] * len(backwards) and not any(backwards)
    assert len(forwards) == (2 if method.adversarial else 1)


def test_orthogonal_start_does_not_ask_for_the_method_and_is_of_the_seed() -> None:
    first, second, third = Net(), Net(), Net()
    for net, seed in ((first, 1), (second, 1), (third, 2)):
        start_orthogonal(net, IMAGES, seed)
    assert torch.equal(first.conv.weight, second.conv.weight)
    assert not torch.equal(first.conv.weight, third.conv.weight)
    sigma = torch.linalg.svdvals(first.head.weight.detach().double())
    torch.testing.assert_close(sigma, torch.full_like(sigma, math.sqrt(5 / 128)), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"base": "rmsprop"}, "base must be one of 'sgd', 'adamw', 'adam', got 'rmsprop'"),
        ({"decayed": "biases"}, "decayed must be one of 'all', 'convolutions', got 'biases'"),
        ({"penalty": "spectreg"}, "penalty must be one of '', 'double-back', 'spect-reg', .* got 'spectreg'"),
        ({"penalty": "jac-reg", "adversarial": 1.0}, "penalty 'jac-reg' and adversarial 1 exclude each other"),
        ({"penalty": "jac-reg", "penalty_weight": math.inf}, "penalty_weight must be a finite number"),
        ({"snr_lambda": -1.0}, "snr_lambda must be a finite number of at least 0, got -1.0"),
        ({"adversarial": math.nan}, "adversarial must be"),
    ],
)
def test_method_refuses_what_makes_no_sense(options: dict[str, float | str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Method("x", **options)  # type: ignore[arg-type]
