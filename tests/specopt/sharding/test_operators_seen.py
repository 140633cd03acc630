"""What reports, monitors and certificates make of cut kernels, and what is refused."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

import specopt
from specopt.tracker.common import STATS, Stat
from tests.specopt.sharding.convolutions import cut, group_of, made, mesh, optimizer_of, step
from tests.specopt.sharding.ranks import run
from tests.specopt.sharding.test_cut_off import error_of


def refused() -> dict[str, str]:
    def of(kernel: Any, *geometries: str) -> Any:
        return specopt.SNRSGD([group_of([nn.Parameter(kernel)], geometries or ["conv2d(7x7)"])], lr=0.1)

    def placed(local: Tensor, place: Placement) -> DTensor:
        return DTensor.from_local(local, mesh(), [place], run_check=False, shape=(8, 3, 3, 3), stride=(27, 9, 3, 1))

    _, optimizer = made("cap")
    tried = {
        "partial": lambda: of(placed(torch.ones(8, 3, 3, 3), Partial())),
        "other parts": lambda: of(placed(torch.ones(5 if dist.get_rank() == 0 else 3, 3, 3, 3), Shard(0))),
        "another geometry": lambda: of(cut(torch.ones(8, 3, 3, 3), mesh(), [Shard(0)]), "conv1d(7)"),
        "too many geometries": lambda: of(cut(torch.ones(8, 3, 3, 3), mesh(), [Shard(0)]), *["conv2d(7x7)"] * 2),
        "report": lambda: specopt.spectral_report(optimizer),
        "monitor": lambda: specopt.SpectralMonitor(optimizer, weights=True),
    }
    return {name: error_of(attempt) for name, attempt in tried.items()}


def monitored() -> bool:
    """Whether a monitor notes the norms that a step has found."""
    params, optimizer = made("cap")
    monitor = specopt.SpectralMonitor(optimizer, every=1)
    step(params, optimizer)
    told = [float(optimizer.state[param][STATS][Stat.SIGMA]) for param in params]
    return bool(monitor.history["sigma"][-1].tolist() == told)


def certified(*placements: Placement) -> tuple[Any, str]:
    """The bound of a convolution, of which a place is given or which is whole, and what its norm is told of."""
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False))
    start = torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    net[0].weight = param = nn.Parameter(cut(start, mesh(), placements) if placements else start)
    optimizer = optimizer_of("cap", [group_of([param], ["conv2d(6x6, padding=1x1)"])])
    step([param], optimizer)
    (row,) = specopt.certify(net, optimizer=optimizer).rows
    return row.bound, row.tracked_of


def everything() -> dict[str, Any]:
    warnings.simplefilter("ignore")
    certificates = [certified(), certified(Replicate()), certified(Shard(0))]
    return {"refused": refused(), "monitored": monitored(), "certified": certificates}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(2, everything, folder=tmp_path_factory.mktemp("seen"))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("partial", r"parameter 0\.0 must be cut up \(Shard\) or repeated \(Replicate\)"),
        ("other parts", r"rank holds of the sharded 0\.0 of shape \(8, 3, 3, 3\) must have the shape \(4, 3, 3, 3\)"),
        ("another geometry", r"0\.0: geometry conv1d\(7\) needs a kernel of 3 dimensions"),
        ("too many geometries", r"geometry must have an entry for each of 1 params, got 2"),
        ("report", r"spectral_report reads whole weights, got one of shape \(6, 3, 3, 3\)"),
        ("monitor", r"a SpectralMonitor with weights=True reads whole weights"),
    ],
)
def test_what_cut_kernels_do_not_allow_is_refused(found: list[dict[str, Any]], what: str, message: str) -> None:
    assert re.search(message, found[1]["refused"][what])


def test_a_monitor_notes_the_norms_of_cut_kernels(found: list[dict[str, Any]]) -> None:
    assert all(rank["monitored"] for rank in found)


def test_a_certificate_of_kernels_on_ranks_is_that_of_whole_ones(found: list[dict[str, Any]]) -> None:
    for rank in found:
        whole, replicas, shards = rank["certified"]
        assert whole[1] == "operator on 6x6" and replicas == whole
        assert shards[0] == pytest.approx(whole[0], rel=1e-6) and shards[1] == "matrix"
