"""Augmented assignments in a ``forward``: what they change is never read under an older bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import specopt

Forward = Callable[[Any, Tensor], Tensor]


class Layered(nn.Module):
    """A function of the identity as a layer."""

    def __init__(self, function: Forward) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4, bias=False)
        nn.init.eye_(self.fc.weight)
        self.constant = nn.Parameter(torch.ones(1))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def times_ten_beside_a_skip(module: Any, x: Tensor) -> Tensor:
    h = skip = module.fc(x)
    h *= 10
    return h + skip


def plus_five_beside_a_view(module: Any, x: Tensor) -> Tensor:
    h = module.fc(x)
    skip = h.flatten(1)
    h += 5 * module.fc(x)
    return skip


def minus_beside_a_view(module: Any, x: Tensor) -> Tensor:
    h = module.fc(x)
    skip = h[:, :2]
    h -= 9 * module.fc(x)
    return skip


def divided_beside_a_skip(module: Any, x: Tensor) -> Tensor:
    h = skip = module.fc(x)
    h /= 0.1
    return skip


def squared_beside_a_skip(module: Any, x: Tensor) -> Tensor:
    h = skip = module.fc(x)
    h **= 2
    return skip


def rounded_beside_a_skip(module: Any, x: Tensor) -> Tensor:
    h = skip = module.fc(x)
    h //= 0.5
    return skip


def remainder_beside_a_skip(module: Any, x: Tensor) -> Tensor:
    h = skip = module.fc(x)
    h %= 0.5
    return skip


def through_an_attribute(module: Any, x: Tensor) -> Tensor:
    h = module.fc(x)
    turned = h.T
    turned *= 10
    return h


def attribute_read_before(module: Any, x: Tensor) -> Tensor:
    h = module.fc(x)
    turned = h.T
    h *= 10
    return turned


def into_zeros(module: Any, x: Tensor) -> Tensor:
    y = x.new_zeros(1, 4)
    z = y.view(-1)
    y += 10 * x
    return z


def input_itself(module: Any, x: Tensor) -> Tensor:
    kept = x
    x *= 10
    return kept


UNSAFE: list[Forward] = [
    *(times_ten_beside_a_skip, plus_five_beside_a_view, minus_beside_a_view, divided_beside_a_skip),
    *(squared_beside_a_skip, rounded_beside_a_skip, remainder_beside_a_skip),
    *(through_an_attribute, attribute_read_before, into_zeros, input_itself),
]


@pytest.mark.parametrize("function", UNSAFE)
@pytest.mark.parametrize("sized", [True, False])
def test_a_value_read_again_after_its_augmented_assignment_is_unknown(function: Forward, sized: bool) -> None:
    certificate = specopt.certify(Layered(function), torch.ones(1, 4) if sized else None)
    assert certificate.lipschitz is None and certificate.unknown


def by_a_size(module: Any, x: Tensor) -> Tensor:
    factor = alias = module.constant.clone()
    factor *= x.size(1)
    return x * alias


def test_a_constant_changed_by_a_size_needs_the_size() -> None:
    certificate = specopt.certify(Layered(by_a_size))
    assert certificate.lipschitz is None and "give inputs=" in certificate.unknown[0]
    assert specopt.certify(Layered(by_a_size), torch.ones(1, 4)).lipschitz == pytest.approx(4, rel=1e-6)


def changed_weight(module: Any, x: Tensor) -> Tensor:
    weight = module.constant
    weight *= 2
    return x * module.constant


def test_a_weight_changed_in_place_is_unknown_and_stays_as_it_is() -> None:
    model = Layered(changed_weight)
    certificate = specopt.certify(model)
    assert certificate.lipschitz is None and "changes a weight or buffer" in certificate.unknown[0]
    assert model.constant.tolist() == [1.0]


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_buffer_counts_as_it_is_when_it_is_read(in_place: bool, sized: bool) -> None:
    class Fading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.full((), 10.0))

        def forward(self, x: Tensor) -> Tensor:
            y = x * self.scale
            if in_place:
                self.scale *= 0.1
            else:
                self.scale = self.scale * 0.1
            return y

    bound = specopt.certify(Fading(), torch.ones(1, 4) if sized else None).lipschitz
    assert bound == pytest.approx(10, rel=1e-6)


@pytest.mark.parametrize("sized", [True, False])
def test_a_buffer_that_takes_the_input_is_unknown(sized: bool) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(5, 4))

        def forward(self, x: Tensor) -> Tensor:
            self.total += x
            return self.total * 1

    certificate = specopt.certify(Sum(), torch.ones(4) if sized else None)
    assert certificate.lipschitz is None and "weight or buffer" in certificate.unknown[0]


def scaled(module: Any, x: Tensor) -> Tensor:
    h = module.fc(x)
    h *= 10
    h /= 4
    h += 1
    h -= 0.5 * x
    return h


def shrunk_beside_a_view(module: Any, x: Tensor) -> Tensor:
    h = module.fc(x)
    skip = h.view(-1)
    h *= 0.5
    return skip


def multiplied_by_a_matrix(module: Any, x: Tensor) -> Tensor:
    h = skip = module.fc(x)
    h @= 3 * module.fc.weight  # makes a new tensor
    return h + skip


def counted(module: Any, x: Tensor) -> Tensor:
    count = x.size(0)
    count *= x.size(1)
    return x.view(count)


@pytest.mark.parametrize(
    ("function", "low", "high"),
    [(scaled, 2, 3), (shrunk_beside_a_view, 0.5, 1), (multiplied_by_a_matrix, 4, 4), (counted, 1, 1)],
)
def test_other_augmented_assignments_keep_their_constants(function: Forward, low: float, high: float) -> None:
    bound = specopt.certify(Layered(function), torch.ones(1, 4)).lipschitz
    assert bound is not None and low <= bound <= high * 1.002


class Residual(nn.Module):
    """As torchvision has it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.conv(x))
        out += identity
        return self.relu(out)  # type: ignore[no-any-return]


def test_a_residual_block_that_adds_in_place_has_one_and_its_layers_norm() -> None:
    torch.manual_seed(0)
    certificate = specopt.certify(Residual(), torch.ones(1, 2, 5, 5))
    (row,) = certificate.rows
    assert certificate.unknown == () and row.bound is not None
    assert certificate.lipschitz == pytest.approx(1 + row.bound, rel=1e-6)
