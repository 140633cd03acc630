"""The norm of one convolution in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from .bound import flattened_bound
from .conv import ConvOperator
from .geometry import Geometry, parse
from .tracker import START, follow, start


@torch.no_grad()
def operator_norm(kernel: Tensor, geometry: Geometry | str, *, bound: str | None = None) -> Tensor:
    """The norm of the map that a kernel makes, of no dimensions, from nothing.

    Args:
        kernel: ``(out, in / groups, *k)``, or ``(in, out / groups, *k)`` where transposed.
        geometry: :meth:`Geometry.of` a module and a size, or its text.
        bound: None for the norm itself, to about 1e-3 from below; ``"flattened"`` for an upper bound that holds for
            sure, see :func:`flattened_bound`.

    Raises:
        ValueError: a kernel that the geometry does not fit, or another bound.

    Example::

        conv = torch.nn.Conv2d(3, 64, 7, stride=2, padding=3)
        geometry = Geometry.of(conv, (224, 224))
        operator_norm(conv.weight, geometry) <= operator_norm(conv.weight, geometry, bound="flattened")
    """
    if not isinstance(geometry, Geometry):
        geometry = parse(geometry)
    if bound == "flattened":
        return flattened_bound(kernel, geometry)
    if bound is not None:
        raise ValueError(f"bound must be None or 'flattened', got {bound!r}")
    operator = ConvOperator.of(kernel, geometry)
    return follow([operator], start([operator]), START).sigma[0]
