"""``specopt.certify``: bounds that hold for sure, beside what is tracked."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ..recording import unchanged
from .certificate import Certificate, CertificateRow
from .convolution import Bound
from .gram import TOLERANCE, in_double, largest_norm
from .layers import Layer, Norms, layers_of, matrix_bound
from .modules import spatial
from .network import lipschitz
from .tracked import Seen, seen_norms, tracked_norms
from .values import map_aggregate


@torch.inference_mode(False)
@torch.no_grad()
def certify(
    model: nn.Module,
    inputs: Any = None,
    optimizer: Optimizer | None = None,
    *,
    tolerance: float = TOLERANCE,
) -> Certificate:
    """Upper bounds on the spectral norm of every layer, and on the Lipschitz constant of the network, that hold for
    sure: in exact arithmetic with the weights as they are, all rounding of the bounds themselves included.

    =====================  ===========================================================================================
    layer                  bound
    =====================  ===========================================================================================
    Linear, Embedding,     Gram iteration in float64, at most ``1 + tolerance`` times the norm. Query, key and value,
    attention, gates       and the gates of RNN, LSTM and GRU, a row each.
    convolutions           the least of those of :mod:`specopt.certify.convolution`, of the operator with its stride,
                           padding, dilation and groups; for the sizes seen with ``inputs``, else for all sizes
    =====================  ===========================================================================================

    The network's constant is a product along its graph (torch.fx), with exact constants of activations, pooling,
    batch norm and the rest in :mod:`specopt.certify.modules`; residual sums add up. What no constant is known of, such
    as attention, makes it None and is named in ``unknown``. The mode each module is in counts: batch norm in training
    mode is unknown, dropout there a gain of ``1 / (1 − p)``. Weights that are parametrized are bounded as they act in
    eval mode. Nothing of the model changes: not weights, buffers, modes nor random states.

    Args:
        model: with its weights in place.
        inputs: an example (batch) that the model takes, as a tensor, a tuple of arguments or a dict of named ones. It
            is run through the model, once as it is and once along the graph, for the sizes of convolutions, pooling
            and broadcasts; without it, sums of two branches and the like are unknown, and convolutions are bounded for
            all sizes.
        optimizer: one of this package, whose tracker's norms stand beside the bounds (those of the operator for a
            convolution under ``conv="operator"``); else the norms of the matrices are measured afresh.
        tolerance: what a Gram iteration may add to a norm.

    Raises:
        TypeError: a model that is no Module, or holds a ScriptModule; an optimizer that is not under a rule of ours.
        ValueError: a tolerance that is not in (0, 1]; a parameter without values (lazy or on the meta device); inputs
            that the model does not take.

    Example::

        certificate = specopt.certify(model.eval(), inputs=batch, optimizer=optimizer)
        print(certificate)
        certificate.lipschitz
    """
    _check(model, optimizer, tolerance)
    model = _eager(model)
    args, named = _arguments(inputs)
    training = {module: module.training for module in model.modules()}
    with _untouched(model):
        norms = Norms(tolerance)
        if args is not None:
            _record_sizes(model, norms, args, named)
        layers = list(layers_of(model))
        seen = seen_norms(layers, optimizer)
        rows = [row for layer, found in zip(layers, seen, strict=True) for row in _rows(layer, found, norms)]
        given = None if args is None else [_copy(arg) for arg in args]
        constant, unknown = lipschitz(model, norms, training, given, {k: _copy(v) for k, v in named.items()})
    shapes = [tuple(arg.shape) for arg in (*(args or ()), *named.values()) if isinstance(arg, Tensor)]
    return Certificate(tuple(rows), constant, unknown, None if args is None else tuple(shapes))


def _check(model: Any, optimizer: Any, tolerance: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 < tolerance <= 1:
        raise ValueError(f"tolerance must be a number in (0, 1], got {tolerance!r}")
    if optimizer is not None:
        tracked_norms(optimizer)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"model must be of Python modules, but {name or 'it'} is a {type(module).__name__}")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"{name} is not initialized yet: run the model once before it is certified")
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device and has no values to certify")


def _eager(model: nn.Module) -> nn.Module:
    """What torch.compile was given, where that is the model."""
    original = model._modules.get("_orig_mod") if type(model).__name__ == "OptimizedModule" else None
    return model if original is None else original


def _arguments(inputs: Any) -> tuple[Sequence[Any] | None, Mapping[str, Any]]:
    if inputs is None:
        return None, {}
    if isinstance(inputs, Mapping):
        return (), inputs
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


def _copy(given: Any) -> Any:
    return map_aggregate(given, lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while, without autocast; buffers, attributes, modes and random states are put back after it."""
    kinds = {"cpu", *(param.device.type for param in model.parameters())}
    with unchanged(model), ExitStack() as stack:
        for kind in kinds:
            if torch.amp.autocast_mode.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        model.eval()
        yield


def _record_sizes(model: nn.Module, norms: Norms, args: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Sizes of what every convolution takes and gives, from a call that the bounds know nothing of.

    Raises:
        ValueError: inputs that the model does not take.
    """

    def note(module: nn.Module, given: tuple[Any, ...], by_name: dict[str, Any], result: Any) -> None:
        source = given[0] if given else by_name.get("input")
        if isinstance(module, _ConvNd) and isinstance(source, Tensor) and isinstance(result, Tensor):
            norms.sizes.setdefault(module, set()).add((spatial(source, module), spatial(result, module)))

    convolutions = [module for module in model.modules() if isinstance(module, _ConvNd)]
    handles = [module.register_forward_hook(note, with_kwargs=True) for module in convolutions]
    try:
        with unchanged(model):
            model(*map(_copy, args), **{name: _copy(value) for name, value in named.items()})
    except Exception as error:
        shapes = [tuple(a.shape) if isinstance(a, Tensor) else a for a in (*args, *named.values())]
        raise ValueError(f"inputs do not run through the model, got {shapes}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()


# --- rows -----------------------------------------------------------------------------------------------------------


def _rows(layer: Layer, seen: Seen, norms: Norms) -> Iterator[CertificateRow]:
    if layer.view is None:
        how = "nothing tells how it is read"
        yield CertificateRow(layer.name, layer.kind, tuple(layer.weight.shape), None, how, None, None, seen.by)
    elif isinstance(layer.module, _ConvNd):
        yield _convolution_row(layer, layer.module, seen, norms)
    else:
        parts = layer.pieces
        for i, (piece, sigma) in enumerate(zip(parts, seen.values, strict=True)):
            bound = (
                norms.matrix(layer.module, layer.attribute, layer.weight)
                if len(parts) == 1
                else matrix_bound(piece, norms.tolerance)
            )
            name = f"{layer.name}[{i}]" if len(parts) > 1 else layer.name
            yield CertificateRow(
                name, layer.kind, tuple(piece.shape), bound.value, bound.how, bound.value, sigma, seen.by
            )


def _convolution_row(layer: Layer, module: _ConvNd, seen: Seen, norms: Norms) -> CertificateRow:
    bound: Bound = norms.over_sizes(module)
    stacked = torch.stack([in_double(piece).flatten(1) for piece in layer.pieces])
    shape = (module.out_channels, layer.pieces[0].shape[1], *module.kernel_size)
    matrices = largest_norm(stacked, norms.tolerance)
    sigma = max((s for s in seen.values), key=lambda s: math.inf if s != s else s)
    return CertificateRow(layer.name, layer.kind, shape, bound.value, bound.how, matrices, sigma, seen.by, seen.of)
