"""The geometry of a layer, from its module and from what that takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import nn
from torch.nn.modules.conv import _ConvNd

from .geometry import Geometry


class InputShape(Protocol):
    """What is known of a layer's calls."""

    @property
    def input(self) -> tuple[int, ...]:
        """``(channels, *size)``, without the batch."""


def geometry_text(name: str, owners: Sequence[nn.Module], shapes: Mapping[str, InputShape] | None) -> str | None:
    """What a group with ``conv="operator"`` holds of a parameter: the text of a convolution's :class:`Geometry`; None
    of anything else, which stays a matrix.

    Args:
        name: the parameter's.
        owners: the modules that have it; several where it is tied.
        shapes: by name of a kernel, what its convolution takes.

    Raises:
        ValueError: a convolution of unknown input size, or of one that it does not fit; a kernel that is tied, and not
            to a convolution of the same geometry; names the parameter.
    """
    if not isinstance(owners[0], _ConvNd) or not name.endswith("weight"):
        return None
    found = (shapes or {}).get(name)
    if found is None:
        raise ValueError(
            f"{name} is a convolution, and conv='operator' needs the size of its input: give inputs= that reach it, or "
            "conv='matrix' for it in overrides"
        )
    try:
        texts = [str(Geometry.of(module, found.input[1:])) for module in owners]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None
    if len(set(texts)) > 1:
        raise ValueError(
            f"{name} is the kernel of different convolutions, {' and '.join(dict.fromkeys(texts))}, and has a norm "
            "under each: give conv='matrix' for it in overrides"
        )
    return texts[0]
