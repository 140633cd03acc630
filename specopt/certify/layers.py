"""The layers of a model that hold matrices, with their weights as they act, and bounds on their norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..reading import NORMS, READERS, Kind, Reading, is_transformers_conv1d
from ..views.parts import parse, pieces
from .axes import Axis, each
from .convolution import Bound, operator_bound
from .gram import in_double, largest_norm

Sizes = tuple[tuple[int, ...], tuple[int, ...]]
"""Spatial sizes of a convolution's input and output."""
NOT_FINITE = "non-finite entries"
OLD_STYLE: tuple[type, ...] = (
    WeightNorm,
    SpectralNorm,
    BasePruningMethod,
)
"""Hooks of torch.nn.utils that compute a weight before each forward."""


@dataclass(frozen=True)
class Layer:
    """One weight, and the matrices that it is read as."""

    name: str
    kind: str
    module: nn.Module
    attribute: str
    """The module's, where the weight is."""
    weight: Tensor
    """As it acts: where it is parametrized, what is computed."""
    view: str | None
    """See :mod:`specopt.views.parts`; None where nothing tells how it is read."""

    @property
    def pieces(self) -> list[Tensor]:
        """Its matrices, each ``(out, in, *kernel)``."""
        return [] if self.view is None else pieces(self.weight, parse(self.view))


def layers_of(model: nn.Module) -> Iterator[Layer]:
    """Every weight of two dimensions or more in every module; a shared module comes once.

    Weights are read in the mode the modules are in: in eval mode, reading a parametrized one changes nothing.
    """
    inner = {
        id(part) for module in model.modules() if isinstance(module, ParametrizationList) for part in module.modules()
    }
    for prefix, module in model.named_modules():
        if id(module) in inner:
            continue
        refresh(module)
        for name in _weight_names(module):
            weight = getattr(module, name)
            if not isinstance(weight, Tensor):
                continue
            reading = _reading(module, name, weight)
            if reading is None:
                continue
            view = reading.view if is_real(weight) else None
            full = f"{prefix}.{name}" if prefix else name
            yield Layer(full, reading.why, module, name, _whole(weight.detach()), view)


def refresh(module: nn.Module) -> None:
    """Computes what a hook of torch.nn.utils computes before each forward."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, OLD_STYLE):
            hook(module, None)


def _weight_names(module: nn.Module) -> list[str]:
    names = [name for name, param in module._parameters.items() if param is not None]
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, OLD_STYLE)]
    computed = [str(getattr(hook, "name", None) or getattr(hook, "_tensor_name", "")) for hook in hooks]
    sources = {name + ending for name in computed for ending in ("_g", "_v", "_orig")}
    if parametrize.is_parametrized(module):
        computed += list(cast(nn.ModuleDict, module.parametrizations))
    return [name for name in dict.fromkeys([*names, *computed]) if name not in sources]


def _reading(module: nn.Module, name: str, weight: Tensor) -> Reading | None:
    """How a weight is read; None for what is no matrix."""
    for types, read in READERS:
        if isinstance(module, types):
            found = read(module, name)
            if found is not None:
                return found if found.kind in (Kind.MATRIX, Kind.EMBEDDING) else None
    if is_transformers_conv1d(module) and name == "weight":
        return Reading(Kind.MATRIX, "Conv1D of transformers", "transposed")
    if weight.ndim < 2 or isinstance(module, NORMS):
        return None
    return Reading(Kind.UNKNOWN, type(module).__name__)


def is_real(weight: Tensor) -> bool:
    """Whether it is a dense tensor of floating-point numbers."""
    return weight.is_floating_point() and weight.layout == torch.strided


def _whole(weight: Tensor) -> Tensor:
    """All of a sharded weight: a collective of all ranks."""
    gather = getattr(weight, "full_tensor", None)
    return gather() if callable(gather) else weight


def matrix_bound(piece: Tensor, tolerance: float) -> Bound:
    """Of one matrix ``(out, in·k·k)``."""
    value = largest_norm(in_double(piece).flatten(1), tolerance)
    how = NOT_FINITE if math.isinf(value) and not bool(piece.isfinite().all()) else "Gram iteration"
    return Bound(value, "empty" if piece.numel() == 0 else how)


@dataclass
class Norms:
    """Bounds on what modules do to their input, each computed once."""

    tolerance: float
    sizes: dict[nn.Module, set[Sizes]] = field(default_factory=dict)
    """Of the convolutions that ran, where inputs were given."""
    _known: dict[Any, Bound] = field(default_factory=dict)

    def of(self, module: nn.Module, sizes: Sizes | None = None) -> Bound:
        """The norm of a Linear, a convolution or transformers' Conv1D as a map of its input."""
        if isinstance(module, _ConvNd):
            return self._once((module, sizes), lambda: self._convolution(module, sizes))
        weight = module.weight
        assert isinstance(weight, Tensor)
        return self.matrix(module, "weight", _whole(weight.detach()))

    def over_sizes(self, module: _ConvNd) -> Bound:
        """A bound for all sizes that were seen; for any size where none was."""
        seen: list[Sizes | None] = list(self.sizes.get(module, ())) or [None]
        return max((self.of(module, sizes) for sizes in seen), key=lambda bound: bound.value)

    def matrix(self, module: nn.Module, name: str, weight: Tensor) -> Bound:
        """The norm of a module's weight, a matrix or its transpose."""
        return self._once((module, name), lambda: matrix_bound(weight, self.tolerance))

    def _once(self, key: Any, compute: Callable[[], Bound]) -> Bound:
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    def _convolution(self, module: _ConvNd, sizes: Sizes | None) -> Bound:
        weight = in_double(_whole(module.weight))
        return operator_bound(weight, axes_of(module, sizes), module.groups, self.tolerance)


def axes_of(module: _ConvNd, sizes: Sizes | None = None) -> list[Axis]:
    """The geometry of a convolution; of a transposed one, that of its adjoint, which reads its output."""
    transposed = isinstance(module, _ConvTransposeNd)
    inputs, outputs = sizes or (None, None)
    if transposed:
        inputs, outputs = outputs, inputs
    axes = []
    count = len(module.kernel_size)
    strides, dilations = each(module.stride, count), each(module.dilation, count)
    for i, kernel in enumerate(module.kernel_size):
        before, after = _padding(module, i)
        axes.append(
            Axis(
                kernel=kernel,
                stride=strides[i],
                dilation=dilations[i],
                before=before,
                after=after,
                mode=module.padding_mode,
                size=None if inputs is None else inputs[i],
                outputs=None if outputs is None else outputs[i],
            )
        )
    return axes


def _padding(module: _ConvNd, i: int) -> tuple[int, int]:
    if module.padding == "valid":
        return 0, 0
    if module.padding == "same":
        whole = each(module.dilation, i + 1)[i] * (module.kernel_size[i] - 1)
        return whole // 2, whole - whole // 2
    width = int(each(module.padding, i + 1)[i])
    return width, width
