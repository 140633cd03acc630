"""Records of matrices for the solve kernel alone, and steps of it beside the trackers on the torch reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor

from specopt.kernels import records as r
from specopt.kernels import start_block, subspace, tables
from specopt.kernels.solves import algebra, rows
from specopt.kernels.solves import device as solves
from specopt.rules import NormScale
from specopt.session import Gate
from specopt.tracker import common, halves, pairs
from specopt.tracker.common import BLOCK, LEFT, PROBE, RIGHT, STATS, STEP, Stat, probe_columns
from specopt.views import Matrix, matrices_of

from .samples import DEVICE, generator

CHUNK = 48
"""So that small matrices have several partial sums."""

GROUP = {
    "view": "flatten",
    "block": 8,
    "tolerance": 0.01,
    "max_passes": None,
    "mode": "set",
    "target": 1.0,
    "norm": "spectral",
    "rank": 1,
    "raise_small": False,
    "lr": 1e-3,
    "snr_lambda": 0.01,
}


class Records:
    """The records of a few matrices, with their scratch; products are made by torch."""

    def __init__(self, matrices: Sequence[Matrix], tracker: str) -> None:
        self.matrices, self.tracker = matrices, tracker
        self.held: list[Tensor] = []
        blocks = [m.columns + self._probes(m) for m in matrices if not m.complete]
        self.dtype = matrices[0].weight.dtype
        self.KP = tables.padded(max(blocks, default=1))
        exact = [m.columns for m in matrices if m.complete]
        self.KX = tables.padded(max(exact)) if exact else 0
        width, device = max(self.KP, self.KX), matrices[0].weight.device
        longest = max(max(m.weight.shape) for m in matrices)
        start_block(longest + self.KP, 64, torch.float32, device)
        self.noise = start_block(longest + 37 * 63, 64, torch.float32, device)
        self.scalars = torch.full((len(matrices), r.SCALARS.value), math.nan, device=device)
        self.sigmas = torch.full((len(matrices), width), math.nan, device=device)
        self.squares = torch.full((len(matrices), algebra.SLOTS.value, width, width), math.nan, device=device)
        self.tickets = torch.zeros(len(matrices), dtype=torch.int32, device=device)
        shapes = [(m.weight.shape[0], m.weight.shape[1]) for m in matrices]
        self.solving = solves.work_lists(shapes, [m.complete for m in matrices], self.KP, device)
        self.scratch = [self._scratch(m) for m in matrices]
        self.table = torch.tensor([self._row(i) for i in range(len(matrices))], dtype=torch.int64, device=device)
        self.numbers = torch.tensor([self._numbers(m) for m in matrices], device=device)

    def _probes(self, matrix: Matrix) -> int:
        return 0 if matrix.complete else probe_columns(matrix.block)

    def _scratch(self, matrix: Matrix) -> dict[str, Tensor]:
        m, n = matrix.weight.shape
        like = matrix.weight.new_empty((), dtype=torch.float32)
        shapes = {}
        for side, length, inner in (("LEFT", m, n), ("RIGHT", n, m)):
            shapes[f"{side}_PRODUCT"] = (-(-inner // CHUNK), length, self.KP)
            shapes.update({f"{side}_{name}": (length, self.KP) for name in ("SUM", "VECTORS", "SPARE")})
        shapes["PARTIALS"] = (rows.partial_rows((m, n), self.KP), self.KP)
        return {name: like.new_full(shape, math.nan) for name, shape in shapes.items()}

    def _row(self, i: int) -> list[int]:
        matrix, scratch, a = self.matrices[i], self.scratch[i], self._probes(self.matrices[i])
        weight = matrix.weight
        swapped = weight.stride(1) != 1 and weight.stride(0) == 1
        lying = weight.mT if swapped else weight
        row = {
            "WEIGHT": weight.data_ptr(),
            "ROWS": lying.shape[0],
            "COLUMNS": lying.shape[1],
            "ROW_STEP": lying.stride(0),
            "COLUMN_STEP": lying.stride(1),
            "SWAPPED": int(swapped),
            "K": matrix.columns,
            "PROBES": a,
            "EXACT": int(matrix.complete),
            "STATS": matrix.state[STATS].data_ptr(),
            **{name: value.data_ptr() for name, value in scratch.items()},
        }
        for side, inner in (("LEFT", weight.shape[1]), ("RIGHT", weight.shape[0])):
            row[f"{side}_CHUNKS"], row[f"{side}_CHUNK"] = -(-inner // CHUNK), CHUNK
        if matrix.group.get("step") is not None:
            row["STEP"] = matrix.group["step"].data_ptr()
        if isinstance(matrix.group["lr"], Tensor):
            row["LR"] = matrix.group["lr"].data_ptr()
        if "target_at" in matrix.group:
            row["TARGET_AT"] = matrix.group["target_at"].data_ptr()
        if not matrix.complete:
            sides = (
                {LEFT: "LEFT", RIGHT: "RIGHT"} if self.tracker == "halves" else {BLOCK: "RIGHT", PROBE: "RIGHT_PROBE"}
            )
            for key, side in sides.items():
                state = matrix.state[key]
                row[side], row[f"{side}_STEP"] = state.data_ptr(), state.stride(0)
                if self.tracker == "halves" and a:
                    row[f"{side}_PROBE"] = state[:, matrix.columns :].data_ptr()
                    row[f"{side}_PROBE_STEP"] = state.stride(0)
            if self.tracker == "pairs":
                row["LEFT"], row["LEFT_STEP"] = scratch["LEFT_VECTORS"].data_ptr(), self.KP
        values = [0] * r.FIELDS.value
        for name, value in row.items():
            values[getattr(r, name).value] = value
        return values

    def _numbers(self, matrix: Matrix) -> list[float]:
        group, cold = matrix.group, matrix.state[STEP] < common.COLD_STEPS
        limit = group["max_passes"]
        most = limit or (common.COLD_MAX if cold else common.WARM_MAX)
        number = {
            "RATE": 1e-3 if isinstance(group["lr"], Tensor) else group["lr"],
            "STRENGTH": group["snr_lambda"],
            "TOLERANCE": group["tolerance"] * (common.COLD_STOP if cold else 1.0),
            "MINIMUM": min(common.COLD_MIN, most) if cold else 1.0,
            "MAXIMUM": most,
            "COLD": float(cold),
            "FIXED": float(limit is not None),
            "TARGET": math.nan if "target_at" in group else group["target"],
            "MODE": ("set", "cap", "rescale").index(group["mode"]),
            "RAISE_SMALL": float(group["raise_small"]),
        }
        values = [math.nan] * r.NUMBERS.value  # none of the others is to be read
        for name, value in number.items():
            values[getattr(r, name).value] = value
        return values

    def product(self, i: int, side: int) -> None:
        """``W [V | Ω]`` or ``Wᵀ [U | Ω]`` in partial sums; what lies beyond the columns is anything."""
        matrix, scratch, a = self.matrices[i], self.scratch[i], self._probes(self.matrices[i])
        k, out = matrix.columns, scratch[("LEFT_PRODUCT", "RIGHT_PRODUCT")[side]]
        weight = (matrix.weight if side == 0 else matrix.weight.mT).float()
        if self.tracker == "halves":
            basis = matrix.state[(RIGHT, LEFT)[side]]
        else:
            basis = matrix.state[BLOCK] if side == 0 else scratch["LEFT_VECTORS"]
        wide = basis.new_zeros(len(basis), k + a)
        wide[:, :k] = basis[:, :k]
        if self.tracker == "halves" or side == 1:
            wide[:, k:] = start_block(len(basis), a, torch.float32, wide.device)
        for c, at in enumerate(range(0, weight.shape[1], CHUNK)):
            out[c].fill_(math.nan)
            out[c][:, : k + a] = weight[:, at : at + CHUNK] @ wide[at : at + CHUNK]

    def wants(self, i: int) -> bool:
        return bool(self.scalar(i, "WANTED") > 0)

    def scalar(self, i: int, name: str) -> Tensor:
        return self.scalars[i, getattr(r, name).value]

    def solve(self, kind: tl.constexpr, round: int, last: bool, found_inf: Tensor | None = None) -> None:
        """The first stage, and after a step's first product those that a conditional pair's launches take."""
        for stage in range(solves.STAGES[kind.value] if round == 0 else 1):
            solves.launch(self, kind.value, round, last, found_inf, stage)

    def pairs_step(self, rounds: int) -> None:
        """One step of the tracker by pairs, with the passes made by torch."""
        live = range(len(self.matrices))
        tracked = [i for i in live if not self.matrices[i].complete]
        for i in tracked:
            self.product(i, 0)
        self.solve(solves.RITZ, 0, False)
        for done in range(1, rounds):
            for i in tracked:
                self.product(i, 1)
            self.solve(solves.BASIS, done, False)
            for i in tracked:
                self.product(i, 0)
            self.solve(solves.RITZ, done, False)
        for i in live:
            c, f = self.scalar(i, "CHANGE"), self.scalar(i, "FACTOR")
            if c != 0 or f != 1:
                u, v = self.scratch[i]["LEFT_VECTORS"][:, 0], self.scratch[i]["RIGHT_VECTORS"][:, 0]
                weight = self.matrices[i].weight
                weight.copy_(weight.float() * f + c * u[:, None] * v)
        for i in tracked:
            self.product(i, 1)
        self.solve(solves.BASIS, 0, True)
        for matrix in self.matrices:
            matrix.state[STEP] += 1

    def halves_step(self, rounds: int) -> None:
        last = 2 * (rounds - 1)
        for half in range(last + 1):
            for i, matrix in enumerate(self.matrices):
                if not matrix.complete:
                    self.product(i, (matrix.state[STEP] + half) % 2)
            self.solve(solves.TURN, half, half == last)
        for matrix in self.matrices:
            matrix.state[STEP] += 1


def spectrum(rows: int, columns: int, values: Tensor, seed: int) -> Tensor:
    q = [
        torch.linalg.qr(torch.randn(n, len(values), generator=generator(seed + n), dtype=torch.float64, device="cpu"))[
            0
        ]
        for n in (rows, columns)
    ]
    return ((q[0] * values.cpu()) @ q[1].mT).float().to(DEVICE)


def decaying(rows: int, columns: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return spectrum(rows, columns, scale * torch.logspace(0, -1.5, min(rows, columns), dtype=torch.float64), seed)


def matrix_of(weight: Tensor, tracker: str, **options: Any) -> Matrix:
    group = {**GROUP, **options}
    columns = (pairs if tracker == "pairs" else halves).basis_columns(group["block"])
    return matrices_of(torch.nn.Parameter(weight), group, {}, columns)[0]


def twin(matrix: Matrix) -> Matrix:
    """The same weight and state in other memory, laid out alike."""
    param = matrix.param.detach()
    fresh = torch.empty_strided(param.shape, param.stride(), dtype=param.dtype, device=param.device).copy_(param)
    state = {key: value.clone() if isinstance(value, Tensor) else value for key, value in matrix.state.items()}
    columns = matrix.columns
    again = matrices_of(torch.nn.Parameter(fresh), dict(matrix.group), state, columns)[0]
    assert again.columns == columns and again.flipped == matrix.flipped
    return again


def begin(matrix: Matrix, tracker: str, count: int = 0, residual: float = math.inf) -> None:
    """State as after ``count`` steps: an arbitrary orthonormal basis, probes of another weight."""
    common.restart(matrix)
    stats, random = matrix.state[STATS], generator(7 + count)
    if not matrix.complete:
        m, n = matrix.weight.shape
        k, a = matrix.columns, probe_columns(matrix.block)
        size = matrix.weight.float().nan_to_num(0, 0, 0).abs().max().item() * 0.3
        blocks = {
            length: torch.linalg.qr(torch.randn(length, k, generator=random, dtype=torch.float64, device="cpu"))[0]
            .float()
            .contiguous()
            .to(DEVICE)
            for length in (m, n)
        }
        probes = {length: torch.randn(length, a, generator=random, device="cpu").to(DEVICE) * size for length in (m, n)}
        if tracker == "pairs":
            matrix.state[BLOCK], matrix.state[PROBE] = blocks[n], probes[n]
        else:
            matrix.state[LEFT], matrix.state[RIGHT] = (torch.cat([blocks[x], probes[x]], 1) for x in (m, n))
    stats[Stat.RESIDUAL], stats[Stat.COUNT] = residual, count
    matrix.state[STEP] = count


def advance(matrix: Matrix, tracker: str, rounds: int) -> tuple[Matrix, Any]:
    """The same step on the torch reference, alone in its list; ``rounds`` as a device enqueues them."""
    if tracker == "halves":
        return matrix, halves.step([matrix])
    pairs.step([matrix], NormScale().correction([matrix], Gate()))
    return matrix, None


def both(matrices: Sequence[Matrix], tracker: str, rounds: int, monkeypatch) -> tuple[Records, list[Matrix], list[Any]]:
    """Each matrix after one step of the kernel, and a twin of it after the reference's."""
    monkeypatch.setenv("SPECOPT_BACKEND", "reference")
    monkeypatch.setattr(subspace, "_on_host", lambda like: False)  # the same operations as on a device
    twins = [twin(matrix) for matrix in matrices]
    records = Records(matrices, tracker)
    getattr(records, f"{tracker}_step")(rounds)
    first = [advance(matrix, tracker, rounds)[1] for matrix in twins]
    return records, twins, first


def span_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found @ found.mT - expected @ expected.mT).norm() / math.sqrt(expected.shape[1]))


def assert_same_state(found: Matrix, expected: Matrix, tolerance: float = 2e-4) -> None:
    torch.testing.assert_close(
        found.state[STATS], expected.state[STATS], rtol=tolerance, atol=tolerance, equal_nan=True
    )
    sigma = expected.state[STATS][Stat.SIGMA]
    torch.testing.assert_close(found.state[STATS][Stat.SIGMA], sigma, rtol=1e-5, atol=0.0, equal_nan=True)
    torch.testing.assert_close(
        found.state[STATS][Stat.TOP], expected.state[STATS][Stat.TOP], rtol=1e-5, atol=0.0, equal_nan=True
    )
    assert found.state[STEP] == expected.state[STEP] == found.state[STATS][Stat.COUNT]
    k = found.columns
    for key in (BLOCK, LEFT, RIGHT):
        if key in expected.state:
            new, old = found.state[key], expected.state[key]
            assert new.isfinite().all()
            assert span_error(new[:, :k], old[:, :k]) < 20 * tolerance, key
            assert (new[:, :k].mT @ new[:, :k] - old[:, :k].mT @ old[:, :k]).abs().max() < 1e-5
            torch.testing.assert_close(
                new[:, k:], old[:, k:], rtol=1e-4, atol=1e-5 * float(old[:, k:].abs().max() if old.shape[1] > k else 0)
            )
    if PROBE in expected.state and expected.state[PROBE].numel():
        new, old = found.state[PROBE], expected.state[PROBE]
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-5 * float(old.abs().max()))


def assert_same_weight(found: Matrix, expected: Matrix) -> None:
    size = float(expected.weight.float().nan_to_num().abs().max())
    torch.testing.assert_close(
        found.weight.float(), expected.weight.float(), rtol=1e-5, atol=3e-5 * size, equal_nan=True
    )


TRACKERS = pytest.mark.parametrize("tracker", ["pairs", "halves"])


def check(matrices: Sequence[Matrix], tracker: str, rounds: int, monkeypatch) -> Records:
    records, twins, first = both(matrices, tracker, rounds, monkeypatch)
    for i, (found, expected) in enumerate(zip(matrices, twins, strict=True)):
        assert_same_state(found, expected)
        assert_same_weight(found, expected)
        if tracker == "halves" and first[i].valid:
            triplet = [block[0][:, 0] for block in (first[i].lefts, first[i].rights)]
            sides = [records.scratch[i][f"{side}_VECTORS"][:, 0] for side in ("LEFT", "RIGHT")]
            sign = torch.sign(triplet[0] @ sides[0])
            for side, vector in zip(sides, triplet, strict=True):
                torch.testing.assert_close(side, sign * vector, rtol=1e-3, atol=1e-4)
            penalty = expected.group["snr_lambda"] * first[i].sigma[0]
            torch.testing.assert_close(records.scalar(i, "PENALTY"), penalty, rtol=1e-5, atol=0.0)
        elif tracker == "halves":
            assert records.scalar(i, "PENALTY") == 0
    return records


def warm(weight: Tensor, tracker: str, count: int = 20, top: float = 0.4, **options: Any) -> Matrix:
    matrix = matrix_of(weight, tracker, **options)
    begin(matrix, tracker, count, residual=1e-3)
    matrix.state[STATS][Stat.TOP] = top
    return matrix
