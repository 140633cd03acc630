"""A step's control on a GPU: the launches over a bucket (:mod:`specopt.kernels.bucket`) and what is kept between steps.

``NormScale`` and ``SpectralDecay``, warm: [update and Y = W V], solve, [Z and solve], [Y and solve] (the conditional
pair), [correction and Z], solve: 6 launches. ``SpectralPenalty``: solve, [half and solve] twice (the conditional pair),
[update and the half product of the next step]: 4 launches, and one more where somebody else wrote to a weight. Where a
matrix calls for no second pair, the programs of the conditional launches take the later stages of its solve. A step of
the cold phase enqueues up to 15 conditional pairs in place of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specopt import kernels
from specopt.kernels import Penalty, tables

from ..sharding.cut import is_distributed
from ..views import Matrix, scaling
from .common import (
    BLOCK,
    COLD_MAX,
    COLD_MIN,
    COLD_STEPS,
    COLD_STOP,
    LEFT,
    PROBE,
    RIGHT,
    STATS,
    STEP,
    WARM_MAX,
    probe_columns,
    rounding_seeds,
)


@dataclass
class BaseUpdate:
    """The base update of a bucket's matrices, for a pass of ours to make: see :mod:`specopt.kernels.records`."""

    kind: str
    """``"SGD"`` or ``"ADAMW"``."""
    numbers: dict[str, Any]
    """Name of the record's number: one value for each matrix."""
    addresses: list[list[int]]
    """Gradient, first, second, peak, lr and step of each matrix."""
    kept: list[Tensor] = field(default_factory=list)
    """Tensors made for this step, which have to outlive its launches."""


def runs_on(matrix: Matrix) -> bool:
    param = matrix.param
    return kernels.backend_for(param.device, kernels.accumulation_dtype(param.dtype)) == "triton"


class Engine:
    """A bucket under one kind of tracker, and what its steps leave for the next: in the optimizer's workspace, which is
    no state and can be lost at any time."""

    def __init__(self, matrices: Sequence[Matrix], identity: object, captured: list[object]) -> None:
        from specopt.kernels import bucket

        self.ops: Any = bucket
        self.identity = identity
        self.captured = captured
        """What graphs read, whenever they are replayed: kept as long as the optimizer."""
        self.bucket = bucket.Bucket([self._tracked(matrix) for matrix in matrices])
        self.versions: list[int] | None = None
        """Of the weights that the half product in scratch was made of; None: there is none."""

    @classmethod
    def of(cls, matrices: Sequence[Matrix], ours: bool, workspace: dict[Any, Any]) -> Engine:
        first = matrices[0].param
        batch = first.device, first.dtype, is_distributed(first), scaling(matrices[0].group, "every", 1)
        key = ("engine", ours, *batch)
        engine: Engine | None = workspace.get(key)
        identity = [_identity(matrix) for matrix in matrices]
        if engine is None or engine.identity != identity:
            if tables.capturing(first.device):
                raise RuntimeError(
                    "a step is captured in a graph, but the one before was of other tensors: make warm-up steps of the "
                    f"same ones first, more than {COLD_STEPS} of them"
                )
            engine = workspace[key] = cls(matrices, identity, workspace.setdefault("captured", []))
            before = workspace.get(("engine", not ours, *batch))
            if before is not None and before.identity == identity:  # the base made the first step's update
                del workspace[("engine", not ours, *batch)]
        engine.bucket.follow_stream()
        return engine

    @staticmethod
    def _tracked(matrix: Matrix) -> Any:
        from specopt.kernels.bucket import Tracked

        state, k = matrix.state, matrix.columns
        stats = state[STATS]
        if matrix.complete:
            return Tracked(matrix.weight, k, 0, True, stats)
        a = probe_columns(matrix.block)
        if BLOCK in state:
            return Tracked(matrix.weight, k, a, False, stats, right=state[BLOCK], right_probe=state[PROBE])
        right, left = state[RIGHT], state[LEFT]
        return Tracked(matrix.weight, k, a, False, stats, right[:, :k], left[:, :k], right[:, k:], left[:, k:])

    def prepare(self, matrices: Sequence[Matrix], options: dict[str, Any], base: BaseUpdate | None) -> int:
        """Uploads what has changed; returns how many pairs of products a step makes at most."""
        cold = np.array([matrix.state[STEP] < COLD_STEPS for matrix in matrices])
        if cold.any() and tables.capturing(self.bucket.device):
            raise RuntimeError(
                f"in its first {COLD_STEPS} steps the number of launches is another than later, so they cannot be "
                "captured in a graph: make them before the capture"
            )
        limits = np.array([matrix.group["max_passes"] or 0 for matrix in matrices])
        most = np.where(limits > 0, limits, np.where(cold, COLD_MAX, WARM_MAX))
        tolerance = np.array([matrix.group["tolerance"] for matrix in matrices])
        numbers = {
            **options,
            **(base.numbers if base else {}),
            "TOLERANCE": tolerance * np.where(cold, COLD_STOP, 1.0),
            "MINIMUM": np.where(cold, COLD_MIN, 1),
            "MAXIMUM": most,
            "COLD": cold,
            "FIXED": limits > 0,
        }
        if _stochastic(matrices):
            numbers["SEED"] = rounding_seeds(matrices)
        nowhere = [0] * len(matrices)
        targets, rates = numbers.pop("TARGET_AT", nowhere), numbers.pop("LR", nowhere)
        addresses = base.addresses if base else [[0, 0, 0, 0, rate, 0] for rate in rates]
        table = np.zeros((len(matrices), self.ops.r.NUMBERS.value), np.float32)
        for name, values in numbers.items():
            table[:, getattr(self.ops.r, name).value] = values
        self.bucket.set_numbers(table)
        self.bucket.set_addresses([[*row, at] for row, at in zip(addresses, targets, strict=True)])
        if tables.capturing(self.bucket.device):
            self.captured += self.bucket.in_use()
        return int(most.max())


def _identity(matrix: Matrix) -> tuple[Any, ...]:
    state = matrix.state
    tensors = [matrix.weight, *(state[key] for key in (STATS, BLOCK, PROBE, LEFT, RIGHT) if key in state)]
    layout = (tuple(matrix.weight.shape), matrix.weight.stride())
    return (matrix.columns, *layout, *(tensor.data_ptr() for tensor in tensors))


class Turns:
    """A step of ``SpectralPenalty``: session of matrices that have state."""

    writes = False

    def __init__(
        self,
        matrices: Sequence[Matrix],
        strengths: Sequence[float],
        base: BaseUpdate | None,
        workspace: dict[Any, Any],
        scaler: dict[str, Any],
    ) -> None:
        self.matrices, self.base, self.scaler = matrices, base, scaler
        engine = self.engine = Engine.of(matrices, base is not None, workspace)
        rounds = engine.prepare(matrices, {"STRENGTH": strengths}, base)
        ops, bucket, found_inf = engine.ops, engine.bucket, scaler["found_inf"]
        if engine.versions != _versions(matrices):
            if tables.capturing(bucket.device):
                raise RuntimeError("a weight was written to between the last step and the capture of this one")
            bucket.launch_pass(ops.NONE, ops.TURNING)  # also where found_inf skips the rest: the next step counts on it
        bucket.launch_solve(ops.TURN, round=0, last=rounds == 1, found_inf=found_inf)
        for half in range(1, 2 * rounds - 1):
            bucket.launch_pass(
                ops.NONE,
                ops.TURNING,
                then=ops.TURN,
                flip=(half - 1) % 2,
                round=half,
                last=int(half == 2 * rounds - 2),
                conditional=True,
                found_inf=found_inf,
            )
        if rounds == 1:  # else the conditional pair's launches take these stages
            for stage in (1, 2):
                bucket.launch_solve(ops.TURN, round=0, last=True, found_inf=found_inf, stage=stage)
        engine.versions = None
        for matrix in matrices:
            matrix.state[STEP] += 1

    @property
    def penalty(self) -> Penalty:
        bucket = self.engine.bucket
        lefts, rights = bucket.vectors
        return Penalty(bucket.scalars[:, self.engine.ops.r.PENALTY.value], lefts, rights)

    def update(self) -> None:
        assert self.base is not None
        ops = self.engine.ops
        update = getattr(ops, self.base.kind)
        self.engine.bucket.launch_pass(update, ops.TURNING, **self.scaler, stochastic=_stochastic(self.matrices))
        torch.autograd.graph.increment_version([matrix.param for matrix in self.matrices])
        self.engine.versions = _versions(self.matrices)

    def finish(self) -> None:
        pass


class Pairs:
    """A step of a rule that acts after the base update: matrices that have state."""

    def __init__(
        self,
        matrices: Sequence[Matrix],
        options: dict[str, Any],
        base: BaseUpdate | None,
        workspace: dict[Any, Any],
        scaler: dict[str, Any],
    ) -> None:
        self.matrices, self.base, self.scaler = matrices, base, scaler
        self.engine = Engine.of(matrices, base is not None, workspace)
        self.rounds = self.engine.prepare(matrices, options, base)

    def update(self) -> None:
        assert self.base is not None
        ops = self.engine.ops
        update = getattr(ops, self.base.kind)
        self.engine.bucket.launch_pass(update, ops.LEFT, **self.scaler, stochastic=_stochastic(self.matrices))

    def finish(self) -> None:
        ops, bucket, found_inf = self.engine.ops, self.engine.bucket, self.scaler["found_inf"]
        if self.base is None:
            bucket.launch_pass(ops.NONE, ops.LEFT, found_inf=found_inf)
        bucket.launch_solve(ops.RITZ, round=0, last=False, found_inf=found_inf)
        for done in range(1, self.rounds):
            common = {"round": done, "conditional": True, "found_inf": found_inf}
            bucket.launch_pass(ops.NONE, ops.RIGHT, then=ops.BASIS, **common)
            bucket.launch_pass(ops.NONE, ops.LEFT, then=ops.RITZ, **common)
        if self.rounds == 1:  # else the conditional pair's first launch takes this stage
            bucket.launch_solve(ops.RITZ, round=0, last=False, found_inf=found_inf, stage=1)
        bucket.launch_pass(ops.CORRECT, ops.RIGHT, found_inf=found_inf, stochastic=_stochastic(self.matrices))
        bucket.launch_solve(ops.BASIS, round=0, last=True, found_inf=found_inf)
        torch.autograd.graph.increment_version([matrix.param for matrix in self.matrices])
        for matrix in self.matrices:
            matrix.state[STEP] += 1

    @property
    def norms(self) -> tuple[Tensor, Tensor]:
        """sigma₁ found and whether the rule pulls there (B,), for the first step's warning."""
        scalars, r = self.engine.bucket.scalars, self.engine.ops.r
        changed = (scalars[:, r.CHANGE.value] != 0) | (scalars[:, r.FACTOR.value] != 1)
        return scalars[:, r.SIGMA.value], changed


def _versions(matrices: Sequence[Matrix]) -> list[int]:
    return [matrix.param._version for matrix in matrices]


def _stochastic(matrices: Sequence[Matrix]) -> bool:
    return any(matrix.group.get("stochastic_rounding") for matrix in matrices)
