"""A training step of a large language model on 8 to 4,096 GPUs, and what the sums of NormScaleAdamW add to it.

Everything is computed from shapes: bytes by :mod:`benchmarks.comm_bytes`, seconds by :mod:`benchmarks.comm_model`.

    compute   6 P t / (MFU · peak): P parameters in products with t tokens of a GPU. Attention's own products are left
              out, so steps are shorter than they will be, and shares larger.
    own       what FSDP itself sends: of each block an all-gather of its bfloat16 weights in forward and one in
              backward, and a reduce-scatter of its float32 gradients; of embeddings and head one of each. HSDP
              adds the all-reduce of a shard's gradients over the replicas. All of it once for each ``MICRO`` tokens.
    step      max(compute, own): FSDP's collectives are hidden behind the products as far as they can be.
    now       the all-reduce of the Gram matrices: nothing else goes on meanwhile.
    late      the all-reduce of the returned products. It goes through a communicator of its own and shares the links
              with FSDP's collectives.
    behind    what of ``late`` does not fit beside the products: ``max(compute, own + late) - step``.

Where sums go through the weights' own group (``specopt/sharding/communicators.py`` tells when), the gather that the
next forward begins with waits there for all of ``late``: nothing of it is hidden.

What the local products and corrections take is no communication, and is not in here: docs/performance.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from torch import nn

from benchmarks.comm_bytes import Payload, Rule, Weight, norm_scale, penalty, sent
from benchmarks.comm_model import H100, Cluster, Group, all_gather, all_reduce
from benchmarks.models import gpt2, llama, shapes

TOKENS = 8192
"""Of each GPU in a step, however many GPUs there are (weak scaling)."""
BATCH = 2**22
"""Tokens of a step, shared by all GPUs (strong scaling)."""
MICRO = 8192
"""Tokens that a GPU takes through forward and backward at a time, at most."""
GPUS = (8, 64, 512, 4096)
GOAL = 0.01
"""Share of a step that sums may take."""
STATE = 16
"""Bytes of a parameter that is trained: weight, gradient and two averages in float32."""


@dataclass(frozen=True)
class Network:
    """A decoder of equal blocks. Embeddings and head are not controlled."""

    title: str
    build: Callable[[], nn.Module]
    blocks: int
    tokens: int
    """Rows of the embedding, and of the head."""
    shards: int
    """GPUs that one replica lies on under HSDP: the fewest nodes whose memory its state leaves room in."""

    @cached_property
    def _shapes(self) -> tuple[list[tuple[int, int]], int]:
        return shapes(self.build)

    @property
    def parameters(self) -> int:
        return self._shapes[1]

    @property
    def controlled(self) -> list[tuple[int, int]]:
        return [shape for shape in self._shapes[0] if shape[0] != self.tokens]

    @property
    def of_block(self) -> int:
        """Parameters; biases and norms count with :attr:`rest`."""
        return sum(map(math.prod, self.controlled)) // self.blocks

    @property
    def rest(self) -> int:
        return self.parameters - self.blocks * self.of_block

    @property
    def multiplied(self) -> int:
        """Parameters in products: a table that is no head as well is only looked up in."""
        heads = [shape for shape in self._shapes[0] if shape[0] == self.tokens]
        return self.parameters - sum(map(math.prod, heads))

    def sent(self, rule: Rule) -> list[Payload]:
        """The all-reduces of a settled step, on whatever number of ranks."""
        return sent([Weight(shape) for shape in self.controlled], rule)

    @cached_property
    def payloads(self) -> list[Payload]:
        return self.sent(norm_scale)

    def bytes(self, *, late: bool) -> int:
        return sum(payload.bytes for payload in self.payloads if payload.late == late)


NETWORKS = {
    "gpt2-xl": Network("GPT-2 XL", lambda: gpt2(1600, 48), 48, 50257, 8),
    "llama3-8b": Network("Llama 3 8B", lambda: llama(4096, 14336, 32, 32, 8), 32, 128256, 8),
    "llama3-70b": Network("Llama 3 70B", lambda: llama(8192, 28672, 80, 64, 8), 80, 128256, 64),
}


@dataclass(frozen=True)
class Step:
    """Seconds of a training step, and of what control sends in it."""

    network: Network
    gpus: int
    shards: int
    tokens: int
    """Of a GPU."""
    cluster: Cluster = H100

    @property
    def group(self) -> Group:
        """Of a shard's sums and gathers."""
        return Group.packed(self.shards, self.cluster)

    @property
    def replicas(self) -> Group:
        """Of the GPUs that hold the same shard."""
        return Group(self.gpus // self.shards, 1)

    @property
    def compute(self) -> float:
        return 6 * self.network.multiplied * self.tokens / (self.cluster.utilization * self.cluster.peak)

    @property
    def own(self) -> float:
        blocks = self.network.blocks * self._sent_of(self.network.of_block, gathers=2)
        return max(1, self.tokens // MICRO) * (blocks + self._sent_of(self.network.rest, gathers=1))

    def _sent_of(self, parameters: int, gathers: int) -> float:
        """Of one group of ``fully_shard``."""
        gathered = gathers * all_gather(2 * parameters, self.group, self.cluster)
        scattered = all_gather(4 * parameters, self.group, self.cluster)
        return gathered + scattered + all_reduce(4 * parameters / self.shards, self.replicas, self.cluster)

    @property
    def step(self) -> float:
        return max(self.compute, self.own)

    @property
    def now(self) -> float:
        return all_reduce(self.network.bytes(late=False), self.group, self.cluster)

    @property
    def late(self) -> float:
        return all_reduce(self.network.bytes(late=True), self.group, self.cluster)

    @property
    def behind(self) -> float:
        """Of the late sum, what is not hidden."""
        return max(self.compute, self.own + self.late) - self.step

    @property
    def by_block(self) -> float:
        """Of all sums, were those of each block to go by themselves: as many bytes, and as many latencies as blocks."""
        blocks, sizes = self.network.blocks, (self.network.bytes(late=late) for late in (False, True))
        return sum(blocks * all_reduce(size / blocks, self.group, self.cluster) for size in sizes)

    @property
    def state(self) -> float:
        """Bytes of weights, gradients and averages on a GPU."""
        return STATE * self.network.parameters / self.shards

    @property
    def share(self) -> float:
        """What sums add to a step, of that step."""
        return _share(self.now + self.behind, self.step)

    @property
    def shared(self) -> float:
        """The same through the weights' own group."""
        return _share(self.now + self.late, self.step)

    @property
    def most(self) -> float:
        """The same again were all of FSDP's own hidden: no step is shorter than its products."""
        return _share(self.now + self.late, self.compute)


def _share(added: float, step: float) -> float:
    return added / (step + added)


def steps(network: Network, gpus: Sequence[int], *, strong: bool, cluster: Cluster = H100) -> Iterator[Step]:
    """By number of GPUs: all as one group, and then in replicas where there is room for more than one."""
    for count in gpus:
        tokens = BATCH // count if strong else TOKENS
        for shards in dict.fromkeys((count, min(count, network.shards))):
            yield Step(network, count, shards, tokens, cluster)


COLUMNS = {
    "name": "network",
    "gpus": "GPUs",
    "layout": "layout",
    "compute": "products (ms)",
    "own": "FSDP's own (ms)",
    "now": "sums now (ms)",
    "late": "late (ms)",
    "share": "sums / step (%)",
    "shared": "the same, in the weights' group (%)",
    "most": "sums / products (%)",
}


def row(step: Step) -> dict[str, Any]:
    name = "fully_shard" if step.shards == step.gpus else f"HSDP, shards on {step.shards}"
    found: dict[str, Any] = {"name": step.network.title, "gpus": step.gpus, "layout": name, "tokens": step.tokens}
    found |= {"state": step.state / 1e9, "fits": step.state < step.cluster.memory}
    found |= {key: 1e3 * getattr(step, key) for key in ("compute", "own", "now", "late")}
    return found | {key: 100 * getattr(step, key) for key in ("share", "shared", "most")}


BYTES = {
    "name": "network",
    "parameters": "parameters (G)",
    "matrices": "controlled matrices",
    "now": "NormScaleAdamW now (MB)",
    "late": "late (MB)",
    "right": "SNRSGD, W V (MB)",
    "left": "SNRSGD, Wᵀ U (MB)",
    "own": "gathers and gradients of FSDP (MB)",
}


def sizes(network: Network) -> dict[str, Any]:
    """What collectives take from every rank in a step, whatever the number of ranks."""
    found: dict[str, Any] = {"name": network.title, "parameters": network.parameters / 1e9}
    found |= {"matrices": len(network.controlled)}
    found |= {key: network.bytes(late=key == "late") / 1e6 for key in ("now", "late")}
    for key, right in (("right", True), ("left", False)):
        found[key] = sum(payload.bytes for payload in network.sent(partial(penalty, right=right))) / 1e6
    return found | {"own": (8 * network.blocks * network.of_block + 6 * network.rest) / 1e6}
