"""How long collectives take on many GPUs: the α-β model of rings and trees, with the constants that NCCL chooses by.

An all-reduce of b bytes over R ranks, of which p are on each of N nodes (R = N p), at B bytes a second in and out of
every rank:

    ring    t₀ + 2 (R - 1) α + 2 (R - 1)/R · b / (s B)      of the 2 (R - 1) hops a share N/R crosses between nodes
    tree    t₀ + 2 ((p - 1) α_node + ⌈log₂ N⌉ α_net) + 2 b / (s B)

``B`` is NVLink's within a node. Between nodes it is what the network cards of the group's GPUs on one node carry
together, or NVLink's if that is less: a ring enters and leaves a node once, and rings through all cards run at the same
time. So a group with one GPU on each node has one card's bandwidth, and one with all 8 has all of them.

α is the latency of a hop, t₀ of a call, and s the share of the bandwidth that a protocol leaves. There are two: LL128,
quick to arrive, and Simple, with the whole bandwidth; NCCL takes whichever of the four is best, and so does
:func:`all_reduce`. Latencies and shares are those of ``src/graph/tuning.cc`` of https://github.com/NVIDIA/nccl at
b647562, for Hopper. Left out are LL (for the smallest messages), NVLS and SHARP (sums in the switches), with all of
which sums would be quicker; and what other traffic and stragglers take.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Cluster:
    """Nodes of H100 SXM GPUs: https://www.nvidia.com/en-us/data-center/h100"""

    gpus: int = 8
    """Of a node."""
    nvlink: float = 450e9
    """Bytes a second of a GPU, each way (NVLink 4)."""
    network: float = 50e9
    """Bytes a second of a GPU's network card, each way: 400 Gb/s."""
    peak: float = 989e12
    """Operations a second of a GPU in bfloat16, dense."""
    utilization: float = 0.4
    """The share of ``peak`` that training makes of it (MFU)."""
    memory: float = 80e9
    """Bytes of a GPU."""


H100 = Cluster()


@dataclass(frozen=True)
class Group:
    """The ranks of a process group: equally many on each of its nodes."""

    nodes: int
    each: int

    @classmethod
    def packed(cls, ranks: int, cluster: Cluster = H100) -> Group:
        """Neighbours, node by node.

        Raises:
            ValueError: for ranks that do not fill their nodes.
        """
        each = min(ranks, cluster.gpus)
        if ranks < 1 or ranks % each:
            raise ValueError(f"ranks must be 1 or more, and above {cluster.gpus} fill their nodes, got {ranks}")
        return cls(ranks // each, each)

    @property
    def ranks(self) -> int:
        return self.nodes * self.each

    def bandwidth(self, cluster: Cluster) -> float:
        """Bytes a second through each rank of a ring."""
        return cluster.nvlink if self.nodes == 1 else min(cluster.nvlink, self.each * cluster.network)


class Protocol(NamedTuple):
    """Seconds, and a share of the bandwidth."""

    start: float
    node: float
    """Of a hop within a node."""
    network: float
    """Of one between nodes."""
    share: float


RING = (Protocol(14.0e-6, 1.9e-6, 4.0e-6, 0.92), Protocol(8.4e-6, 3.4e-6, 14.0e-6, 1.0))
"""LL128 and Simple."""
TREE = (Protocol(14.0e-6, 1.25e-6, 8.5e-6, 0.92 * 15 / 16), Protocol(0.0, 28.0e-6, 28.0e-6, 0.92))


def ring(size: float, group: Group, trips: int, protocol: Protocol, cluster: Cluster = H100) -> float:
    """Seconds of ``trips`` times R - 1 hops with ``size / R`` bytes each: two make an all-reduce."""
    ranks = group.ranks
    if ranks == 1:
        return 0.0
    hops = trips * (ranks - 1)
    crossing = hops * group.nodes / ranks if group.nodes > 1 else 0.0
    latency = protocol.start + (hops - crossing) * protocol.node + crossing * protocol.network
    return latency + hops / ranks * size / (protocol.share * group.bandwidth(cluster))


def tree(size: float, group: Group, protocol: Protocol, cluster: Cluster = H100) -> float:
    """Seconds of an all-reduce up a tree and down again: a chain in each node, a binary tree over nodes."""
    if group.ranks == 1:
        return 0.0
    hops = (group.each - 1) * protocol.node + math.ceil(math.log2(group.nodes)) * protocol.network
    return protocol.start + 2 * hops + 2 * size / (protocol.share * group.bandwidth(cluster))


def all_reduce(size: float, group: Group, cluster: Cluster = H100) -> float:
    """Seconds of the sum of ``size`` bytes over a group, the quickest way. Nothing to sum takes none."""
    if not size:
        return 0.0
    rings = (ring(size, group, 2, protocol, cluster) for protocol in RING)
    return min(*rings, *(tree(size, group, protocol, cluster) for protocol in TREE))


def all_gather(size: float, group: Group, cluster: Cluster = H100) -> float:
    """Seconds until every rank has all of ``size`` bytes. A reduce-scatter of so many takes as long."""
    return min(ring(size, group, 1, protocol, cluster) for protocol in RING)
