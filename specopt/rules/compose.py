"""Several rules on one weight, with one tracker."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from specopt.kernels import Penalty, Triplets

from .. import options
from ..session import Gate, Session
from ..tracker import pairs
from ..tracker.common import LEFT, RIGHT, STATS, STEP, Stat, gather_stats, scatter_stats
from ..tracker.measure import measured_triplets
from ..views import Matrix, block_of, scaling
from .decay import SpectralDecay
from .norm_scale import NormScale
from .penalty import SpectralPenalty, strengths
from .steering import InitialNorms
from .whole import cap_all, frobenius_factors

Kind = TypeVar("Kind")


@dataclass(frozen=True, repr=False)
class Compose:
    """Rules for one and the same weights, in this order.

    The penalty acts on the gradient, with the first triplet of the weight as the step finds it; decay and scaling act
    on the weight that the base update leaves, each on what the one before it made of the singular values. All read one
    tracker, that of pairs: after a correction the product ``Z = Wᵀ U`` of the corrected weight is there, and its first
    triplet is kept for the next step's penalty. (Where a cap has crowded the top, its σ is up to 1 % low.) So the
    weight is read no more often than under the last rule alone. The penalty's product is made anew where somebody else
    wrote to the weight in between, and after ``rank="full"``. (A write through ``.data`` cannot be seen, and a loaded
    state is taken for that of the weights it comes with: the penalty of one step is then that of the weight before.)

    Under ``norm="frobenius"`` the tracker follows for the penalty, and the norm is one more read of the weight.

    Args:
        rules: of :class:`specopt.SpectralPenalty`, :class:`specopt.SpectralDecay` and :class:`specopt.NormScale` at
            most one each. Options that all rules have (``block``, ``tolerance``, ...) count if one of them sets them.

    Raises:
        TypeError: what is not such a rule.
        ValueError: less than two rules or two of a kind; an option that two of them set otherwise; ``rank="full"``
            before another correction; ``norm="frobenius"`` beside a decay, which would need it measured again.

    Example::

        rule = specopt.Compose(specopt.SpectralPenalty(0.01), specopt.NormScale(mode="cap"))
        optimizer = specopt.wrap(torch.optim.AdamW(model.parameters()), rule)
    """

    rules: tuple[SpectralPenalty | SpectralDecay | NormScale, ...]

    def __init__(self, *rules: SpectralPenalty | SpectralDecay | NormScale) -> None:
        object.__setattr__(self, "rules", rules)
        for rule in rules:
            if not isinstance(rule, SpectralPenalty | SpectralDecay | NormScale):
                raise TypeError(f"rules must be SpectralPenalty, SpectralDecay or NormScale, got {rule!r}")
        if len(rules) < 2 or len({type(rule) for rule in rules}) < len(rules):
            raise ValueError(f"rules must be two or more, each of another kind, got {self!r}")
        self.check(self.options)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.rules))})"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for rule in self.rules for name in rule.names))

    @property
    def options(self) -> dict[str, Any]:
        merged = {name: value for rule in self.rules for name, value in rule.options.items()}
        for field in fields(options.Shared):
            given = {repr(v): v for rule in self.rules if (v := rule.options[field.name]) != field.default}
            if len(given) > 1:
                raise ValueError(f"{field.name} must be the same in all rules that set it, got {', '.join(given)}")
            merged[field.name] = next(iter(given.values()), field.default)
        return merged

    def check(self, group: Mapping[str, Any]) -> None:
        for rule in self.rules:
            rule.check(group)
        if find(self, NormScale) is None:
            return
        if group["every"] > 1 and group["rank"] != "full":
            raise ValueError(
                f"every must be 1 with rank={group['rank']!r} beside other rules, got {group['every']!r}: their "
                "tracker looks at every step"
            )
        if find(self, SpectralDecay) is not None and group["norm"] == "frobenius":
            raise ValueError("norm must be 'spectral' beside SpectralDecay, got 'frobenius'")
        if group["rank"] == "full" and not isinstance(self.rules[-1], NormScale | SpectralPenalty):
            raise ValueError(
                "a NormScale with rank='full' must be the last correction, but SpectralDecay comes after it"
            )

    def is_on(self, group: Mapping[str, Any]) -> bool:
        return any(rule.is_on(group) for rule in self.rules)

    def columns(self, group: Mapping[str, Any]) -> int:
        return pairs.basis_columns(block_of(group))

    def has_state(self, matrix: Matrix) -> bool:
        return pairs.has_first(matrix) if self.keeps_first(matrix.group) else pairs.has_state(matrix)

    def period(self, group: Mapping[str, Any]) -> int:
        return 1

    def is_fused(self, matrix: Matrix) -> bool:
        return False

    def sort(self, matrix: Matrix) -> Hashable:
        return scaling(matrix.group, "norm", None), scaling(matrix.group, "rank", None), self.penalizes(matrix.group)

    def takes_along(self, matrix: Matrix) -> bool:
        return False

    def begin(self, matrices: Sequence[Matrix], gate: Gate) -> Session:
        return _Composed(self, matrices, gate)

    def penalizes(self, group: Mapping[str, Any]) -> bool:
        penalty = find(self, SpectralPenalty)
        return penalty is not None and penalty.is_on(group)

    def keeps_first(self, group: Mapping[str, Any]) -> bool:
        """Whether a step leaves a triplet for the next one's penalty: not where the whole matrix is capped after it."""
        return self.penalizes(group) and scaling(group, "rank", None) != "full"


def find(rule: object, kind: type[Kind]) -> Kind | None:
    """The rule of a kind that ``rule`` is or has in it."""
    if isinstance(rule, Compose):
        return next((part for part in rule.rules if isinstance(part, kind)), None)
    return rule if isinstance(rule, kind) else None


class _Composed:
    """The session: matrices of one sort."""

    writes = True

    def __init__(self, rule: Compose, matrices: Sequence[Matrix], gate: Gate) -> None:
        self.matrices, self.gate = matrices, gate
        group = matrices[0].group
        scales = find(rule, NormScale) is not None
        self.is_full = scales and group["rank"] == "full"
        self.keeps_first = rule.keeps_first(group)
        self.initial = InitialNorms(matrices) if scales else None
        self.correct = Corrections(rule, matrices, gate)
        new = [matrix for matrix in matrices if not pairs.has_state(matrix)]
        self.penalty = self._penalty() if rule.penalizes(group) else None
        self.start = pairs.Start(new) if new else None

    def finish(self) -> None:
        if self.initial is not None:
            self.initial.note()
        if self.start is not None:
            self.start.finish()
        if self.keeps_first:
            pairs.make_room(self.matrices)
            self.gate.written += [matrix.param for matrix in self.matrices]
        else:
            pairs.drop_first(self.matrices)
        pairs.step(self.matrices, self.correct, self.correct.reach, keep_first=self.keeps_first)
        due = [m for m in self.matrices if self.is_full and (m.state[STEP] - 1) % m.group["every"] == 0]
        if due:
            stats = gather_stats(due)
            stats[:, Stat.VALID] = cap_all(due, stats, self.gate, wild=any(m.state[STEP] == 1 for m in due))
            scatter_stats(due, stats)

    def _penalty(self) -> Penalty:
        """With the triplets that the last step has left; measured anew where there are none that hold."""
        sources: dict[Any, list[int]] = {}
        for i, matrix in enumerate(self.matrices):
            source = pairs.first_triplets if pairs.has_state(matrix) else measured_triplets
            sources.setdefault(_kept_triplets if self._has_kept(matrix) else source, []).append(i)
        first: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for source, chosen in sources.items():
            made = source([self.matrices[i] for i in chosen])
            triplets = zip(made.sigma[:, 0], made.lefts, made.rights, strict=True)
            first |= dict(zip(chosen, triplets, strict=True))
        sigmas, lefts, rights = zip(*(first[i] for i in range(len(self.matrices))), strict=True)
        sigma = torch.stack(sigmas)
        sigma = torch.where(sigma.isfinite(), sigma, 0.0)
        return Penalty(strengths(self.matrices, sigma) * sigma, lefts, rights)

    def _has_kept(self, matrix: Matrix) -> bool:
        """Whether the triplet in the state is the weight's: nobody has written to it since, as far as is known."""
        version = self.gate.workspace.get("versions", {}).get(id(matrix.param), matrix.param._version)
        return self.keeps_first and pairs.has_first(matrix) and version == matrix.param._version


class Corrections:
    """All corrections as one: each sees the singular values as those before it have left them, by size."""

    def __init__(self, rule: Compose, matrices: Sequence[Matrix], gate: Gate) -> None:
        self.matrices, self.gate = matrices, gate
        self.norm: Tensor | None = None
        """``‖W‖_F`` (B,), where it is known."""
        self.parts: list[tuple[pairs.Correct, int]] = []
        group = matrices[0].group
        for part in rule.rules:
            if isinstance(part, NormScale) and group["norm"] == "frobenius":
                self.parts.append((self._scale_frobenius, 1))
            elif isinstance(part, SpectralDecay) or (isinstance(part, NormScale) and group["rank"] != "full"):
                self.parts.append((part.correction(matrices, gate), part.reach(matrices)))
        self.reach = max(1, sum(reach for _, reach in self.parts))
        """The most triplets that they may change."""

    def __call__(self, found: pairs.Found) -> pairs.Change:
        sigma = found.sigma[:, : self.reach]
        added, factor = torch.zeros_like(sigma), None
        for correct, _ in self.parts:
            signed = pairs.Change(added, factor).of(sigma)  # a decay by more than the whole turns a direction round
            now, order = signed.abs().sort(dim=1, descending=True, stable=True)
            change = correct(found._replace(sigma=now))
            if change.factor is not None:
                added = added * change.factor[:, None]
                factor = change.factor if factor is None else factor * change.factor
            changed = order[:, : change.added.shape[1]]
            turned = torch.where(signed.gather(1, changed) < 0, -change.added, change.added)
            added = added.scatter_add(1, changed, turned)
        return pairs.Change(added, factor)

    def _scale_frobenius(self, found: pairs.Found) -> pairs.Change:
        _, factors = frobenius_factors(self.matrices, found.stats, self.gate, self.norm)
        return pairs.Change(torch.zeros_like(found.sigma[:, :1]), factors)


def _kept_triplets(matrices: Sequence[Matrix]) -> Triplets:
    sigma = torch.stack([matrix.state[STATS][Stat.TOP] for matrix in matrices])[:, None]
    return Triplets(sigma, *([matrix.state[key] for matrix in matrices] for key in (LEFT, RIGHT)))
