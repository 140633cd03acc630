"""What steps of cut kernels send, by themselves and beside matrices."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Sequence
from functools import partial, reduce
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard

from benchmarks import comm_bytes
from benchmarks.collectives import Collectives
from specopt.rules import operator
from specopt.sharding.cut import Index, Part
from specopt.sharding.exchange import Exchange
from specopt.sharding.gathering import Whole
from tests.specopt.helpers import with_spectrum
from tests.specopt.sharding.convolutions import (
    KERNELS,
    RULES,
    Pair,
    cut,
    group_of,
    kernels,
    made,
    mesh,
    optimizer_of,
    step,
)
from tests.specopt.sharding.ranks import digest, run
from tests.specopt.sharding.twins import wholes

FEW: dict[str, Any] = {"block": 8, "max_passes": 1}
MATRIX = (40, 30)


def sums_of(params: list[Any], optimizer: Any) -> list[tuple[Any, ...]]:
    with Collectives() as seen:
        step(params, optimizer)
    return [tuple(call) for call in seen.calls]


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


def left_over() -> tuple[int, int]:
    """How often a step has looked for a kernel on all ranks, and how many of what it has found it leaves behind."""
    seen: list[Any] = []
    original = operator.gather

    def noted(wholes: Sequence[Whole]) -> Exchange[None]:
        yield from original(wholes)
        seen.extend(weakref.ref(whole.values) for whole in wholes)

    params, optimizer = made("rescale")
    with mock.patch.object(operator, "gather", noted):
        step(params, optimizer)
    return len(seen), sum(values() is not None for values in seen)


def everything() -> dict[str, Any]:
    warnings.simplefilter("ignore")
    found = {"sent": sent(), "mixed": mixed(), "placed otherwise": placed_otherwise()}
    return {**found, "left over": left_over()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(2, everything, folder=tmp_path_factory.mktemp("sums"))


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


def test_of_what_was_gathered_nothing_outlives_the_step(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["left over"] == (2 * len(KERNELS), 0)  # before the update and behind it


def test_gradients_may_be_cut_up_otherwise_than_short_weights(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["placed otherwise"]["kernels"] == [] and rank["placed otherwise"]["row"] < 1e-6


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
