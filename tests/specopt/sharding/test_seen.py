"""What reports, monitors and certificates make of what is cut up over ranks, and what is refused of cut kernels."""

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
from benchmarks.collectives import Collectives
from specopt.sharding import gathering
from specopt.tracker.common import STATS, Stat
from tests.specopt.sharding.convolutions import cut, group_of, kernels, made, mesh, optimizer_of, step
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


MATRICES: dict[str, list[tuple[int, ...]]] = {
    "flatten": [(70, 90), (3, 80), (80, 3), (1, 9), (66, 8, 3, 3)],
    "rows:3": [(210, 66)],
    "columns:2": [(67, 140)],
    "stack": [(3, 70, 66)],
    "transposed": [(8, 66, 3, 3)],
}
"""Shapes by view: tracked ones, short ones of which the second rank has nothing, and several of one parameter."""


def reported(*placements: Placement, together: int = gathering.TOGETHER) -> tuple[list[dict[str, Any]], int]:
    """What a report of matrices and kernels tells, cut up or whole, and how many collectives it has made."""
    generator = torch.Generator().manual_seed(0)

    def parameter(start: Tensor) -> Any:
        return nn.Parameter(cut(start, mesh(), placements) if placements else start)

    groups: list[dict[str, Any]] = [
        {"params": [parameter(torch.randn(shape, generator=generator)) for shape in shapes], "view": view}
        for view, shapes in MATRICES.items()
    ]
    groups.append({"params": [parameter(torch.full((20, 20), torch.nan))]})
    groups.append({"params": [parameter(torch.randn(40, 30, generator=generator, dtype=torch.float64))]})
    groups.append({"params": [parameter(torch.randn(40, 30, generator=generator).bfloat16())]})
    optimizer = optimizer_of("rescale", [*groups, group_of([parameter(kernel) for kernel in kernels()])])
    with pytest.MonkeyPatch.context() as patch, Collectives() as made:
        patch.setattr(gathering, "TOGETHER", together)
        found = specopt.spectral_report(optimizer).to_dicts()
    return found, made.count


def reports() -> dict[str, Any]:
    return {
        "whole": reported(),
        "replicas": reported(Replicate()),
        "rows": reported(Shard(0)),
        "columns": reported(Shard(1)),
        "some at a time": reported(Shard(0), together=20_000),
    }


def everything() -> dict[str, Any]:
    warnings.simplefilter("ignore")
    certificates = [certified(), certified(Replicate()), certified(Shard(0))]
    return {"refused": refused(), "monitored": monitored(), "certified": certificates, "reports": reports()}


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


@pytest.mark.parametrize("cut_by", ["replicas", "rows", "columns", "some at a time"])
def test_a_report_of_what_ranks_hold_is_that_of_the_whole_on_every_rank(
    found: list[dict[str, Any]], cut_by: str
) -> None:
    told = [rank["reports"][cut_by][0] for rank in found]
    assert repr(told[0]) == repr(told[1])
    expected = found[0]["reports"]["whole"][0]
    assert len(expected) == 5 + 3 + 2 + 3 + 1 + 3 + 5
    for ours, other in zip(told[0], expected, strict=True):
        assert list(ours) == list(other)
        for field, value in ours.items():
            exact = isinstance(value, (str, bool))
            assert value == (other[field] if exact else pytest.approx(other[field], rel=1e-5, abs=1e-6, nan_ok=True))


def test_a_report_of_shards_brings_them_at_once_or_some_at_a_time(found: list[dict[str, Any]]) -> None:
    assert {how: sums for how, (_, sums) in found[0]["reports"].items()} == {
        "whole": 0,
        "replicas": 0,
        "rows": 2,
        "columns": 2,
        "some at a time": 6,
    }
