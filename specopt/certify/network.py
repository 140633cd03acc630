"""A Lipschitz bound of a whole network, along its traced graph.

Each value in the graph gets a constant c with ``‖v(x) − v(y)‖ <= c ‖x − y‖``, where x and y are all inputs together: 1
for an input, 0 for what does not depend on one, and ``gain · c`` behind a map with one such argument. A sum has the sum
of its terms' constants, ``cat`` and ``stack`` the root of the sum of their squares, and so have several outputs. What
nothing is known of makes the network's constant unknown, and is named.

The graph is that of torch.fx. What cannot be traced, because its control flow depends on values, is one step of the
graph, and unknown; so is a module that comes with hooks of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from . import functions
from .arithmetic import joint_constant, of_function, only_first
from .gram import times
from .known import Call, NotKnown
from .layers import Norms
from .modules import gain_of, hooks_of, rule_of
from .tracing import IN_PLACE, Errors, Tracer, first_line, in_modes, untraceable
from .values import DTYPE, Value, examples, listed, map_aggregate, memory_of, values_in, versions


def lipschitz(
    model: nn.Module,
    norms: Norms,
    training: Mapping[nn.Module, bool],
    args: Sequence[Any] | None,
    named: Mapping[str, Any],
) -> tuple[float | None, tuple[str, ...]]:
    """The network's constant, and what is not known of it.

    Args:
        model: in eval mode, in which its graph is run.
        training: the modes of its modules, in which it is traced and bounded.
        args, named: inputs; None for none.
    """
    if hooks := hooks_of(model):
        return None, (f"{_kind(model)}: has hooks that may change what it computes: {', '.join(hooks)}",)
    is_layer = rule_of(model) is not None or fx.Tracer().is_leaf_module(model, "")
    top = nn.Sequential(model) if is_layer else model
    errors: Errors = {}
    try:
        with in_modes(training):
            tracer = Tracer(errors)
            graph = tracer.trace(top)
    except Exception as error:
        return None, (f"{_kind(model)}: {untraceable(error)}",)
    walk = _Walk(top, graph, norms, training, errors)
    walk.fixed |= {memory_of(copy) for _, copy in tracer.constants.values() if copy.numel()}
    try:
        constant = walk.whole(args, named)
    except Exception as error:
        return None, (*walk.unknown, f"{_kind(model)}: its traced graph does not run: {first_line(error)}")
    return (None if walk.unknown else constant), tuple(dict.fromkeys(walk.unknown))


class _Walk(fx.Interpreter):
    """Runs the graph on :class:`Value` in place of what depends on the inputs; on all else as it is."""

    def __init__(
        self, module: nn.Module, graph: fx.Graph, norms: Norms, training: Mapping[nn.Module, bool], errors: Errors
    ) -> None:
        super().__init__(module, graph=graph)
        self.norms, self.training, self.errors = norms, training, errors
        self.unknown: list[str] = []
        self.node: fx.Node | None = None
        self.named: Mapping[str, Any] = {}
        self.fixed = {memory_of(param) for param in module.parameters() if param.numel()}
        """Memory that the graph must not write into: weights, and constants, which are read more than once."""
        self.sized = False

    def whole(self, args: Sequence[Any] | None, named: Mapping[str, Any]) -> float | None:
        self.named, self.sized = named, args is not None
        outputs = values_in(self.run(*(args or ()), enable_io_processing=False))
        return joint_constant([value.constant for value in outputs])

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        return super().run_node(n)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target.startswith("*"):
            raise NotKnown("variable arguments")
        if target in self.named:
            given = self.named[target]
        elif self.sized:
            given = super().placeholder(target, args, kwargs)
        else:
            return args[0] if args else Value(1.0)
        return map_aggregate(given, lambda leaf: Value(1.0, leaf) if isinstance(leaf, Tensor) else leaf)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)

        def gain(constants: list[float], given: Any, result: Any) -> float:
            if error := self.errors.get(module):
                raise NotKnown(untraceable(error))
            if rule_of(module) is not None:
                only_first(args, kwargs)
            call = Call(self.norms, self.training.get(module, module.training), given, result)
            return times(gain_of(module, call), *constants)

        in_place = bool(getattr(module, "inplace", False))
        return self._step(f"{target} ({_kind(module)})", module, args, kwargs, gain, in_place)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is operator.getitem and not isinstance(args[0], Value):
            return super().call_function(target, args, kwargs)
        return self._function(target, target, getattr(target, "__name__", str(target)), args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._function(
            target, lambda first, *rest, **named: getattr(first, target)(*rest, **named), target, args, kwargs
        )

    def _function(self, key: Any, execute: Any, name: str, args: Any, kwargs: Any) -> Any:
        if "input" in kwargs and not args:
            args, kwargs = (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
        if _tells_shape(key, args):
            first = args[0]
            if isinstance(first, Value) and first.example is None:
                return DTYPE if key is getattr and args[1] == "dtype" else Value(0.0)
            return execute(*examples(args), **examples(kwargs))

        def gain(constants: list[float], given: Any, result: Any) -> float:
            return of_function(self.norms, key, args, kwargs, constants, given, result)

        in_place = (
            name.endswith("_") or name in IN_PLACE or any(flag is True for flag in (kwargs.get("inplace"), *args[1:]))
        )
        return self._step(f"{self.node} ({name})", execute, args, kwargs, gain, in_place)

    def _step(self, label: str, execute: Any, args: Any, kwargs: Any, gain: Any, in_place: bool) -> Any:
        """One call: its result, with its constant."""
        if in_place and args and memory_of(args[0]) in self.fixed:
            self.unknown.append(f"{label} changes a weight or buffer of the model in place")
            return Value(None)
        values = values_in((args, kwargs))
        if not values:
            return execute(*args, **kwargs)
        result, changed = None, in_place
        if all(value.example is not None for value in values):
            before = versions((args, kwargs))
            result = execute(*examples(args), **examples(kwargs))
            changed = before != versions((args, kwargs))
        if all(value.constant == 0 for value in values):
            if changed and result is None and args and isinstance(args[0], Tensor):
                self.unknown.append(f"{label} changes a constant by what is not known; give inputs=")
            return map_aggregate(listed(result), lambda leaf: Value(0.0, leaf))
        constant: float | None = None
        try:
            known = [1.0 if value.constant is None else value.constant for value in values]
            constant = gain(known, values[0].example, result)
            if changed:
                self._check_change(args[0], values, constant)
        except NotKnown as reason:
            self.unknown.append(f"{label} {reason}")
        if any(value.constant is None for value in values):
            constant = None
        return map_aggregate(listed(result), lambda leaf: Value(constant, leaf))

    def _check_change(self, target: Any, values: Sequence[Value], constant: float) -> None:
        """A value changed in place must not be read again under its old constant."""
        if not isinstance(target, Value):
            raise NotKnown("writes what depends on the inputs into a constant")
        if len(values) == 1 and constant <= (1.0 if target.constant is None else target.constant):
            return
        assert self.node is not None
        done = self.user_to_last_uses.get(self.node, [])
        living = [value for node, held in self.env.items() if node not in done for value in values_in(held)]
        if any(value.example is None for value in (target, *living)):
            raise NotKnown("changes its input in place; give inputs= to see who else reads it")
        if any(memory_of(value.example) == memory_of(target.example) for value in living):
            raise NotKnown("changes in place what is read again")


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def _tells_shape(key: Any, args: Any) -> bool:
    return key in functions.SHAPES or (key is getattr and args[1] in functions.SHAPES_OF)
