"""A weight that changes where one half product of SNRSGD shows a residual and leaves none, or leaves as much."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import specopt
from specopt.tracker.common import COLD_STEPS, STATS, Stat

SHAPE, BLOCK, MOVED = (80, 60), 16, 0.05
TURNS = {"right": COLD_STEPS + 2, "left": COLD_STEPS + 1}
"""So many steps before the one that is looked at, whose half product is of that side."""


def stats_of(side: str, second: float, into: Callable[[Tensor], Tensor] = lambda whole: whole) -> tuple[Tensor, Tensor]:
    """The stats after the step, and the weight it found. Singular values are 1 and ``second``, and u₁ (on the right; on
    the left v₁) moves by ``MOVED`` towards the next one: after a half product a residual of ``second * MOVED`` is left.

    Args:
        into: makes the parameter's data, a DTensor perhaps, of a whole matrix.
    """
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 60, generator=generator, dtype=torch.float64))[0] for n in SHAPE)
    sigma = torch.full((60,), second, dtype=torch.float64)
    sigma[0] = 1
    before = u * sigma @ v.mT
    after = before + MOVED * (torch.outer(u[:, 1], v[:, 0]) if side == "right" else torch.outer(u[:, 0], v[:, 1]))
    weight = torch.nn.Parameter(into(before.float()))
    optimizer = specopt.SNRSGD([weight], lr=0.0, snr_lambda=0.01, block=BLOCK)
    weight.grad = into(torch.zeros(SHAPE))
    for _ in range(TURNS[side]):
        optimizer.step()
    assert float(optimizer.state[weight][STATS][Stat.RESIDUAL]) < 1e-3
    with torch.no_grad():
        weight.copy_(into(after.float()))
    optimizer.step()
    return optimizer.state[weight][STATS], after
