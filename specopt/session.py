"""What an optimizer and a rule say to one another in a step: the protocol of rules, their sessions, and the gate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from specopt.kernels import Penalty

from .tracker.common import HostCopy, constant
from .tracker.device import BaseUpdate
from .updates import rate_of
from .views import Matrix


class Ruled(Protocol):
    """An optimizer under a rule."""

    state: defaultdict[Tensor, Any]
    param_groups: list[dict[str, Any]]
    base_is_known: ClassVar[bool]

    @property
    def rule(self) -> Rule: ...

    def names(self) -> Mapping[Tensor, str]: ...


class Controlled(Protocol):
    """A matrix, or a kernel that is controlled as an operator."""

    @property
    def param(self) -> Tensor: ...

    @property
    def group(self) -> dict[str, Any]: ...

    @property
    def state(self) -> MutableMapping[str, Any]: ...

    @property
    def piece(self) -> Tensor:
        """As ``(out, in, *kernel)``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the whole piece, where it is sharded."""

    @property
    def suffix(self) -> str:
        """What follows the parameter's name."""


class Rule(Protocol):
    """What an optimizer asks of a rule."""

    @property
    def names(self) -> tuple[str, ...]:
        """The group options it reads."""

    @property
    def options(self) -> dict[str, Any]:
        """Their values in groups that say nothing else."""

    def check(self, group: Mapping[str, Any]) -> None:
        """Raises ValueError for an option that makes no sense."""

    def is_on(self, group: Mapping[str, Any]) -> bool:
        """False where the options ask for nothing, so that nothing needs to be tracked."""

    def columns(self, group: Mapping[str, Any]) -> int:
        """The most columns that a matrix' block takes."""

    def period(self, group: Mapping[str, Any]) -> int:
        """Of so many steps the rule acts in the first, and the base optimizer makes the others alone."""

    def begin(self, matrices: Sequence[Matrix], gate: Gate) -> Session:
        """What comes before the base update of a list of matrices; they share device, accumulation dtype and kind
        (complete or tracked)."""

    def has_state(self, matrix: Matrix) -> bool:
        """Whether the matrix' tracker can go on from its state."""

    def is_fused(self, matrix: Matrix) -> bool:
        """Whether a device's launches over all matrices (:mod:`specopt.tracker.device`) control it. All else goes by
        operations on lists of matrices."""

    def sort(self, matrix: Matrix) -> Hashable:
        """Matrices of different sorts are not for one session."""

    def takes_along(self, matrix: Matrix) -> bool:
        """Whether its passes on a device can make the matrix' base update as well."""


class Session(Protocol):
    """The control of some matrices in one step, from before the base update to after it."""

    @property
    def penalty(self) -> Penalty | None:
        """What their gradients gain for the base update."""

    @property
    def writes(self) -> bool:
        """Whether :meth:`finish` may change the weights."""

    def finish(self) -> None:
        """What comes after the base update."""


class Resting:
    """A step of the base optimizer alone."""

    penalty: Penalty | None = None
    writes = False

    def finish(self) -> None:
        pass


class OnDevice(Session, Protocol):
    """A session whose passes can make the base update as well."""

    def update(self) -> None:
        """The base update given in :attr:`Gate.base`."""


@dataclass
class Gate:
    """Whether and how a step counts, and what it has to tell the host once the device has got that far."""

    found_inf: Tensor | None = None
    """Left by a gradient scaler with ``fused=True``: non-zero where the base update skips."""
    grad_scale: Tensor | None = None
    """Likewise: what the gradients are still multiplied by."""
    ratios: list[tuple[Sequence[Controlled], HostCopy]] = field(default_factory=list)
    """Matrices in their first step, and the norm found over its target (1 where it was not pulled there)."""
    written: list[Tensor] = field(default_factory=list)
    """Weights of which the next step has to know whether anybody has written to them after this one."""
    workspace: dict[Any, Any] = field(default_factory=dict)
    """The optimizer's, for what is kept between steps and is no state."""
    settled: bool = False
    """The matrices are those of the step before, and all have state."""
    base: BaseUpdate | None = None
    """The base update, where a pass on the device is to make it."""

    def open(self, matrices: Sequence[Controlled], like: Tensor) -> Tensor:
        """1 (B,) where weights may be changed, else 0; decided on the device where lr lives there."""
        rates: list[Any] = [rate_of(matrix.group) for matrix in matrices]
        on_device = [rate for rate in rates if isinstance(rate, Tensor) and rate.device.type != "cpu"]
        if on_device:
            rates = [r.reshape(()).to(like) if isinstance(r, Tensor) else like.new_full((), r) for r in rates]
            gate = (torch.stack(rates) != 0).to(like.dtype)
        else:
            gate = constant([float(float(rate) != 0) for rate in rates], like)
        return gate if self.found_inf is None else gate * (self.found_inf.to(like.device, like.dtype) == 0)

    @property
    def is_shut(self) -> bool:
        """True where the host may see that the step is to be skipped."""
        return self.found_inf is not None and self.found_inf.device.type == "cpu" and bool(self.found_inf)

    @property
    def is_undecided(self) -> bool:
        """True where only the device knows whether the step is to be skipped."""
        return self.found_inf is not None and self.found_inf.device.type != "cpu"

    def seen(self) -> Gate:
        """The same with what the device knows of it waited for: a step of sharded weights, whose ranks go by what they
        read on the host, would have sums under way when its state is put back."""
        assert self.found_inf is not None
        return replace(self, found_inf=self.found_inf.to("cpu", copy=True))

    @property
    def host_scale(self) -> float:
        return 1.0 if self.grad_scale is None else float(self.grad_scale)

    def scaler(self, device: torch.device) -> dict[str, Tensor | None]:
        """What a gradient scaler has left, as a pass takes it."""
        given = {"found_inf": self.found_inf, "grad_scale": self.grad_scale}
        return {name: None if t is None else t.to(device, torch.float32) for name, t in given.items()}

    def gradient_scale(self, like: Tensor) -> Tensor | float:
        return 1.0 if self.grad_scale is None else self.grad_scale.to(like.device, like.dtype)
