"""The look at one column before a pair of SNRSGD, over two ranks: as of a weight that is whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from benchmarks.collectives import Collectives
from specopt.tracker.common import Stat
from tests.specopt.looked import BLOCK, MOVED, SHAPE, TURNS, stats_of
from tests.specopt.sharding.ranks import run

Case = tuple[str, float, int]
CASES: list[Case] = list(product(TURNS, (0.1, 0.9), (0, 1)))
"""Side, second singular value and dimension that is cut."""


def all_stats() -> dict[Case, tuple[Tensor, list[int]]]:
    mesh = init_device_mesh("cpu", (2,))
    into = {d: partial(distribute_tensor, device_mesh=mesh, placements=[Shard(d)]) for d in (0, 1)}
    return {(side, second, d): _stats_and_bytes(side, second, into[d]) for side, second, d in CASES}


def _stats_and_bytes(side: str, second: float, into: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[int]]:
    with Collectives() as made:
        stats, _ = stats_of(side, second, into)
    return stats, [size for _, size, _ in made.calls]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Case, tuple[Tensor, list[int]]]]:
    return run(2, all_stats, folder=Path(tmp_path_factory.mktemp("ranks")))


@pytest.mark.parametrize(("side", "second", "dimension"), CASES)
def test_shards_look_as_a_whole_weight_does(
    found: list[dict[Case, tuple[Tensor, list[int]]]], side: str, second: float, dimension: int
) -> None:
    (ours, sent), (theirs, _) = (ranks[side, second, dimension] for ranks in found)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    whole, _ = stats_of(side, second)
    assert float(ours[Stat.PAIRS]) == float(whole[Stat.PAIRS]) == (0.5 if second < 0.5 else 1.5)
    torch.testing.assert_close(ours[Stat.SIGMA], whole[Stat.SIGMA], rtol=1e-4, atol=0)
    if second < 0.5:  # how much of it a block of some of the equal directions takes up, rounding decides
        assert 0.5 < float(ours[Stat.RESIDUAL]) / (second * MOVED) < 1.05
        images, basis = SHAPE if side == "right" else SHAPE[::-1]
        in_pieces = (dimension == 0) == (side == "right")  # of the half product; of the look, which is next, the other
        half, look = ((2 * BLOCK) ** 2 * 8, basis * 4) if in_pieces else (images * BLOCK * 4, 2**2 * 8)
        again = (BLOCK - BLOCK // 8) ** 2 * 8  # of the next basis, where sums do not tell it well enough
        assert [size for size in sent if size != again][-2:] == [half, look]
