"""The plumbing between a torch.optim class and a rule."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from specopt.kernels import Update, base_updates_, full_precision

from .base_step import clean_buffers, gradients, out_of_sight, own_entries, penalized, rates_left_on_device
from .batches import Batch, batches_of, has_state, signature_of
from .capture import check_capture, is_captured
from .checkpoint import guarded
from .groups import resolve
from .options import plain
from .rules.operator import OPERATOR, OperatorSession, check_kernels, geometries_in, kernels_of
from .session import Gate, OnDevice, Resting, Rule, Session
from .settling import adopt, refuse_target_of_off, settle
from .sharding import exchange
from .sharding.checking import check_sharded
from .sharding.cut import is_cut
from .sharding.sessions import ShardedSession
from .sharding.sessions import begin as sharded_session
from .sharding.unfinished import Unfinished, always, never, written_to
from .sharding.views import ShardedMatrix
from .telling import names_in, tell_of_first_steps, warn_of_groups
from .tracker.common import BLOCK, LEFT, PROBE, RIGHT, STATS, STEP, WAIT, Kept, rounding_seeds
from .views import Matrix, check_readable, is_controlled, matrices_of, refresh_copies, written_back

NOT_COMPILED = (
    "torch.compile leaves the step of specopt's optimizers as it is: it runs between the graphs of what comes before "
    "and after, with the same result. Call it outside of the compiled function to be rid of the break and this warning."
)


if TYPE_CHECKING:
    Mixin = Optimizer
else:
    Mixin = object


class SpectralOptimizer(Mixin):
    """Puts a rule around the step of a torch.optim class.

    In front of that class in the bases; or behind it, in a class of its objects' own layout, which :func:`specopt.wrap`
    makes and which takes over :data:`IN_FRONT`. Holds nothing of its own but what is being waited for: options live in
    the groups, state in ``self.state``.
    """

    __slots__ = ()
    rule: ClassVar[Rule]
    like_weight: ClassVar[tuple[str, ...]] = ()
    """State keys of what the base keeps in the shape of the weight."""
    front: ClassVar[type]
    """What stands in front of the base in the order of methods."""
    base_is_known: ClassVar[bool] = True
    """The base is torch's SGD or AdamW itself, whose update our passes can make."""
    _options: dict[str, Any]

    @property
    def _base(self) -> Any:
        return super(self.front, self)

    def _construct(self, options: dict[str, Any], base_init: Callable[[], None]) -> None:
        self._options = options = {name: plain(value) for name, value in options.items()}
        base_init()
        self.defaults.update(options)
        del self._options
        warn_of_groups(self.param_groups, self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the base's. A Module as ``params`` adds its groups: see :func:`specopt.param_groups`."""
        before = len(self.param_groups)
        try:
            for group in resolve([param_group], beside=self.param_groups):
                self._add_group(group)
        except Exception:
            del self.param_groups[before:]
            raise
        if "_options" not in self.__dict__:
            warn_of_groups(self.param_groups[before:], self)

    def _add_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            merged = {**getattr(self, "defaults", {}), **self._own_options(), **param_group}
            self.rule.check(merged)
            if "target" in self.rule.names:
                refuse_target_of_off(param_group, self.rule.names)
            param_group.update({name: plain(merged[name]) for name in self.rule.names})
        self._base.add_param_group(param_group)
        group = self.param_groups[-1]
        names = cache(self.names)  # of all groups: only where there is something to tell
        check_kernels(group, names)
        for param in group["params"]:
            check_readable(param, group)
            check_sharded(param, group, names)
        if "target" in self.rule.names:
            adopt(group, self.names)

    # torch declares two overloads, one of them without a closure
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of the base optimizer, under control.

        Args:
            closure: reevaluates the model and returns the loss.
        """
        return self._uncompiled_step(closure, compiling=torch.compiler.is_dynamo_compiling())

    @_disable_dynamo  # torch.compiler.disable, without the second that importing the compiler takes
    def _uncompiled_step(self, closure: Callable[[], float] | None, compiling: bool) -> float | None:
        for group in self.param_groups:
            self.rule.check(group)
            if "target" in self.rule.names:
                settle(group, self.names)
            check_kernels(group, self.names)
            group.update({name: plain(group[name]) for name in self.rule.names})  # schedules may be NumPy's
        workspace: dict[Any, Any] = self.__dict__.setdefault("_workspace", {})
        Unfinished.of(workspace).check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._take_up()
        if compiling and not workspace.setdefault("told of compiling", False):
            workspace["told of compiling"] = True
            warnings.warn(NOT_COMPILED, stacklevel=5)
        gate = Gate(getattr(self, "found_inf", None), getattr(self, "grad_scale", None), workspace=workspace)
        if gate.is_undecided and any(is_cut(param) for group in self.param_groups for param in group["params"]):
            gate = gate.seen()
        with torch.no_grad(), self._without_autocast():
            if not gate.is_shut:
                self._controlled_step(gate)
        tell_of_first_steps(self, gate.ratios)
        return loss

    def _controlled_step(self, gate: Gate) -> None:
        same = gate.workspace.get("signature") == signature_of(self)[0]
        found: list[Batch] = gate.workspace["batches"] if same else batches_of(self)
        if is_captured(self):
            check_capture(self, found, kernels_of(self))
        settled = same or all(has_state(self, matrix) for batch in found for matrix in batch.matrices)
        batches = [batch.resting() if batch.wait else batch for batch in found]
        seeds = [rounding_seeds(batch.matrices) for batch in batches]
        # our passes skip on the device; what torch makes has to be undone there
        kept = [Kept(batch.matrices) for batch in batches if gate.is_undecided and not batch.base]
        with full_precision():
            sessions = self._sessions(batches, replace(gate, settled=same))
        sharded = [session for session in sessions if isinstance(session, ShardedSession)]
        convolutions = OperatorSession(kernels_of(self), self.rule.names, gate)
        is_sharded = bool(sharded) or convolutions.is_sharded
        watched, on_shards = Unfinished.of(gate.workspace).watched, always if is_sharded else never
        with full_precision(), watched(on_shards):
            rounds = exchange.run([*(session.before() for session in sharded), convolutions.before()]).rounds
        is_begun = rounds > 0 or any(batch.ours for batch in batches)
        with watched(written_to(self) if is_sharded and not is_begun else on_shards):
            self._update_weights(batches, sessions, seeds, convolutions, gate)
        with full_precision(), watched(on_shards):
            self._finish(batches, sessions, convolutions, gate)
            for state in kept:
                state.put_back(cast(Tensor, gate.found_inf).reshape(()) != 0)
            for batch in found:
                batch.move_on()
        versions = gate.workspace.setdefault("versions", {})
        versions.update({id(param): param._version for param in gate.written})
        if not same:
            self._complete_state()
            signature, held = signature_of(self)
            gate.workspace.update(batches=found, signature=signature if settled else None, held=held)

    def _sessions(self, batches: Sequence[Batch], gate: Gate) -> list[Session | ShardedSession]:
        """One for each batch. Of what is cut up over ranks nothing is written or summed here."""
        if not gate.settled:
            for batch in batches:
                if batch.is_sharded:
                    exchange.meet(cast("list[ShardedMatrix]", batch.matrices))
        sessions: list[Session | ShardedSession] = []
        for batch in batches:
            if batch.wait:
                sessions.append(Resting())
                continue
            refresh_copies(batch.copied)
            own = replace(gate, base=batch.base.refresh() if batch.base else None)
            begin = partial(sharded_session, self.rule) if batch.is_sharded else self.rule.begin
            sessions.append(begin(batch.matrices, own))
        return sessions

    def _update_weights(
        self,
        batches: Sequence[Batch],
        sessions: Sequence[Session | ShardedSession],
        seeds: Sequence[Sequence[float]],
        convolutions: OperatorSession,
        gate: Gate,
    ) -> None:
        """The base update of all parameters, with the penalties' gradients in it."""
        with ExitStack() as stack:
            with full_precision():
                for batch, session, chances in zip(batches, sessions, seeds, strict=True):
                    if batch.base:
                        cast(OnDevice, session).update()
                    elif batch.ours:
                        pairs = zip(batch.matrices, chances, strict=True)
                        updated = [self._update(matrix)._replace(seed=seed) for matrix, seed in pairs]
                        base_updates_(updated, session.penalty, gate.host_scale)
                    elif session.penalty is not None:
                        stack.enter_context(gradients(penalized(batch.matrices, session.penalty, gate)))
                    if batch.ours:
                        stack.enter_context(gradients({matrix.param: None for matrix in batch.matrices}))
            stack.enter_context(gradients(convolutions.gradients))
            seen = [matrix.param for batch in batches if not batch.ours for matrix in batch.matrices]
            stack.enter_context(clean_buffers(self, gate))
            self._blind_step([*seen, *(kernel.param for kernel in convolutions.everyone)])

    def _finish(
        self,
        batches: Sequence[Batch],
        sessions: Sequence[Session | ShardedSession],
        convolutions: OperatorSession,
        gate: Gate,
    ) -> None:
        """What rules do after the base update. Sums that are due by the next step stay on their way."""
        with ExitStack() as stack:
            for batch, session in zip(batches, sessions, strict=True):
                if batch.copied and session.writes:
                    stack.enter_context(written_back(batch.copied))
                if not isinstance(session, ShardedSession):
                    session.finish()
            sharded = [session.after() for session in sessions if isinstance(session, ShardedSession)]
            due = exchange.run([*sharded, convolutions.after()])
            if sharded:
                Unfinished.of(gate.workspace).due = due

    def _take_up(self) -> None:
        """What the last step has left to be summed over ranks: the state is complete then. See
        :meth:`specopt.sharding.unfinished.Unfinished.take_up`."""
        with torch.no_grad(), self._without_autocast(), full_precision():
            Unfinished.of(self.__dict__.get("_workspace", {})).take_up()

    def _update(self, matrix: Matrix) -> Update:
        raise NotImplementedError

    def _blind_step(self, params: Iterable[Tensor]) -> None:
        """The base's step of what has a gradient, with the entries of ours out of its sight in the states of
        ``params``, and in all states where the base is one that we do not know."""
        seen = params if self.base_is_known else list(self.state)
        with out_of_sight(self.state, seen), rates_left_on_device(self) if self.base_is_known else nullcontext():
            self._base_step()

    def _base_step(self) -> None:
        # torch wraps the step of every class it has built with the user's hooks; ours has them already
        step = self._base.step
        function = step.__func__
        (function.__wrapped__ if getattr(function, "hooked", False) else function)(self)

    @contextmanager
    def _without_autocast(self) -> Iterator[None]:
        with ExitStack() as stack:
            for kind in {group["params"][0].device.type for group in self.param_groups if group["params"]}:
                if torch.amp.autocast_mode.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            yield

    def matrices(self, *, with_grad: bool = True) -> Iterator[Matrix]:
        """The controlled weights, those that have a gradient alone or all."""
        for group in self.param_groups:
            operators = geometries_in(group)
            for place, param in enumerate(group["params"]):
                if id(param) in operators or not is_controlled(param, group) or (with_grad and param.grad is None):
                    continue
                if with_grad and param.grad.is_sparse and self.rule.is_on(group):
                    raise RuntimeError(
                        f"a controlled weight of shape {tuple(param.shape)} has a sparse gradient; put it into a group "
                        "with spectral=False"
                    )
                state = self.state[param] if with_grad else self.state.get(param, {})
                yield from matrices_of(param, group, state, self.rule.columns(group), place)

    def _complete_state(self) -> None:
        """Where control is off, a tracker's state would grow stale. And torch.distributed.checkpoint asks for state of
        all parameters or of none, where the base (SGD without momentum) keeps none."""
        for group in self.param_groups:
            operators = geometries_in(group)
            for param in group["params"]:
                state = self.state.get(param)
                if state is not None and id(param) not in operators:
                    state.pop(OPERATOR, None)
                if self.rule.is_on(group) and (id(param) in operators or is_controlled(param, group)):
                    continue
                if state is not None and STEP in state and len(state) > 1:
                    for key in (STATS, BLOCK, PROBE, LEFT, RIGHT, WAIT, OPERATOR):
                        state.pop(key, None)
                if param.grad is not None and not self.state[param]:
                    self.state[param][STEP] = 0

    def forget(self) -> None:
        """Drops what the rule keeps in the states of the parameters."""
        self._take_up()
        for param in [param for param, state in self.state.items() if isinstance(state, dict)]:
            state = self.state[param]
            for key in own_entries(state):
                del state[key]
            if not state:
                del self.state[param]

    def _own_options(self) -> dict[str, Any]:
        return self._options if "_options" in self.__dict__ else {name: self.defaults[name] for name in self.rule.names}

    def __getstate__(self) -> Any:
        self._take_up()
        return self._base.__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._base.__setstate__(state)
        for group in self.param_groups:
            for name, value in self._own_options().items():
                group.setdefault(name, value)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the base's. Of weights that are cut up over ranks every rank has its part.

        Raises:
            RuntimeError: the last step was cut off between its sums over ranks, and its state would hold half of a
                correction.
        """
        self._take_up()
        found: dict[str, Any] = self._base.state_dict(*args, **kwargs)
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the base's; but what a rule stored keeps its precision (the base casts it to the parameter's dtype), and a
        state that cannot be meant is refused before any of it is taken up.

        A state without control (a plain base's) starts it cold, with the options that the groups have now; one whose
        blocks have another width than the group's ``block`` asks for, or are of another ``view``, starts cold as well.
        Options come from the state, but for a ``geometry`` that a group has already.

        Raises:
            ValueError: state of a weight of another shape, or an option that makes no sense.
        """
        with suppress(Exception):  # of a late sum, or a step, that was cut off: what is loaded takes its place
            self._take_up()
        with guarded(self):
            self._base.load_state_dict(state_dict)
        workspace = self.__dict__.get("_workspace", {})
        for key in [key for key in workspace if key == "unfinished" or key[0] == "engine"]:
            del workspace[key]  # engines know tensors by their addresses, which new ones may have

    def names(self) -> Mapping[Tensor, str]:
        """A name for every parameter: its own where the optimizer was built from named ones, else its place."""
        return names_in(self.param_groups)


SpectralOptimizer.front = SpectralOptimizer
IN_FRONT = ("step", "add_param_group", "state_dict", "load_state_dict", "__getstate__", "__setstate__")
"""What :class:`SpectralOptimizer` does otherwise than the base."""
