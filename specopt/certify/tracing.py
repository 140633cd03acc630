"""Graphs of models by torch.fx, down to modules that there is a rule for and to those that cannot be traced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import fx, nn

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


class Tracer(fx.Tracer):
    """Stops at modules that there is a rule for, and at those that cannot be traced."""

    def __init__(self, errors: Errors) -> None:
        super().__init__()
        self.errors = errors

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if rule_of(module) is not None or hooks_of(module) or super().is_leaf_module(module, qualified_name):
            return True
        if module not in self.errors:
            try:
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
