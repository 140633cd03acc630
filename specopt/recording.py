"""Sizes of what layers take and give, recorded from one forward that leaves no trace in the model."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .reading import Kind, Owned, Reading, readings_of
from .views.parts import parse, pieces

GENERATORS = ("cuda", "xpu")
"""Device types with a random state of their own that a forward may move on."""


@dataclass(frozen=True)
class LayerShapes:
    """What a layer takes and gives, without the batch: ``(C, *positions)`` of a convolution, ``(features,)`` of every
    other map, whatever dimensions of tokens or time there are beside."""

    input: tuple[int, ...]
    output: tuple[int, ...]

    @property
    def positions(self) -> float:
        """Positions of the output over those of the input: 1/4 for a convolution of stride 2 on an image."""
        return math.prod(self.output[1:]) / math.prod(self.input[1:])


def record_shapes(model: nn.Module, *inputs: Any, **kwargs: Any) -> dict[str, LayerShapes]:
    """What every layer with a weight matrix takes and gives in ``model(*inputs, **kwargs)``, by name of the weight.

    One forward without gradients, in the mode (training or evaluation) that the model is in. Buffers, such as the
    running statistics of batch norm, other attributes of modules and torch's random state are afterwards what they
    were, also where the forward raises.

    Names are those of ``model.named_parameters()``: a tied weight stands under the first of its own. A parameter whose
    layer is not called is absent, as are those that :func:`specopt.param_groups` does not read as matrices.

    A layer that is called several times has the shapes of the call with the most input positions, of the first among
    equals. (With zero padding the convolution of a smaller image is part of that of a larger one, so that its norm is
    no larger.) A parameter that holds several matrices, such as an LSTM's gates, has the features of one of them.

    Raises:
        TypeError: a model that is no Module.
        ValueError: a parameter not yet initialized.

    Example::

        shapes = specopt.record_shapes(model, images)
        shapes["conv1.weight"].input  # (3, 32, 32)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found: dict[str, LayerShapes] = {}
    with ExitStack() as stack:
        for places, reading in readings_of(model):
            if reading.kind is Kind.MATRIX:
                for owned in places:
                    hook = _Hook(found, places[0].name, _features(owned, reading))
                    handle = _called(owned).register_forward_hook(hook, with_kwargs=True)
                    stack.callback(handle.remove)
        with torch.no_grad(), _eager(), unchanged(model):
            model(*inputs, **kwargs)
    return {name: found[name] for name, _ in model.named_parameters() if name in found}


def record_call(model: nn.Module, inputs: Any) -> dict[str, LayerShapes]:
    """:func:`record_shapes` of one call: a dict is its keywords, a tuple or list its arguments, all else the only
    one."""
    if isinstance(inputs, Mapping):
        return record_shapes(model, **inputs)
    return record_shapes(model, *inputs) if isinstance(inputs, tuple | list) else record_shapes(model, inputs)


class _Hook:
    """Notes the shapes of a module's calls for one parameter."""

    def __init__(self, found: dict[str, LayerShapes], name: str, features: LayerShapes) -> None:
        self.found, self.name, self.features = found, name, features

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        shapes = self.features
        if isinstance(module, _ConvNd):
            lengths = 1 + len(module.kernel_size)  # the channels and what follows: there may be no batch
            taken = args[0] if args else kwargs["input"]
            shapes = LayerShapes(tuple(taken.shape[-lengths:]), tuple(output.shape[-lengths:]))
        before = self.found.get(self.name)
        if before is None or math.prod(shapes.input[1:]) > math.prod(before.input[1:]):
            self.found[self.name] = shapes


def _features(owned: Owned, reading: Reading) -> LayerShapes:
    """Of one of the parameter's matrices."""
    assert reading.view is not None
    rows, columns = pieces(torch.empty(owned.param.shape, device="meta"), parse(reading.view))[0].shape[:2]
    return LayerShapes((columns,), (rows,))


def _called(owned: Owned) -> nn.Module:
    """The module whose call uses the parameter: attention calls no ``out_proj``, but hands its weight to a function."""
    around = owned.path[-2][1] if len(owned.path) > 1 else None
    return around if isinstance(around, nn.MultiheadAttention) else owned.module


@contextmanager
def _eager() -> Iterator[None]:
    """Where modules are called as such: torch.compile would compile them again, with the hooks."""
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Afterwards the buffers and attributes of all modules, and torch's random state, are what they were."""
    with _random_state(model), _attributes(model):
        yield


@contextmanager
def _random_state(model: nn.Module) -> Iterator[None]:
    """Puts torch's random state back, that of the CPU and of the devices that the model is on."""
    devices = {tensor.device for tensors in (model.parameters(), model.buffers()) for tensor in tensors}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in GENERATORS:
            indices = [device.index or 0 for device in devices if device.type == kind]
            if indices:
                stack.enter_context(torch.random.fork_rng(devices=indices, device_type=kind))
        yield


@contextmanager
def _attributes(model: nn.Module) -> Iterator[None]:
    """Copies in place of the buffers and of tensors that are attributes; then every module's attributes as they were,
    the buffers themselves among them."""
    held = [entries for module in model.modules() for entries in (vars(module), module._buffers)]
    before = [(entries, dict(entries)) for entries in held]
    copies: dict[Tensor, Tensor] = {}  # one that modules share stays shared
    for entries, old in before:
        for name, value in old.items():
            if isinstance(value, Tensor):
                if value not in copies:
                    copies[value] = value.detach().clone()
                entries[name] = copies[value]
    try:
        yield
    finally:
        for entries, old in before:
            entries.clear()
            entries.update(old)
