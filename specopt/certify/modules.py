"""Lipschitz constants of torch's modules as maps of their input, by what their ``forward`` is.

A class with a ``forward`` of its own, or an object with hooks that may change what it computes, is another map than the
class of torch.nn that it descends from, and not known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import dropout
from torch.nn.modules import module as base
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from ..reading import is_transformers_conv1d
from .activations import ACTIVATIONS
from .gram import in_double, times, up
from .known import Call, NotKnown
from .layers import OLD_STYLE, Sizes, is_real
from .windows import WINDOWS

Gain = Callable[[Any, Call], float]


def gain_of(module: nn.Module, call: Call) -> float:
    """An upper bound on ``‖m(x) − m(y)‖ / ‖x − y‖``.

    Raises:
        NotKnown: where there is none, or we know of none.
    """
    if hooks := hooks_of(module):
        raise NotKnown(f"has hooks that may change what it computes: {', '.join(hooks)}")
    rule = rule_of(module)
    if rule is None:
        raise NotKnown(_why_unknown(module))
    return rule(module, call)


def hooks_of(module: nn.Module) -> list[str]:
    """Forward hooks, of all modules or its own, but for those of torch.nn.utils, which compute a weight."""
    before = [hook for hook in module._forward_pre_hooks.values() if not isinstance(hook, OLD_STYLE)]
    after = [*module._forward_hooks.values(), *base._global_forward_pre_hooks.values()]
    after += base._global_forward_hooks.values()
    return [getattr(hook, "__qualname__", type(hook).__name__) for hook in (*before, *after)]


def rule_of(module: nn.Module) -> Gain | None:
    """The rule of the class whose ``forward`` a module runs; None where that is no class that we know."""
    if "forward" in module.__dict__:
        return None
    if is_transformers_conv1d(module):
        return _matrix
    kind = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    # torch's stubs have no _conv_forward on the class of all convolutions
    if issubclass(kind, _ConvNd) and type(module)._conv_forward is not kind._conv_forward:  # type: ignore[attr-defined]
        return None
    return RULES.get(kind)


def _why_unknown(module: nn.Module) -> str:
    for kinds, why in REASONS.items():
        if isinstance(module, kinds):
            return why
    return "is of no type whose Lipschitz constant is known"


def spatial(given: Tensor, module: _ConvNd) -> tuple[int, ...]:
    return tuple(given.shape[-len(module.kernel_size) :])


def _matrix(module: nn.Module, call: Call) -> float:
    _check_real(module)
    return call.norms.of(module).value


def _convolution(module: _ConvNd, call: Call) -> float:
    _check_real(module)
    sizes: Sizes | None = None
    if call.input is not None and call.output is not None:
        sizes = spatial(call.input, module), spatial(call.output, module)
    return call.norms.of(module, sizes).value


def _check_real(module: nn.Module) -> None:
    weight = module.weight
    assert isinstance(weight, Tensor)
    if not is_real(weight):
        raise NotKnown(f"has a weight of {weight.dtype}, {weight.layout}")


def _dropout(module: dropout._DropoutNd, call: Call) -> float:
    if not call.training or module.p in (0, 1):
        return 1.0
    return up(1 / (1 - module.p))


def _alpha_dropout(module: dropout._DropoutNd, call: Call) -> float:
    if call.training:
        raise NotKnown("is in training mode")
    return 1.0


def _batch_norm(module: _BatchNorm | _InstanceNorm, call: Call) -> float:
    """``max |γ| / √(var + eps)``; by the statistics of a batch there is no bound that is of use."""
    if call.training or module.running_var is None:
        raise NotKnown("normalizes by the statistics of the batch" + (" (call model.eval())" if call.training else ""))
    spread = in_double(module.running_var) + module.eps
    scale = torch.ones_like(spread) if module.weight is None else in_double(module.weight).abs()
    gains = scale / torch.sqrt(spread)
    if not gains.numel():
        return 0.0
    largest = float(gains.max())
    return times(up(largest), 1 + 2.0**-48) if bool(gains.isfinite().all()) and bool((spread > 0).all()) else math.inf


def _by_own_statistics(module: Any, call: Call) -> float:
    """``max |γ| / √eps``. With ``c`` the input, centred or not, and ``s² = ‖c‖²/n + eps`` the Jacobian is
    ``(I − ccᵀ / (n s²)) / s``, times the centring: a norm of at most ``1/s <= 1/√eps``, reached where c is 0."""
    if not module.eps:
        raise NotKnown(f"has no bound for eps={module.eps}")
    largest = 1.0
    if module.weight is not None and module.weight.numel():
        largest = float(in_double(module.weight).abs().max())
    return times(largest, up(up(1 / math.sqrt(module.eps)))) if math.isfinite(largest) else math.inf


def _instance_norm(module: _InstanceNorm, call: Call) -> float:
    if module.track_running_stats and not call.training:
        return _batch_norm(module, call)
    return _by_own_statistics(module, call)


def _isometry(module: nn.Module, call: Call) -> float:
    return 1.0


RULES: dict[type[nn.Module], Gain] = {
    **ACTIVATIONS,
    **WINDOWS,
    nn.Linear: _matrix,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _convolution),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), _dropout),
    **dict.fromkeys((nn.AlphaDropout, nn.FeatureAlphaDropout), _alpha_dropout),
    **dict.fromkeys((_BatchNorm, nn.SyncBatchNorm), _batch_norm),
    **dict.fromkeys((nn.LayerNorm, nn.GroupNorm, nn.RMSNorm), _by_own_statistics),
    _InstanceNorm: _instance_norm,
    **dict.fromkeys((nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle), _isometry),
    nn.ChannelShuffle: _isometry,
}

REASONS: dict[type[nn.Module] | tuple[type[nn.Module], ...], str] = {
    (nn.Embedding, nn.EmbeddingBag): "takes indices, between which there is no l2 distance",
    (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer): (
        "has dot-product attention, which is not Lipschitz over all inputs (Kim et al., arXiv 2006.04710)"
    ),
    (nn.RNNBase, nn.RNNCellBase): "is recurrent: its constant depends on the length of the sequence and its states",
    (nn.Bilinear, nn.GLU): "multiplies what depends on the inputs: it grows with them",
    (nn.Hardshrink, nn.CrossMapLRN2d): "is not continuous, or no constant of it is known",
}
