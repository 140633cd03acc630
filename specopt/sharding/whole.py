"""The cap of all singular values of sharded weights: of whole matrices, put together on every rank.

Its products are of n × n matrices, n the smaller side, whatever the number of ranks; so what they are made of is summed
over the ranks as it is, which adds zeros to it, and every rank makes the same bits of the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..rules import whole
from ..session import Gate
from .cut import Part
from .exchange import Exchange, now
from .gathering import portions
from .views import ShardedMatrix


def cap_all(matrices: Sequence[ShardedMatrix], stats: Tensor, gate: Gate, *, wild: bool) -> Exchange[Tensor]:
    """See :func:`specopt.rules.whole.cap_all`."""
    valid = torch.zeros_like(stats[:, 0], dtype=torch.bool)
    for chosen in portions([matrix.cut.shape[0] * matrix.cut.shape[1] for matrix in matrices]):
        some, found = [matrices[i] for i in chosen], stats[chosen]
        parts = [Part(matrix.weight, (matrix.cut.rows, matrix.cut.columns), matrix.cut.shape) for matrix in some]
        weights = yield now(some, [part.amid_zeros() for part in parts])
        valid[chosen] = whole.cap_all(some, found, gate, wild=wild, weights=weights)
        stats[chosen] = found
        for part, weight in zip(parts, weights, strict=True):
            part.take(weight)
    return valid
