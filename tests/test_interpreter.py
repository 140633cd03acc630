"""Tests run in an interpreter that patches once what it would patch anew in every call: it computes the same."""

import os

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from tests.interpreter import patch_once_a_launch

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or not hasattr(interpreter, "_LangPatchScope"),
    reason="no interpreter, or one that patches in another way",
)


@triton.jit
def twice(values):
    return values + values


@triton.jit
def sum_of_doubles(pointer, size: tl.constexpr):
    places = tl.arange(0, size)
    values = tl.load(pointer + places)
    for _ in range(3):
        values = twice(values)
    tl.store(pointer, tl.sum(values))


@triton.jit
def no_such_member(pointer):
    tl.store(pointer, tl.there_is_none(pointer))


def members() -> list[object]:
    return [tl.load, tl.range, tl.reduce, tl.core.reduce, tl.core.tensor.__add__, tl.math.exp]


def test_language_is_patched_once_a_launch_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = members()
    patches = []
    once = interpreter._patch_lang
    plain = once.patch
    monkeypatch.setattr(once, "patch", lambda fn: patches.append(fn) or plain(fn))
    for _ in range(2):
        x = torch.arange(4.0)
        sum_of_doubles[(1,)](x, 4)
        assert x[0] == 8 * 6
    # tl.sum is of Triton's own library, which names the language by another module.
    assert [fn.__name__ for fn in patches] == ["sum_of_doubles", "sum"] * 2
    assert members() == before


def test_kernel_that_fails_leaves_the_language_as_it_was() -> None:
    before = members()
    with pytest.raises(interpreter.InterpreterError, match="there_is_none"):
        no_such_member[(1,)](torch.zeros(1))
    assert members() == before
    assert not interpreter._patch_lang.scopes


def test_patching_twice_is_patching_once() -> None:
    once = interpreter._patch_lang
    patch_once_a_launch()
    assert interpreter._patch_lang is once
