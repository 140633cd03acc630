"""The grammar of ``view=``: how a parameter is cut into the matrices that it holds.

=====================  ==================================================================  ===========================
view                   the parameter                                                       its matrices
=====================  ==================================================================  ===========================
``"auto"``             ``"flatten"`` where the shape can hardly be anything else           see ``matrix.py``
``"flatten"``          ``(out, in, *kernel)``: Linear, conv                                ``(out, in·k·k)``
``"rows:G"``           G of these, one under the other: grouped conv, packed QKV, gates    G of ``(out/G, in·k·k)``
``"transposed"``       ``(in, out, *kernel)``: transposed conv, transformers' Conv1D       ``(out, in·k·k)``
``"transposed:G"``     G of these, one under the other: grouped transposed conv            G of ``(out, in/G·k·k)``
``"columns:G"``        G of these, side by side: packed QKV stored ``(in, out)``           G of ``(out/G, in·k·k)``
``"stack"``            ``(E, out, in, *kernel)``: stacked experts                          E of ``(out, in·k·k)``
``"stack-transposed"`` ``(E, in, out, *kernel)``                                           E of ``(out, in·k·k)``
``"bilinear"``         ``(out, in1, in2)``, a map of the products ``x1 ⊗ x2``              ``(out, in1·in2)``
=====================  ==================================================================  ===========================

A view is a string, so that groups stay what ``state_dict`` and ``torch.load(weights_only=True)`` can carry.
"""

from __future__ import annotations

from functools import cache
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

PLAIN = ("auto", "flatten", "transposed", "stack", "stack-transposed", "bilinear")
COUNTED = ("rows", "transposed", "columns")


class View(NamedTuple):
    kind: str
    groups: int = 1
    """G of the table above."""

    @property
    def moves_dimensions(self) -> bool:
        """The output channels are not the first dimension of a piece in memory."""
        return self.kind in ("transposed", "columns", "stack-transposed")


@cache
def _parsed(view: str) -> View | None:
    if view in PLAIN:
        return View(view)
    kind, _, count = view.partition(":")
    if kind in COUNTED and count.isascii() and count.isdigit() and int(count) >= 1:
        return View(kind, int(count))
    return None


def parse(view: Any) -> View:
    """
    Raises:
        ValueError: what is no view, naming those there are.
    """
    parsed = _parsed(view) if isinstance(view, str) else None
    if parsed is None:
        plain, counted = (", ".join(map(repr, names)) for names in (PLAIN, [f"{kind}:G" for kind in COUNTED]))
        raise ValueError(f"view must be one of {plain}, or with a count G from 1 up {counted}, got {view!r}")
    return parsed


def pieces(tensor: Tensor, view: View) -> list[Tensor]:
    """The matrices of a parameter, each as ``(out, in, *kernel)`` and sharing its memory.

    Raises:
        ValueError: a shape that the view does not fit.
    """
    kind, groups = view
    least = 3 if kind in ("stack", "stack-transposed", "bilinear") else 2
    cut = _cut(view)
    if tensor.ndim < least or tensor.shape[cut] % groups:
        length = f"dimension {cut} to be a multiple of {groups}"
        needs = f"{least} dimensions or more" if tensor.ndim < least else length
        named = f"{kind}:{groups}" if groups > 1 else kind
        raise ValueError(f"view={named!r} needs {needs}, got a weight of shape {tuple(tensor.shape)}")
    return [piece(tensor, view, index) for index in range(len(tensor) if kind.startswith("stack") else groups)]


def piece(tensor: Tensor, view: View, index: int) -> Tensor:
    """One of the :func:`pieces` of a tensor that the view fits."""
    if view.kind == "bilinear":
        return _joined(tensor)
    if view.kind.startswith("stack"):
        part = tensor[index]
    elif view.groups == 1:
        part = tensor
    else:
        cut = _cut(view)
        length = tensor.shape[cut] // view.groups
        part = tensor.narrow(cut, index * length, length)
    return part.transpose(0, 1) if view.moves_dimensions else part


@cache
def piece_shape(shape: tuple[int, ...], view: View) -> tuple[int, tuple[int, ...]]:
    """How many :func:`pieces` a parameter of this shape has, and the shape of each.

    Raises:
        ValueError: a shape that the view does not fit.
    """
    found = pieces(torch.empty(shape, device="meta"), view)
    return len(found), tuple(found[0].shape)


@cache
def readings(shape: tuple[int, ...]) -> frozenset[tuple[int, int, int]]:
    """Under all views that fit a parameter of this shape: how many matrices it is, and their rows and columns."""
    whole = torch.empty(shape, device="meta")
    # of one group they are "flatten" and "transposed", and "bilinear" has the shape of "flatten"
    found = [(view.groups, piece(whole, view, 0)) for kind in COUNTED for view in _counted(kind, shape)]
    if len(shape) > 2:
        found += [(shape[0], piece(whole, View(kind), 0)) for kind in ("stack", "stack-transposed")]
    return frozenset((count, part.shape[0], part[0].numel()) for count, part in found)


def _counted(kind: str, shape: tuple[int, ...]) -> list[View]:
    """The views of a kind whose groups divide the dimension that they cut."""
    length = shape[_cut(View(kind))]
    lower = [count for count in range(1, isqrt(length) + 1) if length % count == 0]
    return [View(kind, count) for count in {*lower, *(length // count for count in lower)}]


def _cut(view: View) -> int:
    """The dimension along which the matrices lie one after the other."""
    return 1 if view.kind == "columns" else 0


def _joined(tensor: Tensor) -> Tensor:
    """All trailing dimensions as one: they are inputs, no kernel."""
    try:
        return tensor.view(tensor.shape[0], -1)
    except RuntimeError:
        raise ValueError(
            f"a weight of shape {tuple(tensor.shape)} and strides {tensor.stride()} cannot be read with "
            'view="bilinear" without a copy; make it contiguous'
        ) from None
