"""The norm of one convolution in one call."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from specopt.operators import Geometry, flattened_bound, operator_norm
from tests.specopt.operators.cases import norm, operator_of


def test_norm_lies_between_a_thousandth_below_the_exact_one_and_the_bound() -> None:
    for module in (nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1)):
        geometry = Geometry.of(module, (7, 8))
        found, bound = (operator_norm(module.weight, geometry, bound=kind) for kind in (None, "flattened"))
        assert float(found) == pytest.approx(norm(operator_of(module, (7, 8))), rel=1e-3)
        assert found < bound
        assert torch.equal(bound, flattened_bound(module.weight, geometry))
        assert not found.requires_grad
        assert torch.equal(found, operator_norm(module.weight, str(geometry)))


def test_what_is_no_geometry_is_refused() -> None:
    with pytest.raises(ValueError, match="geometry must be text like"):
        operator_norm(torch.ones(1, 1, 1, 1), (4, 4))  # type: ignore[arg-type]


def test_another_bound_is_refused() -> None:
    module = nn.Conv2d(1, 1, 1)
    with pytest.raises(ValueError, match="bound must be None or 'flattened', got 'frobenius'"):
        operator_norm(module.weight, Geometry.of(module, (2, 2)), bound="frobenius")
