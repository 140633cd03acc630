"""Graphs of models by torch.fx, down to modules that there is a rule for and to those that cannot be traced."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute

from ..recording import unchanged
from .modules import hooks_of, rule_of

Errors = dict[nn.Module, Exception | None]
"""Why a module cannot be traced; None if it can."""


@contextmanager
def in_modes(training: Mapping[nn.Module, bool]) -> Iterator[None]:
    """Modules in other modes for a while: what a ``forward`` does may depend on them."""
    before = {module: module.training for module in training}
    try:
        for module, mode in training.items():
            module.training = mode
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def _recorded(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


class InPlaceProxy(fx.Proxy):
    """Records ``h *= 10`` as ``operator.imul``. torch.fx's own proxies have no such methods, so that Python falls back
    to ``h = h * 10``, and what shares memory with h seems not to change."""

    def __getattr__(self, name: str) -> Attribute:
        return InPlaceAttribute(self, name)


class InPlaceAttribute(InPlaceProxy, Attribute):
    """Of a proxy, such as ``h.T``: it shares memory as well."""


_OPERATIONS = (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
)
IN_PLACE = {f"i{name}": getattr(operator, f"i{name}") for name in _OPERATIONS if hasattr(Tensor, f"__i{name}__")}
"""Augmented assignments that change a tensor; the others make a new one."""
for _name, _function in IN_PLACE.items():
    setattr(InPlaceProxy, f"__{_name}__", _recorded(_function))


class Tracer(fx.Tracer):
    """Stops at modules that there is a rule for, and at those that cannot be traced."""

    def __init__(self, errors: Errors) -> None:
        super().__init__()
        self.errors = errors
        self.constants: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        """Tensors that are no parameters, with a copy each, by object and version."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return InPlaceProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        """Buffers and other constants as they are when they are used: ``forward`` may change them afterwards."""
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            key = id(a), 0 if a.is_inference() else a._version
            a = self.constants.setdefault(key, (a, a.detach().clone()))[1]
        return super().create_arg(a)

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if rule_of(module) is not None or hooks_of(module) or super().is_leaf_module(module, qualified_name):
            return True
        if module not in self.errors:
            try:
                with unchanged(module):  # it is traced again as a part of what calls it
                    Tracer(self.errors).trace(module)
                self.errors[module] = None
            except Exception as error:
                self.errors[module] = error
        return self.errors[module] is not None


def untraceable(error: Exception) -> str:
    return f"cannot be traced: {first_line(error)}"


def first_line(error: Exception) -> str:
    """What an exception says, without what torch.fx adds."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
