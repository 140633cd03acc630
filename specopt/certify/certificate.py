"""What :func:`specopt.certify` returns."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..columns import in_columns


@dataclass(frozen=True)
class CertificateRow:
    """One layer, or one matrix of it where a weight packs several (query, key and value; gates)."""

    name: str
    """The parameter's, as :func:`specopt.spectral_report` has it: ``0.weight``, ``attention.in_proj_weight[0]``."""
    kind: str
    shape: tuple[int, ...]
    """``(out, in, *kernel)``, whatever order the parameter has; of a grouped convolution all groups' out, and in of one
    of them."""
    bound: float | None
    """The spectral norm of the layer as a map of its input is at most this; of a convolution, as an operator, bias
    aside. inf where the weight has a non-finite entry, None where nothing tells what the layer computes."""
    how: str
    """Where the bound is from."""
    matrix_bound: float | None
    """The same of the matrix view ``(out, in·k·k)``, of which trackers speak; the largest of several groups."""
    tracked: float | None
    """An estimate of σ₁ of what ``tracked_of`` names: what the optimizer tracks or, without it, a power iteration
    found."""
    tracked_by: str
    """"tracker" or "measured"."""
    tracked_of: str = "matrix"
    """"matrix": that of ``matrix_bound``. "operator on 32x32": a convolution under ``conv="operator"``, for the size of
    input that the optimizer tracks it for."""

    @property
    def ratio(self) -> float | None:
        """Of like to like, 1 where the norm is known well: ``matrix_bound / tracked``, and ``bound / tracked`` where an
        operator is tracked."""
        bound = self.matrix_bound if self.tracked_of == "matrix" else self.bound
        if bound is None or self.tracked is None:
            return None
        if bound == self.tracked:
            return 1.0
        return bound / self.tracked if self.tracked else math.inf

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


@dataclass(frozen=True)
class Certificate:
    """Bounds on a model, as it is now."""

    rows: tuple[CertificateRow, ...]
    lipschitz: float | None
    """``‖f(x) − f(y)‖₂ <= lipschitz · ‖x − y‖₂`` for all x, y of the sizes given (of any sizes, if none were), over all
    inputs and all outputs together; in exact arithmetic. None where :attr:`unknown` says why."""
    unknown: tuple[str, ...]
    """What no constant is known of, by name, with the reason. Nothing is left out of the bound silently."""
    inputs: tuple[tuple[int, ...], ...] | None = None
    """Shapes of the inputs that were given."""

    def table(self) -> str:
        """A line for each row, then the network's bound."""
        head = ("name", "kind", "shape", "bound", "matrix bound", "tracked", "of", "ratio", "how")
        return "\n".join([in_columns([head, *map(_cells, self.rows)]), "", *self._ending()])

    def _ending(self) -> list[str]:
        given = "any sizes" if self.inputs is None else ", ".join(map(str, self.inputs))
        if self.lipschitz is not None:
            return [f"Lipschitz bound of the network (l2, {given}): {self.lipschitz:.6g}"]
        return ["Lipschitz bound of the network: unknown, because of", *(f"  {reason}" for reason in self.unknown)]

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Of numbers, strings, lists and dicts."""
        return {
            "rows": [row.to_dict() for row in self.rows],
            "lipschitz": self.lipschitz,
            "unknown": list(self.unknown),
            "inputs": None if self.inputs is None else [list(shape) for shape in self.inputs],
        }


def _cells(row: CertificateRow) -> tuple[str, ...]:
    shape = "x".join(map(str, row.shape))
    tracked = _number(row.tracked) + (" *" if row.tracked is not None and row.tracked_by == "tracker" else "")
    return (
        row.name,
        row.kind,
        shape,
        _number(row.bound),
        _number(row.matrix_bound),
        tracked,
        "-" if row.tracked is None else row.tracked_of,
        _number(row.ratio),
        row.how,
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
