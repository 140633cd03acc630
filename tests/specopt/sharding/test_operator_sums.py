"""What steps of cut kernels send, beside matrices too, how they are cut off, and what is refused."""

from __future__ import annotations

import itertools
import re
import warnings
from functools import partial, reduce
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

import specopt
from benchmarks import comm_bytes
from benchmarks.collectives import Collectives
from specopt.sharding import exchange
from specopt.sharding.cut import Index, Part
from specopt.tracker.common import STATS, Stat
from tests.specopt.helpers import with_spectrum
from tests.specopt.sharding.convolutions import KERNELS, RULES, Pair, cut, group_of, kernels, optimizer_of
from tests.specopt.sharding.ranks import digest, run, state_tensors
from tests.specopt.sharding.test_cut_off import error_of
from tests.specopt.sharding.twins import wholes

FEW: dict[str, Any] = {"block": 8, "max_passes": 1}
MATRIX = (40, 30)


def mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def made(kind: str) -> tuple[list[Any], Any]:
    params: list[Any] = [nn.Parameter(cut(kernel, mesh(), [Shard(0)])) for kernel in kernels()]
    return params, optimizer_of(kind, [group_of(params)])


def step(params: list[Any], optimizer: Any) -> None:
    for param in params:
        param.grad = torch.full_like(param, 0.01)
    optimizer.step()


def sums_of(params: list[Any], optimizer: Any) -> list[tuple[Any, ...]]:
    with Collectives() as seen:
        step(params, optimizer)
    return [tuple(call) for call in seen.calls]


# --- payloads -------------------------------------------------------------------------------------------------------


def sent() -> dict[str, Any]:
    step(*made("cap"))  # the ranks meet
    found = {}
    for kind in RULES:
        params, optimizer = made(kind)
        found[kind] = [sums_of(params, optimizer) for _ in range(3)]
    return found


def mixed() -> dict[str, Any]:
    """Kernels and a tracked matrix in one group: sums of steps, whether the kernels have the bits of whole ones,
    and the error of the matrix, over what it has moved."""
    starts = [*kernels(), with_spectrum(MATRIX, torch.float32, 0.2, torch.Generator().manual_seed(0))]
    geometries = [*KERNELS, None]
    params: list[Any] = [nn.Parameter(cut(start, mesh(), [Shard(0)])) for start in starts]
    plain = [nn.Parameter(start.clone()) for start in starts]
    optimizers = [optimizer_of("cap", [group_of(one, geometries, **FEW)]) for one in (params, plain)]
    found: list[Any] = []
    for _ in range(4):
        found.append(sums_of(params, optimizers[0]))
        step(plain, optimizers[1])
    optimizers[0].state_dict()
    bits = [torch.equal(*pair) for pair in zip(wholes(params)[:-1], plain[:-1], strict=True)]
    error = (wholes(params)[-1] - plain[-1]).norm() / (plain[-1] - starts[-1]).norm()
    return {"sums": found, "bits": bits, "error": float(error)}


# --- gradients that are cut up otherwise ----------------------------------------------------------------------------


def placed_otherwise() -> dict[str, Any]:
    """What comes out otherwise, of kernels and of a matrix with one row, where gradients are replicas."""
    pair = Pair("penalty", mesh(), [Shard(0)])
    row = torch.linspace(1, 2, 24)[None]
    params: list[Any] = [nn.Parameter(cut(row, mesh(), [Shard(0)])), nn.Parameter(row.clone())]
    optimizers = [optimizer_of("penalty", [{"params": [param]}]) for param in params]
    for number in range(2):
        pair.step(number, placed=[Replicate()])
        params[0].grad, params[1].grad = cut(row, mesh(), [Replicate()]), row
        for optimizer in optimizers:
            optimizer.step()
    return {"kernels": pair.differences(), "row": float((wholes(params[:1])[0] - params[1]).detach().abs().max())}


# --- numbers that are none, steps that are skipped or cut off -------------------------------------------------------


def with_a_nan(kind: str) -> tuple[list[str], list[int], list[float]]:
    pair = Pair(kind, mesh(), [Shard(0)])
    with torch.no_grad():
        for params in (pair.sharded, pair.plain):
            first = params[0].to_local() if isinstance(params[0], DTensor) else params[0]
            if params is pair.plain or dist.get_rank() == 0:
                first[0, 0, 0, 0] = torch.nan
    for number in range(2):
        pair.step(number)
    nans = [int(weight.isnan().sum()) for weight in wholes(pair.sharded)]
    return pair.differences(), nans, [float(pair.ours.state[param][STATS][Stat.VALID]) for param in pair.sharded]


def skipped(kind: str) -> bool:
    params, optimizer = made(kind)
    step(params, optimizer)
    before = digest(state_tensors(optimizer))
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), torch.ones(())
    step(params, optimizer)
    return digest(state_tensors(optimizer)) == before


def base_fails(kind: str) -> dict[str, Any]:
    """At the start of the base's step."""
    params, optimizer = made(kind)
    other, undisturbed = made(kind)
    step(params, optimizer)
    step(other, undisturbed)
    before = digest(state_tensors(optimizer))
    with mock.patch.object(optimizer, "_base_step", side_effect=ValueError("betas are odd")):
        found: dict[str, Any] = {"first": error_of(step, params, optimizer)}
    found["saving"] = error_of(optimizer.state_dict)
    if not found["saving"]:
        found["as before"] = digest(state_tensors(optimizer)) == before
        step(params, optimizer)
        step(other, undisturbed)
        found["goes on"] = digest(state_tensors(optimizer)) == digest(state_tensors(undisturbed))
    return found


def gathering_fails() -> str:
    """Behind the base update."""
    params, optimizer = made("cap")
    step(params, optimizer)
    with mock.patch.object(exchange._Pack, "wait", side_effect=RuntimeError("Connection closed by peer")):
        error_of(step, params, optimizer)
    return error_of(optimizer.state_dict)


# --- what is refused ------------------------------------------------------------------------------------------------


def refused() -> dict[str, str]:
    def of(kernel: Any, *geometries: str) -> Any:
        return specopt.SNRSGD([group_of([nn.Parameter(kernel)], geometries or ["conv2d(7x7)"])], lr=0.1)

    def placed(local: Tensor, place: Placement) -> DTensor:
        return DTensor.from_local(local, mesh(), [place], run_check=False, shape=(8, 3, 3, 3), stride=(27, 9, 3, 1))

    params, optimizer = made("cap")
    tried = {
        "partial": lambda: of(placed(torch.ones(8, 3, 3, 3), Partial())),
        "other parts": lambda: of(placed(torch.ones(5 if dist.get_rank() == 0 else 3, 3, 3, 3), Shard(0))),
        "another geometry": lambda: of(cut(torch.ones(8, 3, 3, 3), mesh(), [Shard(0)]), "conv1d(7)"),
        "too many geometries": lambda: of(cut(torch.ones(8, 3, 3, 3), mesh(), [Shard(0)]), *["conv2d(7x7)"] * 2),
        "report": lambda: specopt.spectral_report(optimizer),
        "monitor": lambda: specopt.SpectralMonitor(optimizer, weights=True),
    }
    found = {name: error_of(attempt) for name, attempt in tried.items()}
    monitor = specopt.SpectralMonitor(optimizer, every=1)
    step(params, optimizer)
    told = [float(optimizer.state[param][STATS][Stat.SIGMA]) for param in params]
    found["monitored"] = str(monitor.history["sigma"][-1].tolist() == told)
    return found


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
    kinds = ("penalty", "cap", "decay")
    return {
        "sent": sent(),
        "mixed": mixed(),
        "placed otherwise": placed_otherwise(),
        "nan": {kind: with_a_nan(kind) for kind in kinds},
        "skipped": {kind: skipped(kind) for kind in kinds},
        "base fails": {kind: base_fails(kind) for kind in kinds},
        "gathering fails": gathering_fails(),
        "refused": refused(),
        "certified": [certified(), certified(Replicate()), certified(Shard(0))],
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(2, everything, folder=tmp_path_factory.mktemp("operators"))


NUMBERS = sum(torch.Size(shape).numel() for shape in KERNELS.values())
WHOLE = ("allreduce_", 4 * NUMBERS, torch.float32)
BEFORE_AND_AFTER = {"penalty": (1, 0), "penalty and cap": (1, 1)}


@pytest.mark.parametrize("kind", RULES)
def test_a_step_sends_every_kernel_once_before_the_update_or_behind_it(found: list[dict[str, Any]], kind: str) -> None:
    before, after = BEFORE_AND_AFTER.get(kind, (0, 1))
    for rank in found:
        assert rank["sent"][kind] == [[WHOLE] * (1 + after), *([[WHOLE] * (before + after)] * 2)]


def test_kernels_share_the_sum_of_matrices_that_is_due_at_the_same_time(found: list[dict[str, Any]]) -> None:
    k, a = 7, 1
    grams = ("allreduce_", 8 * (k * k + NUMBERS), torch.float64)
    products = ("allreduce_", 4 * 30 * (k + a), torch.float32)
    for rank in found:
        assert rank["mixed"]["sums"][1:] == [[grams, products]] * 3


def test_kernels_and_matrices_of_one_group_move_as_whole_ones_do(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert all(rank["mixed"]["bits"])
        assert rank["mixed"]["error"] < 1e-3


@pytest.mark.parametrize("kind", RULES)
def test_the_formula_of_the_benchmark_is_what_is_sent(found: list[dict[str, Any]], kind: str) -> None:
    weights = [comm_bytes.Weight(shape) for shape in KERNELS.values()]
    payloads = comm_bytes.sent(weights, partial(comm_bytes.operator, times=1 + (kind == "penalty and cap")))
    for rank in found:
        assert [tuple(payload[:2]) for payload in payloads] == [call[1:] for call in rank["sent"][kind][-1]]


def test_gradients_may_be_cut_up_otherwise_than_short_weights(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["placed otherwise"]["kernels"] == [] and rank["placed otherwise"]["row"] < 1e-6


@pytest.mark.parametrize("kind", ["penalty", "cap", "decay"])
def test_a_nan_on_one_rank_is_not_spread_and_is_seen_on_all(found: list[dict[str, Any]], kind: str) -> None:
    for rank in found:
        assert rank["nan"][kind] == ([], [1, 0, 0, 0, 0], [0.0, 1.0, 1.0, 1.0, 1.0])


@pytest.mark.parametrize("kind", ["penalty", "cap", "decay"])
def test_a_skipped_step_leaves_kernels_and_state_as_they_were(found: list[dict[str, Any]], kind: str) -> None:
    assert all(rank["skipped"][kind] for rank in found)


@pytest.mark.parametrize("kind", ["cap", "decay"])
def test_an_error_before_anything_is_sent_or_written_cuts_nothing_off(found: list[dict[str, Any]], kind: str) -> None:
    for rank in found:
        assert rank["base fails"][kind] == {"first": "betas are odd", "saving": "", "as before": True, "goes on": True}


def test_an_error_behind_the_sum_of_a_penalty_cuts_the_step_off(found: list[dict[str, Any]]) -> None:
    for rank in found:
        told = rank["base fails"]["penalty"]
        assert told["first"] == "betas are odd"
        assert "those of no step" in told["saving"] and "ValueError: betas are odd" in told["saving"]


def test_a_sum_that_fails_behind_the_update_cuts_the_step_off(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert "those of no step" in rank["gathering fails"] and "Connection closed" in rank["gathering fails"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("partial", r"parameter 0\.0 must be cut up \(Shard\) or repeated \(Replicate\)"),
        ("other parts", r"rank holds of the sharded 0\.0 of shape \(8, 3, 3, 3\) must have the shape \(4, 3, 3, 3\)"),
        ("another geometry", r"0\.0: geometry conv1d\(7\) needs a kernel of 3 dimensions"),
        ("too many geometries", r"geometry must have an entry for each of 1 params, got 2"),
        ("report", r"spectral_report reads whole weights, got one of shape \(6, 3, 3, 3\)"),
        ("monitor", r"a SpectralMonitor with weights=True reads whole weights"),
        ("monitored", "True"),
    ],
)
def test_what_cut_kernels_do_not_allow_is_refused(found: list[dict[str, Any]], what: str, message: str) -> None:
    assert re.search(message, found[1]["refused"][what])


def test_a_certificate_of_kernels_on_ranks_is_that_of_whole_ones(found: list[dict[str, Any]]) -> None:
    for rank in found:
        whole, replicas, shards = rank["certified"]
        assert whole[1] == "operator on 6x6" and replicas == whole
        assert shards[0] == pytest.approx(whole[0], rel=1e-6) and shards[1] == "matrix"


# --- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "along", [[slice(0, 2), slice(2, 5)], [torch.tensor([0, 3]), torch.tensor([1, 2, 4])]], ids=str
)
def test_parts_amid_zeros_sum_up_to_the_bits_of_the_whole(along: list[Index]) -> None:
    whole = torch.randn(5, 5, 3, generator=torch.Generator().manual_seed(0))
    whole[0], whole[1, 1, 1], whole[2, 2, 2] = -0.0, torch.inf, 0.0
    parts = [
        Part(Part(whole, [*places, slice(0, 3)], (5, 5, 3)).share_of(whole).clone(), [*places, slice(0, 3)], (5, 5, 3))
        for places in itertools.product(along, repeat=2)
    ]
    total = reduce(torch.add, [part.amid_zeros() for part in parts])
    assert digest([total]) == digest([whole])
