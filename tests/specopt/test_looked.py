"""SNRSGD on a CPU: where a half product shows a residual, one column of the next tells whether a pair is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from specopt import kernels
from specopt.tracker.common import Stat
from tests.specopt.looked import BLOCK, MOVED, TURNS, stats_of


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Columns of all products that were made."""
    found: list[int] = []
    product = kernels.skinny_products

    def counted(matrices: Sequence[Tensor], blocks: Sequence[Tensor], **more: Any) -> list[Tensor]:
        found.extend(block.shape[1] for block in blocks)
        return product(matrices, blocks, **more)

    monkeypatch.setattr(kernels, "skinny_products", counted)
    return found


@pytest.mark.parametrize("side", TURNS)
def test_a_triplet_that_holds_after_one_half_product_takes_no_pair(side: str, widths: list[int]) -> None:
    stats, weight = stats_of(side, 0.1)
    assert widths[-2:] == [BLOCK, 1]
    assert float(stats[Stat.PAIRS]) == 0.5
    assert 0.5 < float(stats[Stat.RESIDUAL]) / (0.1 * MOVED) < 1.05
    assert float(stats[Stat.SIGMA]) == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=1e-4)


@pytest.mark.parametrize("side", TURNS)
def test_a_triplet_that_does_not_hold_takes_one_pair(side: str, widths: list[int]) -> None:
    stats, weight = stats_of(side, 0.9)
    assert widths[-4:] == [BLOCK, 1, BLOCK, BLOCK]
    assert float(stats[Stat.PAIRS]) == 1.5
    assert float(stats[Stat.SIGMA]) == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=1e-4)
