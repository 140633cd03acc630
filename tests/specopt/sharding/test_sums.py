"""What a step of sharded weights sends, to the byte; and what it refuses to do."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import specopt
from benchmarks.collectives import Collectives
from specopt.tracker.common import BLOCK, STATS, STEP, Stat
from tests.specopt.helpers import with_spectrum
from tests.specopt.sharding.cases import KINDS
from tests.specopt.sharding.ranks import run


def sent() -> dict[str, Any]:
    """The collectives of steps of two tracked matrices and one that is solved, each by name, bytes and dtype."""
    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found: dict[str, Any] = {}
    kinds = ("set", "snr", "frobenius", "full", "every second", "penalty and cap")
    for kind, options in (*((kind, {}) for kind in kinds), ("conditional", {"max_passes": None})):
        params = [
            torch.nn.Parameter(
                distribute_tensor(with_spectrum(shape, torch.float32, 0.2, torch.Generator()), mesh, cut)
            )
            for shape, cut in (((40, 30), [Shard(0)]), ((30, 44), [Shard(1)]), ((50, 6), [Shard(0)]))
        ]
        make = KINDS["set" if kind == "conditional" else kind]
        optimizer = make([{"params": params, **({"max_passes": 1} | options)}])
        found[kind] = []
        for step in range(5):
            for param in params:
                param.grad = torch.full_like(param, 1e-4)
            if kind == "conditional":
                optimizer._take_up()
                for param in params if step else ():
                    optimizer.state[param][STEP] = 100
                    optimizer.state[param][STATS][Stat.RESIDUAL] = 0.05 if step == 4 else 0.0
            with Collectives() as made:
                optimizer.step()
            found[kind].append([tuple(call) for call in made.calls])
        if kind == "set":
            block = optimizer.state[params[0]][BLOCK].clone()
            with Collectives() as made:
                optimizer.state_dict()
            found["taken up"] = not torch.equal(optimizer.state[params[0]][BLOCK], block), made.count
    return found


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    ranks = run(2, sent, folder=tmp_path_factory.mktemp("sent"))
    assert ranks[0] == ranks[1]
    found: dict[str, Any] = ranks[0]
    return found


K, A, DOUBLE, SINGLE = 7, 1, 8, 4
"""With blocks of 8: columns of a basis, and of its probe. Gram matrices go in float64."""
GRAMS = ("allreduce_", DOUBLE * (K * K + K * K + 6 * 6), torch.float64)
PRODUCTS = ("allreduce_", SINGLE * (30 + 30) * (K + A), torch.float32)


def test_a_step_of_pairs_sends_gram_matrices_and_then_returned_products(sums: dict[str, Any]) -> None:
    assert sums["set"][1:] == [[GRAMS, PRODUCTS]] * 4


def test_what_is_on_its_way_after_a_step_is_taken_up_by_state_dict(sums: dict[str, Any]) -> None:
    assert sums["taken up"] == (True, 0)


def test_a_conditional_pair_adds_one_sum_of_each_kind(sums: dict[str, Any]) -> None:
    now_ = ("allreduce_", DOUBLE * 2 * K * K, torch.float64)
    assert sums["conditional"][3] == [GRAMS, PRODUCTS]
    assert sums["conditional"][4] == [GRAMS, PRODUCTS, now_, PRODUCTS]


def test_a_step_of_halves_makes_one_sum(sums: dict[str, Any]) -> None:
    wide = 2 * (K + A)
    by_side = [
        DOUBLE * (wide * wide + 30 * (K + A) + 6 * 6),  # of (40, 30) a Gram matrix, of (30, 44) the product on its rows
        DOUBLE * (30 * (K + A) + wide * wide + 6 * 6),
    ]
    assert sums["snr"][2:] == [[("allreduce_", by_side[i % 2], torch.float64)] for i in (0, 1, 0)]


def test_frobenius_scaling_sends_a_number_for_each_matrix(sums: dict[str, Any]) -> None:
    assert sums["frobenius"][1:] == [[("allreduce_", DOUBLE * 3, torch.float64)]] * 4


def test_a_cap_of_all_singular_values_sends_whole_weights(sums: dict[str, Any]) -> None:
    assert sums["full"][1:] == [[("allreduce_", SINGLE * (40 * 30 + 30 * 44 + 50 * 6), torch.float32)]] * 4


def test_nothing_is_sent_in_a_step_of_the_base_alone(sums: dict[str, Any]) -> None:
    assert sums["every second"][1:] == [[], [GRAMS, PRODUCTS], [], [GRAMS, PRODUCTS]]


def test_a_penalty_beside_a_cap_sends_gram_matrices_before_the_update_as_well(sums: dict[str, Any]) -> None:
    assert sums["penalty and cap"][1:] == [[GRAMS, GRAMS, PRODUCTS]] * 4


# --- what is refused ------------------------------------------------------------------------------------------------


def refusals() -> dict[str, str]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def weight(*shape: int, dtype: torch.dtype | None = None) -> Any:
        return torch.nn.Parameter(distribute_tensor(torch.randn(shape, dtype=dtype), mesh, [Shard(0)]))

    def flattened(original: bool, given: Callable[[torch.nn.Module], Any] = lambda model: model.parameters()) -> None:
        model = FullyShardedDataParallel(torch.nn.Linear(8, 6), use_orig_params=original, device_id=torch.device("cpu"))
        specopt.NormScaleAdamW(given(model))

    def turned_off(model: torch.nn.Module) -> Any:
        return specopt.param_groups(model, overrides={"*": {"spectral": False}})

    def cut_otherwise() -> None:
        rows = 5 if dist.get_rank() == 0 else 3
        part = DTensor.from_local(torch.ones(rows, 6), mesh, [Shard(0)], run_check=False, shape=(8, 6), stride=(6, 1))
        specopt.SNRSGD([part.requires_grad_()])

    tried: dict[str, Callable[[], Any]] = {
        "rounding": lambda: specopt.SNRSGD([weight(8, 6, dtype=torch.bfloat16)], stochastic_rounding=True),
        "other parts": cut_otherwise,
        "flat": lambda: flattened(False),
        "flat, original": lambda: flattened(True),
        "flat model": lambda: flattened(False, lambda model: model),
        "flat model, original": lambda: flattened(True, specopt.param_groups),
        "flat, off": lambda: flattened(True, turned_off),
    }
    found = {}
    for name, attempt in tried.items():
        try:
            attempt()
            found[name] = "was not refused"
        except ValueError as error:
            found[name] = str(error)
    return found


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found: dict[str, str] = run(2, refusals, folder=tmp_path_factory.mktemp("refused"))[1]
    return found


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("rounding", r"stochastic_rounding must be False for the sharded 0\.0 .*MixedPrecisionPolicy"),
        ("other parts", r"rank holds of the sharded 0\.0 of shape \(8, 6\) must have the shape \(4, 6\).*got \(3, 6\)"),
        ("flat", r"parameter 0\.0 is a flattened shard .*fully_shard"),
        ("flat, original", r"parameter 0\.0 is a flattened shard .*fully_shard"),
        ("flat model", r"parameter _fsdp_wrapped_module\._flat_param is a flattened shard .*fully_shard"),
        ("flat model, original", r"parameter _fsdp_wrapped_module\.weight is a flattened shard .*fully_shard"),
        ("flat, off", "was not refused"),
    ],
)
def test_what_shards_do_not_allow_is_refused_with_what_to_do(refused: dict[str, str], what: str, message: str) -> None:
    assert re.search(message, refused[what])
