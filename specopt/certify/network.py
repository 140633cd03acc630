"""A Lipschitz bound of a whole network, along its traced graph.

Each value in the graph gets a constant c with ``‖v(x) − v(y)‖ <= c ‖x − y‖``, where x and y are all inputs together: 1
for an input, 0 for what does not depend on one, and ``gain · c`` behind a map with one such argument. A sum has the sum
of its terms' constants, ``cat`` and ``stack`` the root of the sum of their squares, and so have several outputs. What
nothing is known of makes the network's constant unknown, and is named.

The graph is that of torch.fx. What cannot be traced, because its control flow depends on values, is one step of the
graph, and unknown; so is a module that comes with hooks of its own.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import functions
from .gram import in_double, largest_norm, root, times, total, up
from .known import Call, NotKnown
from .layers import Norms
from .modules import gain_of, hooks_of, rule_of


@dataclass(frozen=True)
class Value:
    """A value of the graph that is not known as it is."""

    constant: float | None
    """Its Lipschitz constant; None where it is not known."""
    example: Any = None
    """What it is for the inputs given; None where none were."""


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
    try:
        with _in_modes(training):
            graph, root_module = _traced(model)
    except Exception as error:
        return None, (f"{_kind(model)}: {_untraceable(error)}",)
    walk = _Walk(root_module, graph, norms, training)
    try:
        constant = walk.whole(args, named)
    except Exception as error:
        return None, (*walk.unknown, f"{_kind(model)}: its traced graph does not run: {type(error).__name__}: {error}")
    return (None if walk.unknown else constant), tuple(dict.fromkeys(walk.unknown))


# --- tracing --------------------------------------------------------------------------------------------------------


@contextmanager
def _in_modes(training: Mapping[nn.Module, bool]) -> Iterator[None]:
    before = {module: module.training for module in training}
    try:
        for module, mode in training.items():
            module.training = mode
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


class _Tracer(fx.Tracer):
    """Stops at modules that there is a rule for, and at those that cannot be traced."""

    def __init__(self, errors: dict[nn.Module, Exception | None]) -> None:
        super().__init__()
        self.errors = errors
        """Why a module cannot be traced; None if it can."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if rule_of(module) is not None or hooks_of(module) or super().is_leaf_module(module, qualified_name):
            return True
        if module not in self.errors:
            try:
                _Tracer(self.errors).trace(module)
                self.errors[module] = None
            except Exception as error:
                self.errors[module] = error
        return self.errors[module] is not None


def _traced(model: nn.Module) -> tuple[fx.Graph, nn.Module]:
    if rule_of(model) is not None:  # a single layer
        model = nn.Sequential(model)
    return _Tracer({}).trace(model), model


def _untraceable(error: Exception) -> str:
    return f"cannot be traced: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


def _kind(module: nn.Module) -> str:
    return type(module).__name__


# --- walking the graph ----------------------------------------------------------------------------------------------


class _Walk(fx.Interpreter):
    """Runs the graph on :class:`Value` in place of what depends on the inputs; on all else as it is."""

    def __init__(self, module: nn.Module, graph: fx.Graph, norms: Norms, training: Mapping[nn.Module, bool]) -> None:
        super().__init__(module, graph=graph)
        self.norms, self.training = norms, training
        self.unknown: list[str] = []
        self.node: fx.Node | None = None
        self.named: Mapping[str, Any] = {}
        self.sized = False

    def whole(self, args: Sequence[Any] | None, named: Mapping[str, Any]) -> float | None:
        self.named, self.sized = named, args is not None
        outputs = _values(self.run(*(args or ()), enable_io_processing=False))
        return _joint([value.constant for value in outputs])

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
            _only_first(args, kwargs)
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
            if isinstance(first, Value):
                return (
                    Value(0.0)
                    if first.example is None
                    else execute(first.example, *_examples(args[1:]), **_examples(kwargs))
                )

        def gain(constants: list[float], given: Any, result: Any) -> float:
            return self._of_function(key, args, kwargs, constants, given, result)

        in_place = (
            name.endswith("_")
            or name in ("iadd", "isub", "imul", "itruediv")
            or any(flag is True for flag in (kwargs.get("inplace"), *args[1:]))
        )
        return self._step(f"{self.node} ({name})", execute, args, kwargs, gain, in_place)

    def _step(self, label: str, execute: Any, args: Any, kwargs: Any, gain: Any, in_place: bool) -> Any:
        """One call: its result, with its constant."""
        values = _values((args, kwargs))
        if not values:
            return execute(*args, **kwargs)
        result, changed = None, in_place
        if all(value.example is not None for value in values):
            before = _versions((args, kwargs))
            result = execute(*_examples(args), **_examples(kwargs))
            changed = before != _versions((args, kwargs))
        if all(value.constant == 0 for value in values):
            return map_aggregate(_listed(result), lambda leaf: Value(0.0, leaf))
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
        return map_aggregate(_listed(result), lambda leaf: Value(constant, leaf))

    def _check_change(self, target: Any, values: Sequence[Value], constant: float) -> None:
        """A value changed in place must not be read again under its old constant."""
        if not isinstance(target, Value):
            raise NotKnown("writes what depends on the inputs into a constant")
        if len(values) == 1 and constant <= (1.0 if target.constant is None else target.constant):
            return
        assert self.node is not None
        done = self.user_to_last_uses.get(self.node, [])
        living = [value for node, held in self.env.items() if node not in done for value in _values(held)]
        if any(value.example is None for value in (target, *living)):
            raise NotKnown("changes its input in place; give inputs= to see who else reads it")
        if any(_memory(value.example) == _memory(target.example) for value in living):
            raise NotKnown("changes in place what is read again")

    # --- functions ---

    def _of_function(self, key: Any, args: Any, kwargs: Any, constants: list[float], given: Any, result: Any) -> float:
        if "out" in kwargs:
            raise NotKnown("writes into out=")
        if key in functions.AS_MODULE:
            _only_first(args, kwargs)
            try:
                module = functions.AS_MODULE[key](*args[1:], **kwargs)
            except (TypeError, ValueError, KeyError) as error:
                raise NotKnown(f"is called in a way that is not known: {error}") from None
            return times(gain_of(module, Call(self.norms, module.training, given, result)), *constants)
        if key in functions.REARRANGED:
            _only_first(args, kwargs)
            _stays_real(key, (args, kwargs))
            return constants[0]
        if key is getattr and args[1] in functions.TRANSPOSES:
            return constants[0]
        if key is operator.getitem:
            return times(_of_index(args), *constants)
        if key in functions.SUMS or key in functions.DIFFERENCES:
            return _of_sum(args, kwargs, result)
        if key in functions.PRODUCTS or key in functions.QUOTIENTS:
            return _of_product(args, kwargs, result, divides=key in functions.QUOTIENTS)
        if key in functions.JOINED:
            joint = _joint(constants)
            assert joint is not None
            return joint
        if key in functions.MEANS:
            return times(_of_mean(key, given, result), *constants)
        if key in functions.EXPANDED:
            return times(_expansion(args[0], result), *constants)
        if key in functions.MATRIX_PRODUCTS:
            return times(_of_matrix(key, args, kwargs), *constants)
        raise NotKnown("is no function whose Lipschitz constant is known")


def _joint(constants: Sequence[float | None]) -> float | None:
    """``√(Σ c²)``: of several values side by side."""
    known = [constant for constant in constants if constant is not None]
    if len(known) != len(constants):
        return None
    if len(known) <= 1:
        return known[0] if known else 0.0
    return math.inf if math.inf in known else root(total([up(c * c) if c not in (0, 1) else c for c in known]))


def _of_sum(args: Any, kwargs: Any, result: Any) -> float:
    scale = kwargs.get("alpha", 1)
    if isinstance(scale, Value) or len(args) != 2:
        raise NotKnown("is called in a way that is not known")
    terms = []
    for term, factor in zip(args, (1.0, abs(float(scale))), strict=True):
        if isinstance(term, Value) and term.constant:
            others = [other for other in args if other is not term]
            terms.append(times(term.constant, _expansion(term, result, others), factor))
    return total(terms)


def _of_product(args: Any, kwargs: Any, result: Any, divides: bool) -> float:
    if kwargs or len(args) != 2:
        raise NotKnown("is called in a way that is not known")
    varying = [i for i, factor in enumerate(args) if isinstance(factor, Value)]
    if len(varying) != 1 or (divides and varying != [0]):
        raise NotKnown("multiplies, or divides by, what depends on the inputs: it grows with them")
    value, other = args[varying[0]], args[1 - varying[0]]
    if not isinstance(other, int | float | Tensor) or (isinstance(other, Tensor) and other.is_complex()):
        raise NotKnown(f"multiplies by a {type(other).__name__}")
    sizes = in_double(torch.as_tensor(other, dtype=None if isinstance(other, Tensor) else torch.float64)).abs()
    largest = float((1 / sizes if divides else sizes).max()) if sizes.numel() else 0.0
    if largest != largest:
        largest = math.inf
    return times(value.constant or 0.0, up(largest) if divides else largest, _expansion(value, result, [other]))


def _expansion(value: Value, result: Any, others: Sequence[Any] | None = None) -> float:
    """``√(how often broadcasting shows an entry)``."""
    if isinstance(result, Tensor) and isinstance(value.example, Tensor):
        small = max(value.example.numel(), 1)
        return root(-(-result.numel() // small))
    single = [not isinstance(o, Value) and (not isinstance(o, Tensor) or o.ndim == 0) for o in others or ()]
    if others is not None and all(single):
        return 1.0
    raise NotKnown("may broadcast its arguments, whose shapes are not known; give inputs=")


def _of_mean(key: Any, given: Any, result: Any) -> float:
    """Of n entries each: ``√n`` for a sum, ``1/√n`` for a mean."""
    is_sum = key in (torch.sum, "sum")
    if not isinstance(given, Tensor) or not isinstance(result, Tensor):
        if is_sum:
            raise NotKnown("adds up sizes that are not known; give inputs=")
        return 1.0
    number = -(-given.numel() // max(result.numel(), 1))
    return root(number) if is_sum else (up(1 / math.sqrt(number)) if number > 1 else 1.0)


def _of_index(args: Any) -> float:
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    if all(part is None or part is Ellipsis or isinstance(part, int | slice) for part in index):
        return 1.0
    raise NotKnown("is indexed by a tensor, which may take an entry several times")


def _of_matrix(key: Any, args: Any, kwargs: Any) -> float:
    """Products of an input and a constant matrix."""
    constants = [arg for arg in args[:2] if not isinstance(arg, Value)]
    if "weight" in kwargs:
        constants.append(kwargs["weight"])
    if _values((args[2:], {name: value for name, value in kwargs.items() if name != "weight"})):
        raise NotKnown("has several arguments that depend on the inputs")
    if len(constants) != 1 or not isinstance(constants[0], Tensor) or constants[0].ndim != 2:
        raise NotKnown("multiplies what depends on the inputs by itself, or by a tensor that is no matrix")
    return largest_norm(in_double(constants[0]))


# --- helpers --------------------------------------------------------------------------------------------------------


def map_aggregate(tree: Any, change: Callable[[Any], Any]) -> Any:
    """torch.fx's, over leaves of any kind."""
    return fx.node.map_aggregate(tree, change)


def _values(tree: Any) -> list[Value]:
    found: list[Value] = []

    def note(leaf: Any) -> Any:
        if isinstance(leaf, Value):
            found.append(leaf)
        return leaf

    map_aggregate(tree, note)
    return found


def _examples(tree: Any) -> Any:
    return map_aggregate(tree, lambda leaf: leaf.example if isinstance(leaf, Value) else leaf)


def _versions(tree: Any) -> list[int]:
    """Of all tensors: a change in place raises it."""
    found: list[int] = []
    map_aggregate(_examples(tree), lambda leaf: found.append(leaf._version) if isinstance(leaf, Tensor) else None)
    return found


def _listed(result: Any) -> Any:
    """torch.return_types and such as plain tuples."""
    return tuple(result) if isinstance(result, tuple) and not hasattr(result, "_fields") else result


def _only_first(args: Any, kwargs: Any) -> None:
    if not args or not isinstance(args[0], Value) or _values((args[1:], kwargs)):
        raise NotKnown("has several arguments that depend on the inputs")


def _stays_real(key: Any, tree: Any) -> None:
    """A rounding to integers is a jump, and so is another reading of the same bits."""
    dtypes: list[torch.dtype] = []
    map_aggregate(tree, lambda leaf: dtypes.append(leaf) if isinstance(leaf, torch.dtype) else None)
    if not all(dtype.is_floating_point for dtype in dtypes):
        raise NotKnown("makes integers of it")
    if dtypes and key == "view":
        raise NotKnown("reads its bits as another dtype")


def _tells_shape(key: Any, args: Any) -> bool:
    return key in functions.SHAPES or (key is getattr and args[1] in functions.SHAPES_OF)


def _memory(tensor: Any) -> int | None:
    return tensor.untyped_storage().data_ptr() if isinstance(tensor, Tensor) else None
