"""Geometries beside the params of groups, from the modules that own them and what these take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import nn
from torch.nn.modules.conv import _ConvNd

from .geometry import Geometry


class InputShape(Protocol):
    """What is known of a layer's calls."""

    @property
    def input(self) -> tuple[int, ...]:
        """``(channels, *size)``, without the batch."""


def add_geometries(
    groups: Sequence[dict[str, Any]], modules: Mapping[str, nn.Module], shapes: Mapping[str, InputShape] | None
) -> None:
    """Gives the groups with ``conv="operator"`` a list ``geometry`` beside their named ``params``: a text for each
    convolution's kernel, None for all else, which stays a matrix.

    Args:
        groups: with ``params`` of (name, parameter).
        modules: by name of a parameter, the module that owns it.
        shapes: by name of a kernel, what its convolution takes.

    Raises:
        ValueError: a convolution of unknown input size, or of one that it does not fit; names the parameter.
    """
    for group in groups:
        if group.get("conv") == "operator" and group.get("spectral", True) and "geometry" not in group:
            group["geometry"] = [_text(name, modules[name], shapes) for name, _ in group["params"]]


def _text(name: str, module: nn.Module, shapes: Mapping[str, InputShape] | None) -> str | None:
    if not isinstance(module, _ConvNd) or not name.endswith("weight"):
        return None
    found = (shapes or {}).get(name)
    if found is None:
        raise ValueError(
            f"{name} is a convolution, and conv='operator' needs the size of its input: give shapes, as recorded from "
            "a forward that reaches it, or conv='matrix' for it in overrides"
        )
    try:
        return str(Geometry.of(module, found.input[1:]))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
