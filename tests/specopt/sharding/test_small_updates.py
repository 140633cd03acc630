"""SNR on shards where updates are far smaller than the weight: what Gram matrices of sums cannot tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import specopt
from specopt.tracker.common import LEFT, RIGHT, STATS, Stat
from tests.specopt.sharding.ranks import run
from tests.specopt.sharding.twins import wholes

STEPS, COLUMNS = 16, 12
"""Steps, and how many columns of a block of 16 are a basis: the others are a probe."""
KINDS = {
    "warm-up": (torch.float32, [1e-9 * 2**i for i in range(STEPS)], 1.0),
    "tiny gradients": (torch.float32, [0.1] * STEPS, 1e-9),
    "no gradients": (torch.float32, [0.1] * STEPS, 0.0),
    "float64": (torch.float64, [0.1] * STEPS, 0.0),
}


class Seen(NamedTuple):
    sigma: float
    """The largest error of sigma_1 over sigma_1, from the second step on."""
    bases: float
    """The largest of ``|XᵀX - I|`` over both blocks and all steps."""


def errors(kind: str, dimension: int) -> Seen:
    dtype, rates, scale = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.randn(80, 60, generator=generator, dtype=dtype) / 10
    weight = torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(dimension)]))
    optimizer = specopt.SNRSGD([weight], lr=rates[0], snr_lambda=0.01, block=16)
    sigma, bases = 0.0, 0.0
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        grad = scale * torch.randn(80, 60, generator=generator, dtype=dtype)
        weight.grad = distribute_tensor(grad, mesh, [Shard(dimension)])
        (before,) = wholes([weight])
        optimizer.step()
        state = optimizer.state[weight]
        exact = torch.linalg.svdvals(before.double())[0]
        if step:
            sigma = max(sigma, float((state[STATS][Stat.SIGMA] - exact).abs() / exact))
        bases = max(bases, *(apart(block) for block in wholes([state[LEFT], state[RIGHT]])))
    return Seen(sigma, bases)


def apart(block: Tensor) -> float:
    """Of a basis from orthonormal columns; those that are zero are none."""
    basis = block[:, :COLUMNS].double()
    basis = basis[:, basis.norm(dim=0) > 0]
    if basis.shape[1] == 0:
        return 0.0
    return float((basis.mT @ basis - torch.eye(basis.shape[1], dtype=basis.dtype)).abs().amax())


def all_errors() -> dict[tuple[str, int], Seen]:
    return {(kind, dimension): errors(kind, dimension) for kind in KINDS for dimension in (0, 1)}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Seen]:
    found: dict[tuple[str, int], Seen] = run(2, all_errors, folder=Path(tmp_path_factory.mktemp("ranks")))[0]
    return found


@pytest.mark.parametrize("dimension", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_sigma_is_right_and_bases_are_orthonormal_however_small_the_updates(
    kind: str, dimension: int, seen: dict[tuple[str, int], Seen]
) -> None:
    found = seen[kind, dimension]
    assert found.sigma < 0.01 and found.bases < 1e-3  # bases: below 1e-4 on some CPUs, 5e-4 on others
