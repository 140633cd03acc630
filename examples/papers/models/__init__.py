"""The papers' networks by name, at the size of CIFAR's images.

Every network calls its classifier ``head`` and the convolutions on its residual shortcuts ``downsample``, so that a
recipe leaves them out of control by pattern: ``{"head*": {"spectral": False}, "*downsample*": {"spectral": False}}``.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from .densenet import densenet40
from .lenet import LeNet, LeNet5
from .mlp import MLP
from .nin import NIN
from .parts import Shape, check_input, he_normal_
from .resnet import resnet34, resnet50, resnet50_cifar
from .vgg import VGG16

__all__ = ["NAMES", "build", "he_normal_"]

_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "lenet5": LeNet5,
    "lenet": LeNet,
    "vgg16": VGG16,
    "nin": NIN,
    "densenet40": densenet40,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet50-cifar": resnet50_cifar,
}
NAMES = tuple(_NETWORKS)


def build(name: str, shape: tuple[int, int, int], classes: int, **options: Any) -> nn.Module:
    """A network with He et al.'s initial weights (:func:`he_normal_`), the same after the same ``torch.manual_seed``.

    ===================  ==========================================================  ===================================
    name                 network                                                     options, with their defaults
    ===================  ==========================================================  ===================================
    ``mlp``              Linear layers with ReLU between                             ``depth=5, width=2000``
    ``lenet5``           three 5 x 5 convolutions, 6-16-120-84                       ``dropout=0, batch_norm=False``
    ``lenet``            two 5 x 5 convolutions, 20-50-500                           ``dropout=0, batch_norm=False``
    ``vgg16``            thirteen 3 x 3 convolutions with batch norm, a linear head  -
    ``nin``              Network in Network                                          ``dropout=0.5, batch_norm=False``
    ``densenet40``       three dense blocks, no bottleneck, no compression           ``depth=40, growth=12, dropout=0``
    ``resnet34``         basic blocks, 3 x 3 stem                                    -
    ``resnet50``         the standard one: bottlenecks, 7 x 7 stem, max-pool         -
    ``resnet50-cifar``   bottlenecks, 3 x 3 stem, no max-pool                        -
    ===================  ==========================================================  ===================================

    All but ``mlp`` also take ``scale=1.0``, which multiplies the channels (and a hidden layer's width), rounded to a
    multiple of 8 and at least 8.

    Args:
        name: one of :data:`NAMES`.
        shape: ``(C, H, W)`` of an image.
        classes: how many logits the network gives.
        **options: the network's, as in the table.

    Raises:
        ValueError: another name, or an option that the network does not take, with the near ones; a shape that is too
            small for the network; a value out of its range.
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}{_near(name, NAMES)}")
    check_input(shape, classes)
    network = _NETWORKS[name]
    known = [each.name for each in inspect.signature(network).parameters.values() if each.kind is each.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise ValueError(f"{name} takes the options {', '.join(known)}, got {option!r}{_near(option, known)}")
    return he_normal_(network(Shape(*shape), classes, **options))


def _near(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word), list(words))
    return f" (near: {', '.join(near)})" if near else ""
