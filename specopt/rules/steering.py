"""What rules that steer a norm to a target share: the targets, and how far each matrix may be moved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specopt import kernels
from specopt.kernels import accumulation_dtype

from .. import options
from ..session import Gate
from ..settling import own_target
from ..targets import target_frobenius, target_sigma
from ..tracker.common import PREFIX, STEP, HostCopy, Stat, constant
from ..tracker.measure import measure
from ..views import Matrix

INITIAL = {norm: f"{PREFIX}initial_{norm}" for norm in options.NORMS}
"""State keys of the norms noted for ``target="initial"``."""


def targets_of(matrices: Sequence[Matrix], like: Tensor) -> Tensor:
    """sigma*, or F* under Frobenius scaling, of each matrix (B,)."""
    known = constant([shape_target(matrix) for matrix in matrices], like)
    if not any(matrix.group["target"] == "initial" for matrix in matrices):
        return known
    nothing = like.new_full((), torch.nan)
    known_norms = [noted_norm(matrix) for matrix in matrices]
    noted = torch.stack([(nothing if norm is None else norm).to(like) for norm in known_norms])
    return torch.where(known.isnan(), noted, known)


def noted_norm(matrix: Matrix) -> Tensor | None:
    """The norm noted for ``target="initial"``, if it is of this matrix: there are more where the view was another."""
    norm = matrix.state.get(INITIAL[matrix.group["norm"]])
    return norm if isinstance(norm, Tensor) and norm.ndim == 0 else None


def shape_target(matrix: Matrix) -> float:
    """The target as far as the shape and the options tell it; nan for ``"initial"``."""
    shape_rule = target_frobenius if matrix.group["norm"] == "frobenius" else target_sigma
    return shape_rule(matrix.shape, own_target(matrix))


class InitialNorms:
    """The norms of weights as they are, where those are to be the targets and not yet noted."""

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        self.found: list[tuple[Matrix, str, Tensor]] = []
        unknown = [m for m in matrices if m.group["target"] == "initial" and noted_norm(m) is None]
        for norm, key in INITIAL.items():
            chosen = [m for m in unknown if m.group["norm"] == norm]
            if not chosen:
                continue
            spectral = norm == "spectral"
            values = measure(chosen)[:, Stat.SIGMA] if spectral else kernels.frobenius_norms([m.weight for m in chosen])
            dtypes = [accumulation_dtype(m.param.dtype) for m in chosen]
            kept = norm_to_keep(values)
            self.found += [(m, key, v.to(dtype, copy=True)) for m, v, dtype in zip(chosen, kept, dtypes, strict=True)]

    def note(self) -> None:
        """After the base update: AdamW takes state that is not empty for its own."""
        for matrix, key, value in self.found:
            matrix.state[key] = value


def norm_to_keep(norm: Tensor) -> Tensor:
    """What ``target="initial"`` goes by: nan, which is no target, of a weight that is zero or not finite."""
    return torch.where((norm > 0) & norm.isfinite(), norm, torch.nan)


def down_only(matrices: Sequence[Matrix], norm: Tensor, target: Tensor, stats: Tensor) -> Tensor:
    """Whether a matrix may only be lowered (B,): under "cap", and as long as one that was zero at the start has not
    reached its target by itself, which is noted in the stats."""
    raise_small = constant([float(matrix.group["raise_small"]) for matrix in matrices], norm) > 0
    capped = (stats[:, Stat.CAPPED] > 0) & ~(norm >= target) & ~raise_small
    stats[:, Stat.CAPPED] = capped.to(stats.dtype)
    return capped | (constant([float(matrix.group["mode"] == "cap") for matrix in matrices], norm) > 0)


def distance(norm: Tensor, target: Tensor, valid: Tensor, down: Tensor) -> Tensor:
    """``target − norm`` where that change may be made, else 0: also where there is no target (nan)."""
    change = torch.where(valid & (norm > 0) & ~target.isnan(), target - norm, 0.0)
    return torch.where(down, change.clamp_max(0.0), change)


def factor_to(target: Tensor, norm: Tensor, moved: Tensor) -> Tensor:
    """``target / norm`` where a norm is moved, at most the largest number there is; else 1."""
    return torch.where(moved, target / torch.where(norm > 0, norm, 1.0), 1.0).clamp_max(torch.finfo(norm.dtype).max)


def beginners(matrices: Sequence[Matrix]) -> list[int]:
    """Which are in their first step, as long as that is not counted."""
    return [i for i, matrix in enumerate(matrices) if matrix.state[STEP] == 0]


def tell_first(
    matrices: Sequence[Matrix], first: Sequence[int], norm: Tensor, target: Tensor, changed: Tensor, gate: Gate
) -> None:
    """Of those in their first step the norm over the target, 1 where the rule does not pull there."""
    if first:
        pulled = changed & (constant([float(m.group["mode"] != "cap") for m in matrices], norm) > 0)
        ratio = torch.where(pulled, norm / target, 1.0)
        gate.ratios.append(([matrices[i] for i in first], HostCopy.of(torch.stack([ratio[i] for i in first]))))
