"""What makes a convolution's kernel a linear map, beside the kernel: stride, padding, dilation, groups and input size.

As text, so that groups stay what ``state_dict`` and ``torch.load(weights_only=True)`` can carry::

    conv2d(32x32)
    conv2d(32x32, stride=2x2, padding=1x0:1, dilation=2x1, groups=4, mode=reflect)
    transposed2d(8x8, stride=2x2, padding=1x1, output_padding=1x1)

Lengths of the dimensions stand with an ``x`` between them. ``before:after`` is a padding that differs on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Integral
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

MODES = ("zeros", "reflect", "replicate", "circular")
GRAMMAR = re.compile(r"(conv|transposed)([123])d\((\d+(?:x\d+)*)((?:, \w+=[\w:]+)*)\)", re.ASCII)
NUMBERS = re.compile(r"\d+(?:[x:]\d+)*", re.ASCII)
EXAMPLE = "conv2d(32x32, stride=2x2, padding=1x1)"
DEFAULTS = {"stride": 1, "padding": (0, 0), "dilation": 1, "output_padding": 0}


@dataclass(frozen=True)
class Geometry:
    """A convolution of 1 to 3 spatial dimensions on inputs of one size. Immutable and hashable.

    Args:
        size: spatial size of the input.
        stride, dilation: for each dimension.
        padding: ``(before, after)`` for each dimension. Of a transposed convolution, what is cut off its output.
        groups: blocks of channels that do not mix.
        mode: what the padding holds: zeros, or pixels of the input.
        transposed: the kernel is ``(in, out / groups, *k)``, else ``(out, in / groups, *k)``.
        output_padding: of a transposed convolution, pixels added behind its output.

    Raises:
        ValueError: numbers that describe no convolution, naming the parameter, its value and what it may be.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1
    mode: str = "zeros"
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("size", "padding"):
            if not isinstance(getattr(self, name), tuple):
                raise ValueError(f"{name} must be a tuple with an entry a dimension, got {getattr(self, name)!r}")
        if not self.output_padding:
            object.__setattr__(self, "output_padding", (0,) * self.dimensions)
        _check(self)

    @property
    def dimensions(self) -> int:
        return len(self.size)

    @classmethod
    def of(cls, module: nn.Module, size: Sequence[int]) -> Geometry:
        """That of a Conv1d, 2d, 3d or ConvTranspose1d, 2d, 3d on inputs of so many pixels ``size``.

        Raises:
            TypeError: another module.
            ValueError: a size that does not fit.
        """
        if not isinstance(module, _ConvNd):
            raise TypeError(f"module must be a Conv or ConvTranspose of torch.nn, got {type(module).__name__}")
        dimensions = len(module.kernel_size)
        if isinstance(size, int) or len(size) != dimensions:
            raise ValueError(f"size must be {dimensions} lengths for a {type(module).__name__}, got {size!r}")
        transposed = isinstance(module, _ConvTransposeNd)
        geometry = cls(
            size=tuple(int(length) for length in size),
            stride=_each(module.stride, dimensions),
            padding=_paddings(module),
            dilation=_each(module.dilation, dimensions),
            groups=module.groups,
            mode=module.padding_mode,
            transposed=transposed,
            output_padding=_each(module.output_padding, dimensions) if transposed else (),
        )
        geometry.check_kernel(tuple(module.weight.shape))
        return geometry

    def channels(self, kernel: Sequence[int]) -> tuple[int, int]:
        """Output and input channels of a kernel of this shape."""
        first, second = kernel[0], kernel[1] * self.groups
        return (second, first) if self.transposed else (first, second)

    def output_size(self, kernel: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the output for a kernel of this shape."""
        return tuple(self._output_length(dim, length) for dim, length in enumerate(kernel[2:]))

    def _output_length(self, dim: int, kernel: int) -> int:
        size, stride, padding = self.size[dim], self.stride[dim], sum(self.padding[dim])
        reach = self.dilation[dim] * (kernel - 1)
        if self.transposed:
            return (size - 1) * stride - padding + reach + self.output_padding[dim] + 1
        return (size + padding - reach - 1) // stride + 1

    def check_kernel(self, kernel: Sequence[int]) -> None:
        """
        Raises:
            ValueError: a kernel of a shape that this geometry does not fit.
        """
        shape = tuple(kernel)
        if len(shape) != self.dimensions + 2 or 0 in shape:
            raise ValueError(f"geometry {self} needs a kernel of {self.dimensions + 2} dimensions, got shape {shape}")
        if shape[0] % self.groups:
            raise ValueError(f"groups={self.groups} must divide the kernel's {shape[0]} first channels, shape {shape}")
        if min(self.output_size(shape)) < 1:
            raise ValueError(
                f"size must be such that there is an output: a kernel of shape {shape} with geometry {self} "
                f"makes one of {self.output_size(shape)}"
            )

    def __str__(self) -> str:
        name = f"{'transposed' if self.transposed else 'conv'}{self.dimensions}d"
        options = {key: getattr(self, key) for key in DEFAULTS}
        told = [f"{key}={_joined(v)}" for key, v in options.items() if v != (DEFAULTS[key],) * self.dimensions]
        told += [f"groups={self.groups}"] if self.groups != 1 else []
        told += [f"mode={self.mode}"] if self.mode != "zeros" else []
        return f"{name}({', '.join([_joined(self.size), *told])})"


def _each(value: Any, count: int) -> tuple[int, ...]:
    """A module's constructor makes tuples of numbers; whoever sets them later may leave a number."""
    return (int(value),) * count if isinstance(value, Integral) else tuple(value)


def _paddings(module: _ConvNd) -> tuple[tuple[int, int], ...]:
    count = len(module.kernel_size)
    if module.padding == "valid":
        return ((0, 0),) * count
    if module.padding == "same":  # the odd pixel goes behind
        spans = [d * (k - 1) for d, k in zip(_each(module.dilation, count), module.kernel_size, strict=True)]
        return tuple((span // 2, span - span // 2) for span in spans)
    return tuple((int(p), int(p)) for p in _each(module.padding, count))


def _check(geometry: Geometry) -> None:
    count = geometry.dimensions
    if not 1 <= count <= 3:
        raise ValueError(f"size must be 1 to 3 lengths, got {geometry.size!r}")
    for name, least in (("size", 1), ("stride", 1), ("dilation", 1), ("output_padding", 0)):
        _check_lengths(name, getattr(geometry, name), count, least)
    if len(geometry.padding) != count:
        raise ValueError(f"padding must be {count} pairs (before, after), got {geometry.padding!r}")
    for pair in geometry.padding:
        _check_lengths("padding (before, after)", pair, 2, 0)
    _check_lengths("groups", (geometry.groups,), 1, 1)
    if geometry.mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {geometry.mode!r}")
    if not isinstance(geometry.transposed, bool):
        raise ValueError(f"transposed must be True or False, got {geometry.transposed!r}")
    (_check_transposed if geometry.transposed else _check_direct)(geometry)


def _check_direct(geometry: Geometry) -> None:
    if any(geometry.output_padding):
        raise ValueError(f"output_padding must be 0 unless transposed, got {geometry.output_padding!r}")
    spare = {"reflect": 1, "circular": 0}.get(geometry.mode)
    for size, pair in zip(geometry.size, geometry.padding, strict=True):
        if spare is not None and max(pair) > size - spare:
            raise ValueError(f"padding with mode={geometry.mode!r} must be at most {size - spare} here, got {pair!r}")


def _check_transposed(geometry: Geometry) -> None:
    if geometry.mode != "zeros":
        raise ValueError(f"mode must be 'zeros' where transposed, got {geometry.mode!r}")
    if any(before != after for before, after in geometry.padding):
        raise ValueError(f"padding must be alike on both sides where transposed, got {geometry.padding!r}")
    for added, stride, dilation in zip(geometry.output_padding, geometry.stride, geometry.dilation, strict=True):
        if added >= max(stride, dilation):
            raise ValueError(f"output_padding must be below stride or dilation, got {geometry.output_padding!r}")


def _check_lengths(name: str, values: Any, count: int, least: int) -> None:
    whole = isinstance(values, tuple) and all(isinstance(v, Integral) and not isinstance(v, bool) for v in values)
    if not whole or len(values) != count or min(values) < least:
        shown = values[0] if name == "groups" else values
        raise ValueError(f"{name} must be {count} whole number(s) from {least} up, got {shown!r}")


def _joined(values: Sequence[Any]) -> str:
    return "x".join(str(v) if isinstance(v, Integral) else _side(v) for v in values)


def _side(pair: tuple[int, int]) -> str:
    before, after = pair
    return str(before) if before == after else f"{before}:{after}"


def parse(text: Any) -> Geometry:
    """The geometry that :class:`Geometry` writes as this text: ``parse(str(geometry)) == geometry``.

    Raises:
        ValueError: what is no such text.
    """
    if not isinstance(text, str):
        raise ValueError(f"geometry must be text like {EXAMPLE!r}, got {text!r}")
    return _parsed(text)


@cache
def _parsed(text: str) -> Geometry:
    found = GRAMMAR.fullmatch(text)
    if found is None:
        raise ValueError(f"geometry must be text like {EXAMPLE!r}, got {text!r}")
    kind, dimensions, size, rest = found.groups()
    pairs = [entry.split("=") for entry in rest.split(", ")[1:]]
    given = dict(pairs)
    unknown = sorted(given.keys() - {*DEFAULTS, "groups", "mode"})
    if unknown or len(given) < len(pairs):
        raise ValueError(f"geometry knows {', '.join(DEFAULTS)}, groups and mode, each at most once, got {text!r}")
    wrong = [value for name, value in given.items() if name != "mode" and not NUMBERS.fullmatch(value)]
    if wrong:
        raise ValueError(f"geometry {text!r}: {wrong[0]!r} is no number, and no lengths with an x between")
    try:
        return _built(kind, int(dimensions), size, given)
    except ValueError as error:
        raise ValueError(f"geometry {text!r}: {error}") from None


def _built(kind: str, dimensions: int, size: str, given: Mapping[str, str]) -> Geometry:
    lengths = {
        name: tuple(map(int, given[name].split("x"))) if name in given else (DEFAULTS[name],) * dimensions
        for name in ("stride", "dilation", "output_padding")
    }
    sides = [side.split(":") for side in given.get("padding", "x".join("0" * dimensions)).split("x")]
    geometry = Geometry(
        size=tuple(map(int, size.split("x"))),
        padding=tuple((int(side[0]), int(side[-1])) for side in sides if len(side) <= 2),
        groups=int(given.get("groups", 1)),
        mode=given.get("mode", "zeros"),
        transposed=kind == "transposed",
        # mypy takes what is unpacked for any of the fields
        **lengths,  # type: ignore[arg-type]
    )
    if geometry.dimensions != dimensions:
        raise ValueError(f"size must be {dimensions} lengths, got {size!r}")
    return geometry
