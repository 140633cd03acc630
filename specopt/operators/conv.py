"""A convolution as a linear map between feature maps, with its adjoint and its derivative by the kernel.

With ``P`` the padding and ``C`` the convolution without one, ``A = C P`` and ``Aᵀ = Pᵀ Cᵀ``. Padding with pixels of the
input copies them, so its adjoint adds the copies up where they came from. A transposed convolution is the adjoint of a
convolution by the same kernel, from its outputs to its inputs: ``A = Cᵀ``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from specopt.kernels import accumulation_dtype

from .geometry import Geometry


@dataclass(frozen=True, eq=False)
class ConvOperator:
    """``A: (b, in, *size) → (b, out, *output_size)``, on b feature maps at once. Linear: there is no bias.

    Computes in the kernel's dtype; :meth:`of` takes that to float32, or float64. Gradients are not recorded.
    """

    kernel: Tensor
    """``(out, in / groups, *k)``, or ``(in, out / groups, *k)`` where the geometry is transposed."""
    geometry: Geometry

    @classmethod
    def of(cls, kernel: Tensor, geometry: Geometry) -> ConvOperator:
        """
        Raises:
            ValueError: a kernel that the geometry does not fit.
        """
        geometry.check_kernel(kernel.shape)
        return cls(kernel.detach().to(accumulation_dtype(kernel.dtype)), geometry)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Channels and pixels of what it takes."""
        return (self.geometry.channels(self.kernel.shape)[1], *self.geometry.size)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.geometry.channels(self.kernel.shape)[0], *self.geometry.output_size(self.kernel.shape))

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        """``A v`` of each of the ``inputs`` (b, in, *size)."""
        g = self.geometry
        with exact(inputs.device):
            if not g.transposed:
                return self._convolve(self._pad(inputs), self._inner_padding)
            return self._convolve(inputs, self._inner_padding, transposed=True)

    @torch.no_grad()
    def adjoint(self, outputs: Tensor) -> Tensor:
        """``Aᵀ u`` of each of the ``outputs`` (b, out, *output_size)."""
        with exact(outputs.device):
            if self.geometry.transposed:
                return _cropped(self._convolve(outputs, self._inner_padding), self.geometry.size)
            padded = (len(outputs), self.input_shape[0], *self._padded_size)
            return self._unpad(self._backward(outputs, outputs.new_empty(1).expand(padded), self.kernel, 0))

    @torch.no_grad()
    def kernel_gradient(self, lefts: Tensor, rights: Tensor) -> Tensor:
        """``d/dK Σ_i ⟨u_i, A v_i⟩``, shaped like the kernel, of ``lefts`` u (b, out, *output_size) and ``rights`` v.

        ``A`` is linear in ``K``, so the value itself is ``⟨K, gradient⟩``; of the first singular pair the gradient is
        that of the operator norm, ``dσ₁/dK``, where σ₁ is simple, and a subgradient anywhere.
        """
        shape = self.kernel.new_empty(1).expand(self.kernel.shape)
        with exact(lefts.device):
            if not self.geometry.transposed:
                return self._backward(lefts, self._pad(rights), shape, 1)
            # an output_padding as long as the stride gives the adjoint's convolution pixels that no input has
            added = zip(self.geometry.output_padding, self.geometry.stride, strict=True)
            beyond = [length // stride for length, stride in added]
            wide = F.pad(rights, [length for extra in reversed(beyond) for length in (0, extra)])
            return self._backward(wide, lefts, shape, 1)

    # --- the convolution without the padding that copies -----------------------------------------------------------

    @property
    def _pads_inside(self) -> bool:
        """torch's convolution pads by itself: with zeros, and as many on both sides."""
        g = self.geometry
        return g.mode == "zeros" and all(before == after for before, after in g.padding)

    @property
    def _inner_padding(self) -> tuple[int, ...]:
        return tuple(before if self._pads_inside else 0 for before, _ in self.geometry.padding)

    @property
    def _padded_size(self) -> tuple[int, ...]:
        g = self.geometry
        if self._pads_inside:
            return g.size
        return tuple(size + sum(pair) for size, pair in zip(g.size, g.padding, strict=True))

    def _convolve(self, inputs: Tensor, padding: tuple[int, ...], transposed: bool = False) -> Tensor:
        g = self.geometry
        added = g.output_padding if transposed else (0,) * g.dimensions
        outputs: Tensor = torch.ops.aten.convolution(
            inputs, self.kernel, None, g.stride, padding, g.dilation, transposed, added, g.groups
        )
        return outputs

    def _backward(self, outputs: Tensor, inputs: Tensor, kernel: Tensor, wanted: int) -> Tensor:
        """The derivative of ``⟨outputs, C inputs⟩`` by the inputs (``wanted`` 0) or by the kernel (1), of whichever
        only the shape is read."""
        g = self.geometry
        mask = [wanted == 0, wanted == 1, False]
        none = (0,) * g.dimensions
        gradients: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
            outputs, inputs, kernel, None, g.stride, self._inner_padding, g.dilation, False, none, g.groups, mask
        )
        return gradients[wanted]

    # --- the padding ------------------------------------------------------------------------------------------------

    def _pad(self, inputs: Tensor) -> Tensor:
        if self._pads_inside:
            return inputs
        mode = "constant" if self.geometry.mode == "zeros" else self.geometry.mode
        return F.pad(inputs, [length for pair in reversed(self.geometry.padding) for length in pair], mode=mode)

    def _unpad(self, padded: Tensor) -> Tensor:
        """``Pᵀ``: it acts on one dimension after the other."""
        if self._pads_inside:
            return padded
        for dim, (size, pair) in enumerate(zip(self.geometry.size, self.geometry.padding, strict=True), start=2):
            padded = _folded(padded, dim, size, pair, self.geometry.mode)
        return padded


def _folded(padded: Tensor, dim: int, size: int, pair: tuple[int, int], mode: str) -> Tensor:
    """What a dimension's padding holds, added to the pixels that it copied. In slices: an ``index_add`` would sum in
    an order that changes from run to run on a device."""
    before, after = pair
    inner = padded.narrow(dim, before, size)
    if mode == "zeros" or not (before or after):
        return inner
    inner = inner.clone()
    front, back = padded.narrow(dim, 0, before), padded.narrow(dim, before + size, after)
    if mode == "replicate":
        inner.narrow(dim, 0, 1).add_(front.sum(dim, keepdim=True))
        inner.narrow(dim, size - 1, 1).add_(back.sum(dim, keepdim=True))
    elif mode == "reflect":
        inner.narrow(dim, 1, before).add_(front.flip(dim))
        inner.narrow(dim, size - 1 - after, after).add_(back.flip(dim))
    else:
        inner.narrow(dim, size - before, before).add_(front)
        inner.narrow(dim, 0, after).add_(back)
    return inner


def _cropped(inputs: Tensor, size: tuple[int, ...]) -> Tensor:
    for dim, length in enumerate(size, start=2):
        inputs = inputs.narrow(dim, 0, length)
    return inputs


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Without autocast; and cuDNN without TF32, whose rounding (1e-3) is that of what is tracked, and with the same
    bits on every rank."""
    with ExitStack() as stack:
        if torch.amp.autocast_mode.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            enabled = torch.backends.cudnn.enabled
            stack.enter_context(
                torch.backends.cudnn.flags(enabled=enabled, benchmark=False, deterministic=True, allow_tf32=False)
            )
        yield
