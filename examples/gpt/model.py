"""A small GPT, and its optimizer: spectral caps on the projections of attention, and on nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import specopt
from specopt.tracker.common import STATS, Stat

PROJECTIONS: dict[str, dict[str, Any]] = {
    "*": {"spectral": False},
    "*.qkv.weight": {"spectral": True, "view": "rows:3"},
    "*.out.weight": {"spectral": True},
}
"""Which parameters are controlled, and how a packed one is read: query, key and value are a matrix each."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a GPT."""

    width: int = 96
    layers: int = 2
    heads: int = 4
    context: int = 64
    """Tokens that it sees."""


class Attention(nn.Module):
    """Causal, ``softmax(Q Kᵀ / sqrt(d)) V`` by head; the norms of its projections bound how sharp it can become."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(seen.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.between = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        out: Tensor = x + self.mlp(self.between(x))
        return out


class GPT(nn.Module):
    """Logits (b·t, tokens) of what follows each of the tokens (b, t)."""

    def __init__(self, tokens: int, shape: Shape) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(tokens, shape.width), nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape.width, shape.heads) for _ in range(shape.layers))
        self.after, self.head = nn.LayerNorm(shape.width), nn.Linear(shape.width, tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.after(x).flatten(0, 1))  # not a view, which FSDP2 would warn of
        return out


def gpt(tokens: int, shape: Shape, seed: int) -> GPT:
    """The same numbers on every rank. Projections start orthogonal, all their singular values 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT(tokens, shape)
    specopt.init.scaled_orthogonal_(model, seed=seed, overrides=PROJECTIONS)
    return model


def capped_adamw(model: GPT, lr: float, cap: float) -> specopt.NormScaleAdamW:
    """AdamW that leaves no singular value of a projection above the cap for long: one of each a step is lowered to it.

    Args:
        model: as it is trained, cut up over ranks or not.
        lr: of the steps behind the warm-up.
        cap: the most that the largest singular value of a projection may be.
    """
    groups = specopt.param_groups(model, overrides=PROJECTIONS)
    return specopt.NormScaleAdamW(groups, lr=lr, betas=(0.9, 0.95), mode="cap", target=cap)


def largest_sigma(optimizer: specopt.NormScaleAdamW) -> float:
    """Over all projections, behind the last step's correction: as tracked, which every rank knows."""
    stats = [state[STATS] for state in optimizer.state.values() if STATS in state]
    return max(float(each[..., Stat.TOP].max()) for each in stats)
