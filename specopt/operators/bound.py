"""``bound="flattened"``: an upper bound of a convolution's operator norm that holds for sure, from its matrix view.

A convolution's output pixel is the matrix view ``W (out, in·k·k)`` times the patch of the input under the kernel:
``y_o = Σ_t K_t x_i(o,t) = W patch_o`` over the kernel's taps t. So

    ``‖A x‖² = Σ_o ‖W patch_o‖² ≤ ‖W‖² Σ_o ‖patch_o‖² = ‖W‖² Σ_i N_i ‖x_i‖²,  hence  ‖A‖ ≤ sqrt(max_i N_i) ‖W‖``

with ``N_i`` the number of links (o, t) at which an input pixel i is read. Every such number is a product over the
dimensions, where it is counted:

- zeros: the taps of one residue class that stay inside, at most ``ceil(k · gcd(stride, dilation) / stride)``, which is
  ``ceil(k / stride)`` without dilation and ``k`` at stride 1;
- reflect, replicate, circular: the padded pixels are copies of those inside, and their links count for these: N grows,
  to ``p + 1`` times as many at a border that is replicated;
- transposed: an input pixel i is sent to ``o = i·stride + t·dilation − padding``, so N is at most k at any stride.

The same from the other side: ``Aᵀ`` is the matrix ``(in, out·k·k)`` times patches of the output, so
``‖A‖ ≤ sqrt(M · max_o N_o) ‖W_in‖`` with ``N_o`` the links of an output pixel. Of padding that copies, a tap may link
an input pixel with up to M outputs, which are summed in its patch: ``‖Σ y‖² ≤ M Σ ‖y‖²``. (From the first side M is 1:
a tap links an output pixel with one input pixel.) The bound is the lesser of the two.

Groups do not mix channels: the norm is that of the largest group, and so is the bound.

Source: Tsuzuku, Sato and Sugiyama, Lipschitz-margin training, arXiv 1802.04034, for ``sqrt(ceil(k_h/s) ceil(k_w/s))``
from the first side; Singla and Feizi, Fantastic four, arXiv 1911.10258, for sides. The count over padding is ours.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..views.parts import parse, pieces
from .geometry import Geometry

Indices = npt.NDArray[np.int64]
NUMPY_PADDING = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
OUTSIDE = -1
ROUNDING = 1 + 1e-12


@torch.no_grad()
def flattened_bound(kernel: Tensor, geometry: Geometry) -> Tensor:
    """An upper bound of the operator norm, of no dimensions and in float64: the lesser of the factors of
    :func:`flattened_factors`, each times its matrix' norm from an SVD, and 1e-12 of it more for what that may have
    rounded off. Infinite for a kernel that is not finite.

    Raises:
        ValueError: a kernel that the geometry does not fit.
    """
    by_output, by_input = flattened_factors(geometry, tuple(kernel.shape))
    weight = kernel.detach().double()
    outward, inward = "rows", "transposed"  # views with output, and with input channels as rows, of a direct kernel
    if geometry.transposed:
        outward, inward = "transposed", "rows"
    return torch.minimum(
        by_output * _largest_norm(weight, outward, geometry.groups),
        by_input * _largest_norm(weight, inward, geometry.groups),
    )


def _largest_norm(kernel: Tensor, kind: str, groups: int) -> Tensor:
    matrices = torch.stack([piece.flatten(1) for piece in pieces(kernel, parse(f"{kind}:{groups}"))])
    if not bool(matrices.isfinite().all()):
        return matrices.new_full((), math.inf)
    norms: Tensor = torch.linalg.matrix_norm(matrices, ord=2)
    return norms.amax() * ROUNDING


@cache
def flattened_factors(geometry: Geometry, kernel: tuple[int, ...]) -> tuple[float, float]:
    """By what the norm of a kernel's matrix is to be multiplied for a bound of its operator norm: of the matrix view
    ``(out, in·k·k)``, the first, and of ``(in, out·k·k)``. Of a grouped kernel's largest matrix.

    Args:
        geometry: of the convolution.
        kernel: shape of the kernel.

    Raises:
        ValueError: a kernel that the geometry does not fit.
    """
    geometry.check_kernel(kernel)
    by_output = by_input = 1
    for dim, (taps, outputs) in enumerate(zip(kernel[2:], geometry.output_size(kernel), strict=True)):
        i, o, t = _links(geometry, dim, taps, outputs)
        by_output *= _most(i) * _most(o * taps + t)
        by_input *= _most(o) * _most(i * taps + t)
    return math.sqrt(by_output), math.sqrt(by_input)


def _most(indices: Indices) -> int:
    """How often the most frequent index comes."""
    return int(np.bincount(indices).max()) if len(indices) else 0


def _links(geometry: Geometry, dim: int, taps: int, outputs: int) -> tuple[Indices, Indices, Indices]:
    """(input pixel, output pixel, tap) of all that a kernel links in one dimension."""
    size, stride, dilation = geometry.size[dim], geometry.stride[dim], geometry.dilation[dim]
    before, after = geometry.padding[dim]
    if geometry.transposed:
        i, t = (index.ravel() for index in np.indices((size, taps)))
        o = i * stride + t * dilation - before
        inside = (o >= 0) & (o < outputs)
    else:
        o, t = (index.ravel() for index in np.indices((outputs, taps)))
        i = _sources(size, before, after, geometry.mode)[o * stride + t * dilation]
        inside = i != OUTSIDE
    return i[inside], o[inside], t[inside]


def _sources(size: int, before: int, after: int, mode: str) -> Indices:
    """The pixel that each pixel of the padded input copies."""
    # zeros are no pixel, so they are padded with an index that is none
    fill = {"constant_values": OUTSIDE} if mode == "zeros" else {}
    # numpy's stubs know the arguments of a mode only where it is a literal
    return np.pad(np.arange(size), (before, after), NUMPY_PADDING[mode], **fill)  # type: ignore[call-overload,no-any-return]
