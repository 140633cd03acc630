"""The look at one column before a pair of SNRSGD, over two ranks: as of a weight that is whole."""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from specopt.tracker.common import Stat
from tests.specopt.looked import MOVED, TURNS, stats_of
from tests.specopt.sharding.ranks import run

Case = tuple[str, float, int]
CASES: list[Case] = list(product(TURNS, (0.1, 0.9), (0, 1)))
"""Side, second singular value and dimension that is cut."""


def all_stats() -> dict[Case, Tensor]:
    mesh = init_device_mesh("cpu", (2,))
    into = {d: partial(distribute_tensor, device_mesh=mesh, placements=[Shard(d)]) for d in (0, 1)}
    return {(side, second, d): stats_of(side, second, into[d])[0] for side, second, d in CASES}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Case, Tensor]]:
    return run(2, all_stats, folder=Path(tmp_path_factory.mktemp("ranks")))


@pytest.mark.parametrize(("side", "second", "dimension"), CASES)
def test_shards_look_as_a_whole_weight_does(
    found: list[dict[Case, Tensor]], side: str, second: float, dimension: int
) -> None:
    ours, theirs = (ranks[side, second, dimension] for ranks in found)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    whole, _ = stats_of(side, second)
    assert float(ours[Stat.PAIRS]) == float(whole[Stat.PAIRS]) == (0.5 if second < 0.5 else 1.5)
    torch.testing.assert_close(ours[Stat.SIGMA], whole[Stat.SIGMA], rtol=1e-4, atol=0)
    if second < 0.5:  # how much of it a block of some of the equal directions takes up, rounding decides
        assert 0.5 < float(ours[Stat.RESIDUAL]) / (second * MOVED) < 1.05
