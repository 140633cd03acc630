"""What is written into matrices: rank-r updates and scalings; and their Frobenius norms."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..backend import accumulation_dtype, backend_for
from . import reference

MAX_RANK = 64


def rank_updates_(
    matrices: Sequence[Tensor], coefficients: Tensor, lefts: Sequence[Tensor], rights: Sequence[Tensor]
) -> None:
    """``W_b ← W_b + Σ_i c_bi u_bi v_biᵀ`` in place, summed in float32 (float64) and rounded once.

    An entry whose new value would not be finite keeps its old one; a matrix whose coefficients are all zero is not
    touched.

    Args:
        matrices: (m_b, n_b), any strides.
        coefficients: ``c`` (B, r), r <= 64.
        lefts: (m_b, >= r), of which the first r columns are the ``u_bi``; unit column stride.
        rights: (n_b, >= r), likewise.
    """
    rank = coefficients.shape[1]
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"rank must be 1 to {MAX_RANK}, got {rank}")
    if _triton(matrices):
        from . import device

        device.rank_updates_(matrices, coefficients, lefts, rights)
    else:
        reference.rank_updates_(matrices, coefficients, lefts, rights)


def frobenius_norms(matrices: Sequence[Tensor]) -> Tensor:
    """``‖W_b‖_F`` (B,) in float32 (float64), scaled by the largest entry before squaring.

    Non-finite where an entry is.
    """
    if _triton(matrices):
        from . import device

        return device.frobenius_norms(matrices)
    return reference.frobenius_norms(matrices)


def scale_(matrices: Sequence[Tensor], factors: Tensor) -> None:
    """``W_b ← f_b W_b`` in place; a matrix whose factor is exactly 1 is not touched, nor an entry that would stop
    being finite.

    Args:
        matrices: (m_b, n_b), any strides.
        factors: ``f`` (B,).
    """
    if _triton(matrices):
        from . import device

        device.scale_(matrices, factors)
    else:
        reference.scale_(matrices, factors)


def _triton(matrices: Sequence[Tensor]) -> bool:
    first = matrices[0]
    return backend_for(first.device, accumulation_dtype(first.dtype)) == "triton"
