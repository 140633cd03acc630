"""Optimizers and weights for tests of shards, and steps of sharded and whole weights side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

import specopt
from tests.specopt.helpers import with_spectrum
from tests.specopt.sharding.twins import Gap, Twins

FEW: dict[str, Any] = {"block": 8, "max_passes": 4}
"""So few columns that a matrix with 17 rows and columns is tracked; and passes that a short test has time for."""
SNR: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "snr_lambda": 0.1}
KINDS: dict[str, Callable[[Any], Any]] = {
    "snr": lambda groups: specopt.SNRSGD(groups, **SNR, **FEW),
    "set": lambda groups: specopt.NormScaleAdamW(groups, lr=1e-2, **FEW),
    "initial": lambda groups: specopt.NormScaleAdamW(groups, lr=1e-2, target="initial", **FEW),
    "cap of rank 2": lambda groups: specopt.NormScaleAdamW(groups, lr=1e-2, mode="cap", rank=2, **FEW),
    "rescale": lambda groups: specopt.NormScaleAdamW(groups, lr=1e-2, mode="rescale", **FEW),
    "frobenius": lambda groups: specopt.NormScaleAdamW(groups, lr=1e-2, norm="frobenius"),
    "decay": lambda groups: specopt.wrap(torch.optim.RMSprop(groups, lr=1e-2), specopt.SpectralDecay(1.0, **FEW)),
    "composed": lambda groups: specopt.wrap(
        torch.optim.RMSprop(groups, lr=1e-2),
        specopt.Compose(specopt.SpectralDecay(1.0), specopt.NormScale(mode="cap", target=1.2, **FEW)),
    ),
    "full": lambda groups: specopt.NormScaleAdamW(groups, lr=1e-2, mode="cap", rank="full"),
    "every second": lambda groups: specopt.NormScaleAdamW(groups, lr=1e-2, every=2, **FEW),
    "penalty and cap": lambda groups: penalized(groups, mode="cap", target=1.2),
    "penalty and frobenius": lambda groups: penalized(groups, norm="frobenius", target=0.8),
    "penalty and full": lambda groups: penalized(groups, mode="cap", target=1.8, rank="full", every=2),
}


def penalized(groups: Any, **options: Any) -> Any:
    rule = specopt.Compose(specopt.SpectralPenalty(0.1), specopt.NormScale(**options, **FEW))
    return specopt.wrap(torch.optim.SGD(groups, lr=1e-2, momentum=0.9), rule)


SCALED = ("set", "cap of rank 2", "rescale", "frobenius", "full", "every second")
RANKS = {"cap of rank 2": 2, "composed": 2}
"""Of those kinds that correct more than one singular value."""
PENALIZED = ("penalty and cap", "penalty and frobenius", "penalty and full")
PAIRED = ("set", "initial", "cap of rank 2", "rescale", "decay", "composed", "every second", *PENALIZED)
SHAPES = [(40, 30), (37, 29), (30, 40), (2, 50), (50, 2), (1, 24), (24, 6, 3, 3), (18, 18)]
"""Tracked ones, one that no number of ranks divides, short ones of which some rank of four has nothing, a kernel."""


def is_turned(shape: tuple[int, ...], kind: str, placements: Sequence[Placement]) -> bool:
    """Whether the tracker of pairs reads it transposed."""
    rows, columns = shape[0], math.prod(shape[1:])
    tracked = min(rows, columns) > 2 * FEW["block"]
    by_columns = Shard(1) in placements and all(place in (Shard(1), Replicate()) for place in placements)
    return kind in PAIRED and tracked and by_columns and rows != columns  # a square one is read as it is


def twin_steps(
    kind: str, mesh: Any, placements: Sequence[Placement], steps: int, dtype: torch.dtype, shapes: Any = SHAPES
) -> list[list[Gap]]:
    """By step and weight how a sharded and an unsharded optimizer differ, and the sharded one."""
    generator = torch.Generator().manual_seed(steps)
    weights = [with_spectrum(shape, dtype, 0.2, generator) for shape in shapes]
    turned = [is_turned(shape, kind, placements) for shape in shapes]
    options = {"target": [1.0 + i / 8 for i in range(len(weights))]} if kind in SCALED else {}
    twins = Twins.of(KINDS[kind], weights, mesh, placements, turned, **options)
    twins.rank = RANKS.get(kind, 1)
    found = []
    for _ in range(steps):
        twins.give([0.1 * torch.randn(shape, generator=generator).to(dtype) for shape in shapes])
        found.append(twins.step())
    assert all(param.to_local().isfinite().all() for param in twins.sharded if isinstance(param, DTensor))
    return found


def judged(gaps: list[list[Gap]], shapes: Any = SHAPES, *, kind: str = "") -> dict[Any, Gap]:
    """The worst of every weight that came out otherwise, by step and shape. A penalty's first triplet, which nothing is
    known of before, is measured to a residual of 1e-3."""
    at_first = 1e-4 if kind in PENALIZED else 1e-5
    return {
        (step, shapes[i]): gap
        for step, row in enumerate(gaps)
        for i, gap in enumerate(row)
        if not gap.is_within(at_first if step == 0 else 1e-5)
    }
