"""Models under ``fully_shard`` (FSDP2) train as they do whole: every step from the same state makes the same update."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import specopt
from specopt.tracker.common import STEP
from tests.specopt.sharding.ranks import run
from tests.specopt.sharding.twins import GAP, Gap, Twins

FEW: dict[str, Any] = {"block": 8}
KINDS: dict[str, Callable[[Any], Any]] = {
    "snr": lambda groups: specopt.SNRSGD(groups, lr=0.05, momentum=0.9, snr_lambda=0.02, **FEW),
    "set": lambda groups: specopt.NormScaleAdamW(groups, lr=2e-3, **FEW),
}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = 2
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(nn.functional.gelu(self.up(self.between(x))))
        return out


class Transformer(nn.Module):
    """Of a width that two ranks divide and three do not."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(19, 20), nn.Linear(20, 19)
        self.blocks = nn.ModuleList(Block(20) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out

    def loss(self, generator: torch.Generator) -> Tensor:
        tokens = torch.randint(19, (4, 9), generator=generator)
        return nn.functional.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), (tokens[:, 1:] * 3 % 19).flatten())


class ResNet(nn.Module):
    """Of 18 and 20 channels, and two classes: of their rows three ranks have none, one and one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 18, 3, padding=1), nn.BatchNorm2d(18)
        self.first, self.second = nn.Conv2d(18, 20, 3, padding=1), nn.Conv2d(20, 18, 3, padding=1)
        self.head = nn.Linear(18, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(images)))
        x = x + self.second(torch.relu(self.first(x)))
        out: Tensor = self.head(x.mean((2, 3)))
        return out

    def loss(self, generator: torch.Generator) -> Tensor:
        images, labels = torch.randn(6, 3, 6, 6, generator=generator), torch.randint(2, (6,), generator=generator)
        return nn.functional.cross_entropy(self(images + labels[:, None, None, None]), labels)


MODELS: dict[str, Callable[[], Any]] = {"transformer": Transformer, "resnet": ResNet}


POLICIES: dict[str, dict[str, Any]] = {
    "weights in bfloat16 where they are computed with": {
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    },
    "weights offloaded to the CPU": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
}
"""Of ``fully_shard``. (Where everything is on a CPU an offloaded weight goes from there to there.)"""


def trainings(steps: int) -> dict[tuple[str, str], list[list[Gap]]]:
    warnings.simplefilter("ignore")
    found = {(name, kind): training(name, kind, steps) for name in MODELS for kind in KINDS}
    for name, policy in POLICIES.items():
        found |= {(name, kind): training("transformer", kind, 3, **policy) for kind in KINDS}
    return found


def training(name: str, kind: str, steps: int, **policy: Any) -> list[list[Gap]]:
    """By step and parameter how the step of the sharded model differs from that of the whole one."""
    torch.manual_seed(0)
    model = MODELS[name]()
    whole = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if name == "transformer":
        for block in model.blocks:
            fully_shard(block, mesh=mesh, **policy)
    fully_shard(model, mesh=mesh, **policy)
    assert all(isinstance(param, DTensor) for param in model.parameters())
    optimizers = [KINDS[kind](specopt.param_groups(one)) for one in (model, whole)]
    sharded, plain = ([p for group in one.param_groups for p in group["params"]] for one in optimizers)
    twins = Twins(*optimizers, sharded, plain)
    generator = torch.Generator().manual_seed(1)  # the same data on every rank: gradients are those of one
    found = []
    for _ in range(steps):
        optimizers[0].zero_grad()
        model.loss(generator).backward()
        found.append(twins.step())
    assert any(optimizers[0].state[param].get(STEP) == steps for param in sharded)
    return found


@pytest.fixture(
    scope="module",
    params=[(2, 6), *(pytest.param((world, 100), marks=pytest.mark.full) for world in (2, 3, 4))],
    ids=lambda param: f"{param[0]} ranks, {param[1]} steps",
)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    world, steps = request.param
    return steps, run(world, trainings, steps, folder=tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS)
def test_each_step_of_a_fully_sharded_model_is_that_of_the_whole_one(trained: Any, model: str, kind: str) -> None:
    steps, ranks = trained
    for rank in ranks:
        assert_close(rank[model, kind], steps)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_steps_are_the_same_under_a_policy_of_fully_shard(trained: Any, policy: str, kind: str) -> None:
    for rank in trained[1]:
        assert_close(rank[policy, kind], 3)


def assert_close(gaps: list[list[Gap]], steps: int) -> None:
    assert len(gaps) == steps
    # a block starts from the difference of two products, of which rounding leaves few digits
    assert all(gap.error <= 1e-3 and gap.spectrum <= 1e-5 for gap in gaps[0])
    assert [(i, gap) for i, row in enumerate(gaps) for gap in row if i and not gap.is_close] == []
    # directions were compared, not spectra alone
    assert sum(gap.gap > GAP and gap.pairs[0] > 0 for row in gaps for gap in row) > steps
