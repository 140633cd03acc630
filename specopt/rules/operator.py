"""Rules for convolutions as operators, ``conv="operator"``: the same as for matrices, for the norm σ(K) of the map that
a kernel K makes of inputs of one size.

With (σ, u, v) the map's largest singular triplet, ``dσ/dK`` is the weight gradient of ``⟨u, A v⟩``:

- penalty: the gradient gains ``λ σ dσ/dK``;
- decay: ``K ← K − lr λ σ dσ/dK`` after the base update;
- ``mode="rescale"``: ``K ← K σ*/σ``; ``mode="cap"``: the same where ``σ > σ*``.

A cap rescales the whole kernel, for it has to hold. σ is convex in K, so the least change that reaches σ* to first
order, ``K' = K − (σ − σ*) g / ‖g‖²`` with ``g = dσ/dK``, leaves ``σ(K') ≥ σ + ⟨g, K' − K⟩ = σ*``: never below, and
above wherever another triplet is near, which in a convolution (a sampled curve of singular values) is always. Scaling
is exact in one step, because σ is homogeneous, and leaves the ratios of the spectrum as the base update made them. What
it costs, that all directions shrink with the first, a penalty or decay avoids.

``mode="set"`` is refused: ``W + (σ* − σ) u vᵀ`` is no convolution of the kernel's shape.

A kernel that is cut up over ranks is gathered before it is looked at: before the base update where the penalty asks for
it, and in the first step; after it where it may be corrected. Every rank then follows the whole of it by itself, from
the same bits to the same state, and writes its own part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from specopt.kernels import accumulation_dtype

from ..operators import COLD, START, WARM, ConvOperator, Effort, Geometry, follow, parse, start
from ..operators.tracker import columns_of
from ..session import Gate, Ruled
from ..sharding.exchange import Exchange
from ..sharding.gathering import Whole, gather, meet
from ..targets import target_sigma
from ..tracker.common import (
    BLOCK,
    COLD_STEPS,
    LEFT,
    LOST,
    PREFIX,
    PROBE,
    RIGHT,
    STATS,
    STEP,
    HostCopy,
    Stat,
    move_on,
    wait_of,
)
from ..updates import is_on_device, rate_of
from ..views import could_be_controlled, scaling
from .steering import factor_to, norm_to_keep

OPERATOR, INITIAL = PREFIX + "operator", PREFIX + "initial_operator"
"""State keys: the block that follows the operator's norm, and the norm noted for ``target="initial"``."""


@dataclass(frozen=True)
class Kernel:
    """A convolution's kernel under operator control in one step."""

    param: Tensor
    group: dict[str, Any]
    state: MutableMapping[str, Any]
    geometry: Geometry
    place: int
    """In its group."""
    whole: Whole
    suffix = ""

    @property
    def operator(self) -> ConvOperator:
        """As the kernel is now; of one that is cut up, as it was gathered."""
        return ConvOperator.of(self.whole.values, self.geometry)

    @property
    def piece(self) -> Tensor:
        """The kernel of one group of channels, ``(out, in, *k)``."""
        part = self.whole.values.narrow(0, 0, self.param.shape[0] // self.geometry.groups)
        return part.transpose(0, 1) if self.geometry.transposed else part

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.piece.shape)

    @property
    def period(self) -> int:
        """Of so many steps the rule acts in the first."""
        return int(scaling(self.group, "every", 1))

    @property
    def wait(self) -> int:
        """Steps that the base optimizer still makes alone."""
        return wait_of(self.state, self.period) if has_state(self) else 0


def geometries_in(group: Mapping[str, Any]) -> dict[int, Geometry]:
    """By ``id`` of the parameter, what a group controls as operators."""
    given = group.get("geometry")
    if group.get("conv") != "operator" or not group["spectral"] or not given:
        return {}
    return {id(p): parse(text) for p, text in zip(group["params"], given, strict=True) if text is not None}


def kernels_of(optimizer: Ruled, *, with_grad: bool = True) -> list[Kernel]:
    """Those that have a gradient alone, or all."""
    return list(_kernels(optimizer, with_grad))


def _kernels(optimizer: Ruled, with_grad: bool) -> Iterator[Kernel]:
    for group in optimizer.param_groups:
        found = geometries_in(group) if optimizer.rule.is_on(group) else {}
        for place, param in enumerate(group["params"]) if found else ():
            if id(param) in found and not (with_grad and param.grad is None):
                state = optimizer.state[param] if with_grad else optimizer.state.get(param, {})
                yield Kernel(param, group, state, found[id(param)], place, Whole(param))


def check_kernels(group: Mapping[str, Any], names: Callable[[], Mapping[Tensor, str]]) -> None:
    """Whether every convolution of a group that is to be an operator is one.

    Raises:
        ValueError: no geometry, one that does not fit, or more or fewer of them than parameters; names the parameter.
    """
    if group.get("conv") != "operator" or not group["spectral"]:
        return
    given, params = group["geometry"], group["params"]
    if given is None:
        for param in params:
            if param.ndim > 2:
                raise ValueError(
                    f"{names()[param]} of shape {tuple(param.shape)} needs a geometry with conv='operator', which "
                    "holds the size of its input: make the groups with specopt.param_groups(model, conv='operator', "
                    "...)"
                )
        return
    if len(given) != len(params):
        raise ValueError(f"geometry must have an entry for each of {len(params)} params, got {len(given)}")
    for param, text in zip(params, given, strict=True):
        if text is None:
            continue
        if not could_be_controlled(param):
            raise ValueError(f"{names()[param]} must be a dense real kernel, got {param.dtype}, {tuple(param.shape)}")
        try:
            parse(text).check_kernel(tuple(param.shape))
        except ValueError as error:
            raise ValueError(f"{names()[param]}: {error}") from None


class OperatorSession:
    """The control of kernels in one step, from before the base update to after it."""

    def __init__(self, everyone: Sequence[Kernel], names: Sequence[str], gate: Gate) -> None:
        self.everyone, self.names, self.gate = everyone, names, gate
        self.kernels = [kernel for kernel in everyone if kernel.wait == 0]
        """Those that are looked at in this step."""
        self.kept: list[tuple[MutableMapping[str, Any], dict[str, Tensor]]] = []
        self.gradients: dict[Tensor, Tensor] = {}
        """What the base update is to see in place of the parameters' own gradients, once :meth:`before` is through."""
        meet([kernel.whole for kernel in everyone])

    @property
    def is_sharded(self) -> bool:
        """Whether ranks have to meet for it."""
        return any(kernel.whole.sharers is not None for kernel in self.kernels)

    def before(self) -> Exchange[None]:
        """What comes before the base update."""
        wanted = self.kernels if "snr_lambda" in self.names else [k for k in self.kernels if self._is_new(k)]
        yield from gather([kernel.whole for kernel in wanted])
        for kernel in wanted:
            if not has_state(kernel):
                _begin(kernel)
        self.kept = [_copies(kernel) for kernel in self.kernels if self.gate.is_undecided]
        for seen in look([kernel for kernel in wanted if self._lacks_target(kernel)]):
            seen.kernel.state[INITIAL] = norm_to_keep(seen.sigma)
        for seen in look(wanted) if "snr_lambda" in self.names else ():
            self.gradients[seen.kernel.param] = self._penalized(seen)

    def after(self) -> Exchange[None]:
        """After the base update: in the order of the rules, each on what the one before it has left."""
        acts = {"decay_lambda": self._decay, "mode": self._scale}
        chosen = [acts[name] for name in self.names if name in acts]
        if chosen:
            yield from gather([kernel.whole for kernel in self.kernels])
        for act in chosen:
            for seen in look(self.kernels):
                act(seen)
        for kernel in self.kernels:
            kernel.state[STATS][Stat.COUNT] += 1
            kernel.state[STEP] += 1
        for kernel in self.everyone:
            move_on([kernel.state], kernel.wait, kernel.period)
        for state, copies in self.kept:
            skipped = cast(Tensor, self.gate.found_inf).reshape(()) != 0
            for key, value in copies.items():
                state[key].copy_(torch.where(skipped.to(value.device), value, state[key]))

    def _is_new(self, kernel: Kernel) -> bool:
        """Its state is to begin with the kernel as it is found."""
        return self._lacks_target(kernel) or not has_state(kernel)

    def _lacks_target(self, kernel: Kernel) -> bool:
        return "mode" in self.names and _target(kernel) == "initial" and INITIAL not in kernel.state

    def _penalized(self, seen: Seen) -> Tensor:
        """The gradient, with ``λ σ dσ/dK`` at the scale that it has."""
        group = seen.kernel.group
        sign = -1.0 if group.get("maximize") else 1.0  # the penalty is minimized all the same
        strength = sign * float(group["snr_lambda"]) * self.gate.gradient_scale(seen.sigma)
        gained = torch.where(seen.valid, strength * seen.sigma * seen.slope(), 0.0)
        return seen.kernel.whole.gradient_with(gained)

    def _decay(self, seen: Seen) -> None:
        rate = rate_of(seen.kernel.group)
        rate = rate.to(seen.sigma) if isinstance(rate, Tensor) and is_on_device(rate) else float(rate)
        part = rate * float(seen.kernel.group["decay_lambda"]) * self.gate.open([seen.kernel], seen.sigma)[0]
        allowed = seen.valid & (part > 0)
        seen.kernel.whole.store(torch.where(allowed, seen.weight - part * seen.sigma * seen.slope(), seen.weight))

    def _scale(self, seen: Seen) -> None:
        kernel, sigma, stats = seen.kernel, seen.sigma, seen.kernel.state[STATS]
        target, small = target_of(kernel, sigma), bool(kernel.group["raise_small"])
        capped = (stats[Stat.CAPPED] > 0) & ~(sigma >= target) & (not small)
        stats[Stat.CAPPED] = capped.to(stats.dtype)
        moves = seen.valid & (sigma > 0) & ~target.isnan()
        moves = moves & ((sigma > target) | (~capped & (kernel.group["mode"] == "rescale")))
        if kernel.state[STEP] == 0:
            pulled = moves & (kernel.group["mode"] == "rescale")
            self.gate.ratios.append(([kernel], HostCopy.of(torch.where(pulled, sigma / target, 1.0)[None])))
        moves = moves & (self.gate.open([kernel], sigma)[0] > 0)
        factor = factor_to(target, sigma, moves)
        stats[Stat.TOP] = sigma * factor
        kernel.whole.store(seen.weight * factor)


class Seen(NamedTuple):
    """The triplet of one kernel as it is now."""

    kernel: Kernel
    sigma: Tensor
    residual: Tensor
    left: Tensor
    right: Tensor

    @property
    def valid(self) -> Tensor:
        return self.sigma.isfinite()

    @property
    def weight(self) -> Tensor:
        return self.kernel.whole.values.to(self.sigma.dtype)

    def slope(self) -> Tensor:
        """``dσ/dK``."""
        return self.kernel.operator.kernel_gradient(self.left, self.right)


def look(kernels: Sequence[Kernel], effort: Effort | None = None) -> list[Seen]:
    """The triplets of kernels with state, which is moved on and takes the numbers down."""
    together: dict[Any, list[Kernel]] = {}
    for kernel in kernels:
        kind = accumulation_dtype(kernel.param.dtype), kernel.param.device
        together.setdefault((*kind, effort or _effort(kernel), kernel.state[STEP]), []).append(kernel)
    seen: list[Seen] = []
    for (_, _, chosen, step), bucket in together.items():
        operators = [kernel.operator for kernel in bucket]
        found = follow(operators, [kernel.state[OPERATOR] for kernel in bucket], chosen, step)
        valid = found.sigma.isfinite().to(found.sigma.dtype)
        for i, kernel in enumerate(bucket):
            stats = kernel.state[STATS]
            for entry, values in (
                (Stat.SIGMA, found.sigma),
                (Stat.TOP, found.sigma),
                (Stat.RESIDUAL, found.residual),
                (Stat.VALID, valid),
                (Stat.PAIRS, found.pairs),
            ):
                stats[entry] = values[i]
            seen.append(Seen(kernel, found.sigma[i], found.residual[i], found.lefts[i], found.rights[i]))
    return seen


def measured(kernels: Sequence[Kernel]) -> list[tuple[Kernel, Tensor, Tensor]]:
    """(kernel, sigma, residual) from nothing; changes nothing."""
    fresh = [replace(kernel, state={}) for kernel in kernels]
    for kernel in fresh:
        _begin(kernel)
    by_param = {seen.kernel.param: seen for seen in look(fresh, START._replace(residual=1e-3))}
    return [(kernel, by_param[kernel.param].sigma, by_param[kernel.param].residual) for kernel in kernels]


def target_of(kernel: Kernel, like: Tensor) -> Tensor:
    """σ*, of no dimensions."""
    if _target(kernel) == "initial":
        noted = kernel.state.get(INITIAL)
        return like.new_full((), torch.nan) if noted is None else noted.to(like)
    return like.new_full((), target_sigma(kernel.piece.shape, _target(kernel)))


def _target(kernel: Kernel) -> Any:
    """The group's, or its entry for the kernel; of the entries of several groups of channels the largest, as their
    operator's norm is that of the largest."""
    target = kernel.group["target"]
    target = target[kernel.place] if isinstance(target, list) else target
    return max(target) if isinstance(target, list) else target


def block_shape(param: Tensor, geometry: Geometry) -> tuple[int, int]:
    """Of the block in a kernel's state."""
    operator = ConvOperator(param, geometry)
    return torch.Size(operator.input_shape).numel(), columns_of(operator)


def has_state(kernel: Kernel) -> bool:
    """Whether it can be followed on from its state."""
    state, dtype = kernel.state, accumulation_dtype(kernel.param.dtype)
    shapes = {OPERATOR: block_shape(kernel.param, kernel.geometry), STATS: (len(Stat),)}
    return STEP in state and all(
        isinstance(state.get(key), Tensor)
        and (state[key].shape, state[key].dtype, state[key].device) == (shape, dtype, kernel.param.device)
        for key, shape in shapes.items()
    )


def _begin(kernel: Kernel) -> None:
    """Complete state, and none of what a tracker of its matrices has left."""
    for key in (BLOCK, PROBE, LEFT, RIGHT):
        kernel.state.pop(key, None)
    (block,) = start([kernel.operator])
    stats = block.new_zeros(len(Stat))
    stats[Stat.RESIDUAL] = torch.inf
    stats[Stat.CAPPED] = (kernel.whole.values.abs().amax() == 0).to(stats.dtype)
    old = kernel.state.get(STATS)
    if isinstance(old, Tensor) and old.shape[-1:] == stats.shape:  # that it began as zero outlives a restart
        stats[Stat.CAPPED] += old.reshape(-1, len(Stat))[:, Stat.CAPPED].amax().to(stats)
    kernel.state.update({OPERATOR: block, STATS: stats, STEP: 0})


def _effort(kernel: Kernel) -> Effort:
    state, group = kernel.state, kernel.group
    lost = kernel.param.device.type == "cpu" and float(state[STATS][Stat.RESIDUAL]) > LOST
    effort = START if state[STEP] == 0 or lost else COLD if state[STEP] < COLD_STEPS else WARM
    effort = effort._replace(residual=min(effort.residual, group["tolerance"] / 2))
    limit = group["max_passes"]
    if limit is None:
        return effort
    return effort._replace(**{name: min(getattr(effort, name), limit) for name in ("least", "most", "fixed")})


def _copies(kernel: Kernel) -> tuple[MutableMapping[str, Any], dict[str, Tensor]]:
    return kernel.state, {key: kernel.state[key].clone() for key in (OPERATOR, STATS)}
