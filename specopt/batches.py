"""What a step is made of: matrices that are served alike, and what tells that they are still those of the last step."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specopt import kernels

from . import updates
from .base_step import own_entries
from .sharding.checking import check_sharded
from .sharding.cut import is_distributed, local_of
from .sharding.sessions import has_state as sharded_state
from .sharding.views import ShardedMatrix
from .tracker.common import WAIT, move_on, wait_of
from .tracker.device import runs_on
from .updates import OnDeviceBase
from .views import Matrix

if TYPE_CHECKING:
    from .control import SpectralOptimizer

UNSIGNED = ("params", "lr", "param_names", "initial_lr", "target", "snr_lambda", "decay_lambda")
"""What a group holds that is no option, or may change from step to step: schedules."""
SWITCHES = ("snr_lambda", "decay_lambda")
"""Those of them that make a difference where they are 0: it means off."""


@dataclass
class Batch:
    """Matrices that one call of every operation can serve."""

    matrices: list[Matrix]
    ours: bool
    """Their base update is made by our passes, not by torch."""
    base: OnDeviceBase | None = None
    """That update, where a pass on the device makes it."""
    is_fused: bool = False
    """A device's launches over all of them (:mod:`specopt.tracker.device`) control them."""
    is_sharded: bool = False
    """They are cut up over ranks, and need what :mod:`specopt.sharding` sums over these."""
    copied: list[Matrix] = field(default_factory=list)
    """Those of the matrices that are read through a copy."""
    period: int = 1
    """Of so many steps the rule acts in the first."""
    wait: int = 0
    """Steps that the base optimizer still makes alone."""

    def move_on(self) -> None:
        """By one step."""
        if self.period > 1 or WAIT in self.matrices[0].state:
            self.wait = move_on((matrix.state for matrix in self.matrices), self.wait, self.period)

    def resting(self) -> Batch:
        """For a step of the base optimizer alone. What a pass on a device would make of it torch does."""
        return replace(self, ours=self.ours and self.base is None, base=None, copied=[])


def batches_of(optimizer: SpectralOptimizer) -> list[Batch]:
    """Those of the controlled weights that have a gradient.

    Raises:
        ValueError: options that have changed to what a weight that is cut up over ranks cannot have, or rounding by
            chance where a device has none.
        RuntimeError: a sparse gradient.
    """
    batches: dict[Any, Batch] = {}
    names = cache(optimizer.names)
    for matrix in optimizer.matrices():
        if not optimizer.rule.is_on(matrix.group):
            continue
        is_sharded = isinstance(matrix, ShardedMatrix)
        if is_sharded:
            check_sharded(matrix.param, matrix.group, names)
        ours, fused = _is_ours(optimizer, matrix), optimizer.rule.is_fused(matrix) and not is_sharded
        if not fused and not kernels.on_host(matrix.param):
            _check_rounding(matrix, names)
        kind: tuple[Any, ...] = (kernels.accumulation_dtype(matrix.param.dtype), matrix.complete)
        if fused:
            kind = (matrix.param.dtype,)
        period = optimizer.rule.period(matrix.group)
        wait = wait_of(matrix.state, period) if has_state(optimizer, matrix) else 0
        kind += (is_sharded, is_distributed(matrix.param), optimizer.rule.sort(matrix), period, wait)
        if isinstance(matrix, ShardedMatrix):  # ranks that share one weight go the same rounds, whatever else they have
            kind += (matrix.cut.sharers,)
        new = Batch([], ours, is_fused=fused, is_sharded=is_sharded, period=period, wait=wait)
        batch = batches.setdefault((matrix.param.device, ours, *kind), new)
        batch.matrices.append(matrix)
        if matrix.copy is not None:
            batch.copied.append(matrix)
        if fused and ours:
            batch.base = OnDeviceBase(batch.matrices)
    return list(batches.values())


def _check_rounding(matrix: Matrix, names: Callable[[], Mapping[Tensor, str]]) -> None:
    """Of what a device controls by operations on lists of matrices, which round to nearest, as torch's update does."""
    if matrix.group["stochastic_rounding"] and matrix.param.dtype.itemsize == 2:
        raise ValueError(
            f"stochastic_rounding must be False for {names()[matrix.param]} of {matrix.param.dtype} on "
            f"{matrix.param.device}, got True: with a rank above 1, norm='frobenius' or composed rules a device rounds "
            "to nearest; keep float32 weights, or one rule with rank=1 and norm='spectral'"
        )


def _is_ours(optimizer: SpectralOptimizer, matrix: Matrix) -> bool:
    """Whether the base update of a matrix is made by our passes, or by torch."""
    if not optimizer.base_is_known or is_distributed(matrix.param) or not updates.is_plain(matrix):
        return False
    if runs_on(matrix):
        return optimizer.rule.has_state(matrix) and optimizer.rule.takes_along(matrix)
    return matrix.param.device.type == "cpu"


def has_state(optimizer: SpectralOptimizer, matrix: Matrix) -> bool:
    """Whether the tracker of a matrix can go on from its state."""
    if isinstance(matrix, ShardedMatrix):
        return sharded_state(optimizer.rule, matrix)
    return optimizer.rule.has_state(matrix)


def signature_of(optimizer: SpectralOptimizer) -> tuple[list[Any], list[Any]]:
    """What the batches were made from: while it stays, so do they. And what has its id in it, to be held with it,
    so that nothing else can take its place."""
    signature: list[Any] = [os.environ.get("SPECOPT_BACKEND")]
    held: list[Any] = []
    names = [name for name in optimizer.rule.names if name not in UNSIGNED]
    of_base = []
    if optimizer.base_is_known:
        of_base = [name for name in optimizer.defaults if name not in (*UNSIGNED, *names)]
    for group in optimizer.param_groups:
        held.append(group)
        signature.append(id(group))
        signature += [group[name] == 0 for name in SWITCHES if name in optimizer.rule.names]
        signature += [_of_option(group[name]) for name in names]
        signature += [_of_base_option(group[name]) for name in of_base if name in group]
        rate = group.get("lr")
        signature += [id(rate) if isinstance(rate, Tensor) else None, group.get("maximize")]
        for param in group["params"]:
            grad = param.grad
            state = optimizer.state.get(param, {})
            read_of_it = state if optimizer.base_is_known else own_entries(state)
            kept = [value for value in read_of_it.values() if isinstance(value, Tensor)]
            held += kept
            layouts = [
                (t.layout, t.dtype, t.shape, t.layout == torch.strided and t.stride())
                for t in (param, grad)
                if t is not None
            ]
            signature.append(
                (id(param), local_of(param).data_ptr(), layouts, id(optimizer.state.get(param)), *map(id, kept))
            )
    return signature, held


def _of_option(value: Any) -> Any:
    return id(value) if isinstance(value, Tensor) else value


def _of_base_option(value: Any) -> Any:
    """Of a number whether it is 0: ``momentum`` and ``betas``, which OneCycleLR cycles, and ``weight_decay`` are read
    anew in each step."""
    if isinstance(value, tuple):
        return tuple(map(_of_base_option, value))
    return value == 0 if isinstance(value, (int, float)) else _of_option(value)
