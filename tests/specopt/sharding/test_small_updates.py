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
from specopt.sharding.triplets import Basis, factors, gram, mixed
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
    assert found.sigma < 0.01 and found.bases < 1e-4


@pytest.mark.parametrize("length", [1e-2, 3e-4])
def test_what_the_gram_matrix_of_terms_cannot_tell_is_not_taken_from_it(length: float) -> None:
    """A column that is the difference of two others, nearly parallel to a third besides: of squares that cancel, what
    is left of float64 is enough for a length of 1e-2, and not for one of 3e-4."""
    generator = torch.Generator().manual_seed(0)
    x, y, z = torch.linalg.qr(torch.randn(80, 3, dtype=torch.float64, generator=generator))[0].mT[:, :, None]
    blocks = torch.cat([x, z, z + length * (x + 3e-3 * y)], 1)
    mixing = torch.tensor([[1.0, 0, 0], [0, -1, 1]], dtype=torch.float64).mT.contiguous()
    known = factors(gram(blocks), mixing)
    assert not bool(known.dropped.any() | known.cancelled.any())
    basis = mixed(Basis(blocks, mixing, torch.zeros(80, 2)), known.factor)
    off = float((basis.mT @ basis - torch.eye(2, dtype=basis.dtype)).abs().amax())
    assert known.settled == (length == 1e-2) and (off < 1e-5 or not known.settled)
