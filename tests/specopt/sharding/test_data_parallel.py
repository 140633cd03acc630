"""DistributedDataParallel: replicas need nothing of ours but that the same numbers give the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as functional
from torch.nn.parallel import DistributedDataParallel

import specopt
from benchmarks.collectives import Collectives
from specopt.kernels import host, subspace
from tests.specopt.sharding.ranks import digest, run, state_tensors

FEW: dict[str, Any] = {"block": 8, "max_passes": 4}
"""Columns so few that most weights below are tracked, and not solved; and no more passes than the test needs."""
MAKERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "snr": lambda model: specopt.SNRSGD(model, lr=0.05, momentum=0.9, snr_lambda=0.05, **FEW),
    "set": lambda model: specopt.NormScaleAdamW(model, lr=2e-3, **FEW),
    "cap of rank 2": lambda model: specopt.NormScaleAdamW(model, lr=2e-3, mode="cap", rank=2, target=0.9, **FEW),
    "wrapped": lambda model: specopt.wrap(
        torch.optim.RMSprop(specopt.param_groups(model), lr=1e-3),
        specopt.Compose(specopt.SpectralPenalty(0.05, **FEW), specopt.SpectralDecay(0.1, **FEW)),
    ),
}


class Net(nn.Module):
    """A convolution, matrices that are tracked and one that is solved, and what is not controlled."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 20, 3, padding=1), nn.GroupNorm(4, 20)
        self.hidden, self.head = nn.Linear(80, 40), nn.Linear(40, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = nn.functional.max_pool2d(torch.relu(self.norm(self.conv(images))), 4).flatten(1)
        out: Tensor = self.head(torch.relu(self.hidden(features)))
        return out


class Trained(NamedTuple):
    """What one rank has seen of a training."""

    digests: list[str]
    """Of weights and state after each step."""
    collectives: int
    """Made by the optimizer's steps."""
    moved: float
    """How far the parameter that has come least far is from where it was."""


def train(kinds: Sequence[str], steps: int, group: dist.ProcessGroup) -> dict[str, Trained]:
    """One network for each kind of optimizer, all in one replica: one exchange of gradients serves them all."""
    torch.manual_seed(0)
    nets = nn.ModuleList([Net() for _ in kinds])
    start = [[param.detach().clone() for param in net.parameters()] for net in nets]
    replica = DistributedDataParallel(Together(nets), process_group=group)
    optimizers = [MAKERS[kind](net) for kind, net in zip(kinds, nets, strict=True)]
    generator = torch.Generator().manual_seed(1 + dist.get_rank())  # every rank has data of its own
    digests: list[list[str]] = [[] for _ in kinds]
    collectives = 0
    for _ in range(steps):
        images, labels = torch.randn(8, 3, 8, 8, generator=generator), torch.randint(5, (8,), generator=generator)
        replica.zero_grad()
        replica(images, labels).backward()
        with Collectives() as made:
            for optimizer in optimizers:
                optimizer.step()
        collectives += made.count
        for seen, optimizer in zip(digests, optimizers, strict=True):
            seen.append(digest(state_tensors(optimizer)))
    found = {}
    for kind, net, seen, old in zip(kinds, nets, digests, start, strict=True):
        moved = [float((param.detach() - at).norm()) for param, at in zip(net.parameters(), old, strict=True)]
        found[kind] = Trained(seen, collectives, min(moved))
    return found


class Together(nn.Module):
    """The sum of the losses of several networks."""

    def __init__(self, nets: nn.ModuleList) -> None:
        super().__init__()
        self.nets = nets

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([nn.functional.cross_entropy(net(images), labels) for net in self.nets]).sum()


@contextmanager
def start_by_rank() -> Iterator[None]:
    """Breaks the fixed random columns: every rank draws its own."""
    made = subspace.start_block

    def other(rows: int, columns: int, dtype: torch.dtype, device: torch.device, variant: int = 0) -> Tensor:
        return made(rows, columns, dtype, device, variant + dist.get_rank())

    with mock.patch("specopt.tracker.common.start_block", other):
        yield


@contextmanager
def sums_by_rank() -> Iterator[None]:
    """Breaks the order of sums: every rank adds up the rows of a block in an order of its own, as float atomics do."""
    made = host._grams

    def other(blocks: Any, chosen: Any) -> Any:
        picked = range(len(blocks)) if isinstance(blocks, list | tuple) else list(blocks)
        return made({i: blocks[i].roll(dist.get_rank(), 0) for i in picked}, chosen)

    with mock.patch.object(host, "_grams", other):
        yield


BROKEN: dict[str, Callable[[], Any]] = {"start": start_by_rank, "sums": sums_by_rank}
ON_ALL = ("snr", "set")
ON_PAIRS = (("wrapped",), ("cap of rank 2",))
"""On ranks 0 and 1, and at the same time on 2 and 3."""
RUNS = [((0, 1, 2, 3), kind) for kind in ON_ALL]
RUNS += [((2 * pair, 2 * pair + 1), kind) for pair, kinds in enumerate(ON_PAIRS) for kind in kinds]


def all_trainings(steps: int) -> dict[Any, Trained]:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = dist.get_rank() // 2
    assert dist.group.WORLD is not None
    found: dict[Any, Trained] = {}
    for kinds, group in ((ON_ALL, dist.group.WORLD), (ON_PAIRS[pair], pairs[pair])):
        ranks = tuple(dist.get_process_group_ranks(group))
        found |= {(ranks, kind): trained for kind, trained in train(kinds, steps, group).items()}
    for name, broken in BROKEN.items():
        with broken():
            found[name] = train(["set"], 10, pairs[pair])["set"]
    return found


@pytest.fixture(scope="module", params=[100, pytest.param(1000, marks=pytest.mark.full)])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Trained]]:
    return run(4, all_trainings, request.param, folder=tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("ranks", "kind"), RUNS)
def test_replicas_stay_the_same_bits_step_by_step(
    trained: list[dict[Any, Trained]], ranks: tuple[int, ...], kind: str
) -> None:
    first, *others = (trained[rank][ranks, kind] for rank in ranks)
    assert first.moved > 1e-3 and len(set(first.digests)) == len(first.digests) >= 100
    assert len(others) == len(ranks) - 1 and all(other.digests == first.digests for other in others)


def test_a_step_makes_no_collective_of_its_own(trained: list[dict[Any, Trained]]) -> None:
    assert {trained[rank][ranks, kind].collectives for ranks, kind in RUNS for rank in ranks} == {0}


@pytest.mark.parametrize("fault", BROKEN)
def test_random_columns_or_sums_that_differ_by_rank_would_be_seen(
    trained: list[dict[Any, Trained]], fault: str
) -> None:
    assert trained[0][fault].digests != trained[1][fault].digests


def test_collectives_are_counted_with_their_bytes(tmp_path: Path) -> None:
    assert run(2, counted, folder=tmp_path) == [EXPECTED, EXPECTED]


EXPECTED = [
    ("allreduce_", 40, torch.float32),
    ("allreduce_", 24, torch.float64),
    ("_allgather_base_", 12, torch.float32),
    ("all_reduce", 8, torch.float16),
    ("broadcast_", 5, torch.uint8),
]


def counted() -> list[tuple[Any, ...]]:
    with Collectives() as made:
        dist.all_reduce(torch.ones(10))
        work = dist.all_reduce(torch.ones(3, dtype=torch.float64), async_op=True)
        assert work is not None
        work.wait()
        dist.all_gather_into_tensor(torch.empty(6), torch.ones(3))
        functional.wait_tensor(functional.all_reduce(torch.ones(4, dtype=torch.float16), "sum", dist.group.WORLD))
        dist.broadcast(torch.ones(5, dtype=torch.uint8), 0)
    assert (made.count, made.bytes) == (len(made.calls), sum(call.bytes for call in made.calls))
    return [tuple(call) for call in made.calls]
