"""Triton's interpreter in less time, with the same results: most of what a test of small matrices takes goes into
bookkeeping.

- The interpreter exchanges the functions of ``triton.language`` for its own when a kernel is launched, and does the
  same once more, member by member, whenever the kernel calls a function that is jitted too. Here it does so once a
  launch.
- It computes whether sums and products of integers overflow, in int64, and drops the answer unless it debugs.
- It makes the type of every value, and the shape as a tuple of constants, anew. Here values of one type share them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

core: Any = tl.core


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
            if len(self.scopes) == 1:
                _share_types(self.scopes[0])
            self.patched |= self.named[fn]
        return self

    def restore(self) -> None:
        while self.scopes:
            self.scopes.pop().restore()
        self.patched = frozenset()


def _share_types(scope: Any) -> None:
    """Until the launch ends: the compiler has the language as it is."""
    scope.set_attr(core.block_type, "__init__", _block_type)
    scope.set_attr(core.tensor, "__init__", _tensor)


_make_block_type: Callable[..., None] = core.block_type.__init__
_make_tensor: Callable[..., None] = core.tensor.__init__
_blocks: dict[Any, dict[str, Any]] = {}
"""What block types have of their own, by element type and shape."""
_shapes: dict[str, tuple[Any, Any]] = {}
"""Element count and shape of tensors, as constants, by the names of their types."""


def _block_type(self: Any, element_ty: Any, shape: Any) -> None:
    key = (element_ty.name, *[getattr(size, "value", size) for size in shape])
    known = _blocks.get(key)
    if known is None:
        _make_block_type(self, element_ty, shape)
        _blocks[key] = dict(self.__dict__)
    else:
        self.__dict__.update(known)


def _tensor(self: Any, handle: Any, type: Any) -> None:
    known = _shapes.get(type.name)
    if known is None:
        _make_tensor(self, handle, type)
        _shapes[type.name] = self.numel, self.shape
    else:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = known


class _Types:
    """Stands for ``interpreter._get_np_dtype``."""

    def __init__(self, find: Callable[[Any], Any]) -> None:
        self.find = find
        self.known: dict[str, Any] = {}

    def __call__(self, dtype: Any) -> Any:
        found = self.known.get(dtype.name)
        if found is None:
            found = self.known[dtype.name] = self.find(dtype)
        return found


def make_quick() -> None:
    """Has no effect under a Triton whose interpreter patches in another way."""
    patch = getattr(interpreter, "_patch_lang", None)
    if hasattr(interpreter, "_LangPatchScope") and not isinstance(patch, _OnceALaunch):
        interpreter._patch_lang = _OnceALaunch(patch)
        interpreter._get_np_dtype = _Types(interpreter._get_np_dtype)
        builder: Any = interpreter.interpreter_builder
        if not builder.options.debug:
            builder.options = replace(builder.options, sanitize_overflow=False)
