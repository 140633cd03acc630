"""Any optimizer of torch's kind under a rule.

The class of the object is exchanged for a subclass of it that is a :class:`~specopt.control.SpectralOptimizer` as well.
So the object stays what it was to whoever holds it: schedulers, hooks, ``isinstance``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial, wraps
from types import FunctionType, MethodType, new_class
from typing import Any, ClassVar, TypeVar, cast
from weakref import WeakValueDictionary, ref

from torch.optim import LBFGS, SGD, AdamW, Optimizer, SparseAdam

from specopt.kernels import Update

from .adamw import NormScaleAdamW
from .control import IN_FRONT, SpectralOptimizer
from .options import plain
from .rules import Compose, NormScale, SpectralDecay, SpectralPenalty, find
from .rules.operator import check_kernels
from .session import Rule
from .settling import adopt, refuse_target_of_off
from .sgd import SNRSGD
from .sharding.checking import check_sharded
from .telling import names_in, warn_of_groups
from .views import Matrix, check_readable

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)
AnyRule = SpectralPenalty | SpectralDecay | NormScale | Compose
RULES = (SpectralPenalty, SpectralDecay, NormScale, Compose)
WAITING = ("_workspace", "_waiting", "_warned")
"""What a step leaves on the object beside options and state."""
FOUND = "_options_found"
"""Where the object keeps which of the rule's options each of its groups had before: they stay with :func:`unwrap`."""


def wrap(optimizer: AnyOptimizer, rule: AnyRule) -> AnyOptimizer:
    """Puts the weight matrices of any optimizer under a rule; returns the same object.

    Options of the rule are the default in every param group, now and for groups added later; one that a group has
    already stays. The rule's state travels in ``optimizer.state_dict()``, the rule itself also through deepcopy and
    pickle. The weight updates of :class:`torch.optim.SGD` and :class:`torch.optim.AdamW` themselves are made in passes
    of ours together with the rule; every other class makes its own, and sees neither state of ours nor, under a
    penalty, a ``p.grad`` that it could change.

    A closure is called once, before the base's step, which gets none. What keeps weights of its own beside the
    parameters (float32 masters, Lookahead's slow weights) goes on from those: wrap the innermost optimizer.

    Args:
        optimizer: an instance of a subclass of :class:`torch.optim.Optimizer`.
        rule: :class:`specopt.SpectralPenalty`, :class:`specopt.SpectralDecay` or :class:`specopt.NormScale`, or several
            of them as :class:`specopt.Compose`.

    Raises:
        TypeError: not an optimizer, or not a rule.
        ValueError: an optimizer that cannot be under a rule, and why; or an option of a group that makes no sense.

    Example::

        optimizer = specopt.wrap(torch.optim.RMSprop(specopt.param_groups(model)), specopt.SpectralDecay(1.0))
    """
    _check_kinds(optimizer, rule)
    base = type(optimizer)
    _check_base(optimizer, rule)
    options = rule.options
    merged = [{**options, **group} for group in optimizer.param_groups]
    names = cache(partial(SpectralOptimizer.names, cast(SpectralOptimizer, optimizer)))
    for group, given in zip(merged, optimizer.param_groups, strict=True):
        rule.check(group)
        check_kernels(group, names)
        for param in group["params"]:
            check_readable(param, group)
            check_sharded(param, group, names)
        if "target" in rule.names:
            refuse_target_of_off(given, rule.names)
            adopt(group, lambda: names_in(merged))
    counted = _drop_step(optimizer)
    optimizer.__dict__[FOUND] = [set(rule.names) & group.keys() for group in optimizer.param_groups]
    optimizer.__class__ = class_of(base, rule)  # type: ignore[assignment]
    for group, full in zip(optimizer.param_groups, merged, strict=True):
        group.update({name: plain(full[name]) for name in options})
    _take_step(optimizer, counted)
    warn_of_groups(optimizer.param_groups, cast(SpectralOptimizer, optimizer))
    return optimizer


def unwrap(optimizer: AnyOptimizer) -> AnyOptimizer:
    """What :func:`wrap` did to an optimizer undone: its class is what it was, and the rule's state is gone, and its
    options where a group did not have them before. Returns the same object.

    Raises:
        TypeError: an optimizer that is not wrapped.
    """
    if not isinstance(optimizer, Wrapped):
        raise TypeError(f"optimizer must be one that specopt.wrap returned, got {type(optimizer).__name__}")
    counted = _drop_step(optimizer)
    for group, found in zip(optimizer.param_groups, optimizer.__dict__.pop(FOUND), strict=False):
        for name in set(optimizer.rule.names) - found:
            group.pop(name, None)
    optimizer.forget()
    for name in WAITING:
        optimizer.__dict__.pop(name, None)
    optimizer.__class__ = optimizer.base  # type: ignore[assignment]
    _take_step(optimizer, counted)
    return optimizer


class Wrapped(SpectralOptimizer):
    """What the classes of wrapped optimizers share."""

    __slots__ = ()
    base: ClassVar[type[Optimizer]]

    def _own_options(self) -> dict[str, Any]:
        return self.rule.options

    def _add_group(self, param_group: dict[str, Any]) -> None:
        found = set(self.rule.names) & param_group.keys()
        super()._add_group(param_group)
        record = self.__dict__.setdefault(FOUND, [])
        record[len(self.param_groups) - 1 :] = [found]  # also over what a group left that was taken back

    def _update(self, matrix: Matrix) -> Update:
        return KNOWN[self.base]._update(cast(Any, self), matrix)

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = self.__getstate__()
        if isinstance(state, dict):
            state = {name: value for name, value in state.items() if name not in WAITING}
            state[FOUND] = self.__dict__[FOUND]
        return _blank, (self.base, self.rule), state


KNOWN: dict[type[Optimizer], type[SNRSGD | NormScaleAdamW]] = {SGD: SNRSGD, AdamW: NormScaleAdamW}
"""The bases whose update our passes can make; not subclasses of them, which may do it otherwise."""

_classes: WeakValueDictionary[tuple[type[Optimizer], Rule], type[Wrapped]] = WeakValueDictionary()


def class_of(base: type[Optimizer], rule: Rule) -> type[Wrapped]:
    """The class of ``base``'s wrapped instances under a rule; it goes by the name of ``base``."""
    made = _classes.get((base, rule))
    if made is None:
        body = {name: vars(SpectralOptimizer)[name] for name in IN_FRONT}
        body |= {"base": base, "rule": rule, "base_is_known": base in KNOWN, "__reduce_ex__": Wrapped.__reduce_ex__}
        body |= {"like_weight": KNOWN[base].like_weight} if base in KNOWN else {}
        body |= {"__doc__": base.__doc__, "__qualname__": base.__qualname__, "__module__": __name__}
        made = new_class(base.__name__, (base, Wrapped), exec_body=lambda namespace: namespace.update(body))
        made.front = made
        _classes[base, rule] = made
    return made


def _blank(base: type[Optimizer], rule: Rule) -> Optimizer:
    cls = class_of(base, rule)
    return cls.__new__(cls)


def _check_kinds(optimizer: object, rule: object) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if not isinstance(rule, RULES):
        kinds = ", ".join(f"specopt.{kind.__name__}(...)" for kind in RULES)
        raise TypeError(f"rule must be one of {kinds}, got {rule!r}")


def _check_base(optimizer: Optimizer, rule: Rule) -> None:
    name = type(optimizer).__name__
    if isinstance(optimizer, SpectralOptimizer):
        raise ValueError(f"optimizer must not be under a rule already, but {name} is, {optimizer.rule!r}")
    if isinstance(optimizer, LBFGS):
        raise ValueError(
            "optimizer must not be LBFGS: it evaluates the closure several times in a step, builds its curvature from "
            "differences of those gradients and weights, and searches along one line through all weights at once; a "
            "penalty or a correction beside that would falsify all three. Put the penalty into the loss instead"
        )
    if isinstance(optimizer, SparseAdam):
        raise ValueError("optimizer must not be SparseAdam: it takes sparse gradients alone, which no rule controls")
    parameters = list(inspect.signature(type(optimizer).step).parameters.values())[1:]
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if needed:
        raise ValueError(
            f"optimizer must have a step that needs no argument, but {name}.step needs {', '.join(needed)}"
            " (a closure that it evaluates at weights of its own choice is out of a rule's reach)"
        )
    if find(rule, SpectralPenalty) is not None and getattr(optimizer, "maximize", False):
        raise ValueError(f"optimizer must tell maximize in its groups, but {name} has it as an attribute of the object")
    if find(rule, SpectralDecay) is not None and any(group.get("lr") is None for group in optimizer.param_groups):
        raise ValueError(f"optimizer must have lr in every group for SpectralDecay to go by, but {name} has none")
    options = sorted(set(rule.names) & set(getattr(optimizer, "defaults", ())))
    members = {*vars(SpectralOptimizer), *vars(Wrapped)} - set(IN_FRONT)
    attributes = sorted(member for member in members if not member.startswith("__") and hasattr(optimizer, member))
    if options or attributes:
        taken = ", ".join(options + attributes)
        raise ValueError(f"optimizer must leave the rule its names, but {name} has something else by these: {taken}")


# A learning rate scheduler leaves a function in the object's place of ``step``, which notes the call and goes on to the
# step that the class had then.


def _drop_step(optimizer: Optimizer) -> bool:
    """Clears the object's own place of ``step``; whether a scheduler's function was there."""
    found = optimizer.__dict__.get("step")
    if found is None:
        return False
    counted = hasattr(found, "_wrapped_by_lr_sched")
    function = found.__wrapped__ if counted else found.__func__ if isinstance(found, MethodType) else None
    if function is not type(optimizer).step:
        raise ValueError(
            f"optimizer.step has been replaced by {found!r}, which a rule cannot stand in front of; wrap the optimizer "
            "before it is replaced"
        )
    del optimizer.__dict__["step"]
    return counted


def _take_step(optimizer: Optimizer, counted: bool) -> None:
    """The step of the class that the object has now, with torch's hooks, and a scheduler's note where there was one."""
    if hasattr(optimizer, "_optimizer_step_pre_hooks"):
        optimizer._patch_step_function()
    if counted:
        optimizer.step = _counted(optimizer)  # type: ignore[method-assign]


def _counted(optimizer: Optimizer) -> Callable[..., Any]:
    function = cast(FunctionType, type(optimizer).step)
    reference = ref(optimizer)

    @wraps(function)
    def step(*args: Any, **kwargs: Any) -> Any:
        living = reference()
        assert living is not None
        living._opt_called = True  # type: ignore[attr-defined]
        return function.__get__(living, type(living))(*args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    return step
