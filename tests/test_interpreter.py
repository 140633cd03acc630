"""Tests run in an interpreter that does less bookkeeping than Triton's own: it computes the same."""

import os

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from tests.interpreter import _make_block_type, _make_tensor, make_quick

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
    types = [tl.core.block_type.__init__, tl.core.tensor.__init__]
    return [tl.load, tl.range, tl.reduce, tl.core.reduce, tl.core.tensor.__add__, tl.math.exp, *types]


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


@triton.jit
def of_all_sorts(numbers, halves, integers, out, size: tl.constexpr):
    rows, columns = tl.arange(0, size)[:, None], tl.arange(0, size)[None, :]
    places = rows * size + columns
    values = tl.load(numbers + places, mask=columns < size - 1, other=2.0)
    half = tl.load(halves + places).to(tl.float32)
    product = tl.dot(values, tl.trans(half), input_precision="ieee")
    large = tl.load(integers + tl.arange(0, size))
    wrapped = (large * 65537 + large).to(tl.int64)  # beyond int32
    unsigned = large.to(tl.uint32, bitcast=True) >> 7
    product += tl.sum(tl.where(values > half, values, 1.0), 1)[:, None] / (10 + wrapped[None, :] % 9)
    product += tl.max(unsigned, 0) % 5
    tl.store(out + places, tl.exp(-tl.abs(product)))


def test_results_are_those_of_the_interpreter_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    size, once = 16, interpreter._patch_lang
    numbers, halves = torch.randn(size, size), torch.randn(size, size).bfloat16()
    integers = torch.arange(size, dtype=torch.int32) * 123_456_789
    found = []
    for quick in (True, True, False):
        if not quick:
            builder = interpreter.interpreter_builder
            monkeypatch.setattr(builder, "options", type(builder.options)())
            monkeypatch.setattr(interpreter, "_patch_lang", once.patch)
            monkeypatch.setattr(interpreter, "_get_np_dtype", interpreter._get_np_dtype.find)
            assert builder.options.sanitize_overflow and not builder.options.debug
        out = torch.zeros(size, size)
        of_all_sorts[(1,)](numbers, halves, integers, out, size)
        found.append(out)
        assert (tl.core.block_type.__init__, tl.core.tensor.__init__) == (_make_block_type, _make_tensor)
    assert found[0].unique().numel() > size and torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_kernel_that_fails_leaves_the_language_as_it_was() -> None:
    before = members()
    with pytest.raises(interpreter.InterpreterError, match="there_is_none"):
        no_such_member[(1,)](torch.zeros(1))
    assert members() == before
    assert not interpreter._patch_lang.scopes


def test_patching_twice_is_patching_once() -> None:
    once = interpreter._patch_lang
    make_quick()
    assert interpreter._patch_lang is once
