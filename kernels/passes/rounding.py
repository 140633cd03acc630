"""Stochastic rounding in torch: the same bits as the kernels', which follow the same integer steps."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF


def mixed(x: Tensor) -> Tensor:
    """A bijective hash of 32-bit integers, held in int64."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & WORD
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & WORD
    return x ^ (x >> 16)


def random_bits(seed: Tensor, salt: int, index: Tensor) -> Tensor:
    """32 random bits (int64) of each int64 ``index``, a function of it, the float32 scalar ``seed`` and ``salt``.

    ``salt`` tells the updates of one step apart: the kernels' is their ``UPDATE``.
    """
    word = seed.view(torch.int32).long() & WORD
    key = mixed(word + salt * 0x9E3779B9 & WORD)
    return mixed(mixed(key ^ (index >> 32 & WORD)) ^ (index & WORD))


def stochastic(values: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` (float32, for a half-precision ``dtype``) rounded to a neighbour in ``dtype``, up with the probability
    that makes the mean exact; as they are where ``dtype`` is float32 or float64.

    A finite value stays finite: beyond the largest number of ``dtype`` it becomes that.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return values
    bits = values.view(torch.int32).long() & WORD
    sign, size = bits & 0x80000000, bits & 0x7FFFFFFF
    finite = size < 0x7F800000
    if dtype == torch.bfloat16:
        up = torch.clamp(size + (random >> 16), max=0x7F7FFFFF)
        size = torch.where(finite, up, size | torch.where(size > 0x7F800000, 0x400000, 0))
        return _float((sign | size) & 0xFFFF0000).to(dtype)
    up = _float((size + (random >> 19)) & 0x7FFFE000).clamp_max(65504.0)
    steps = _float(size) * 2.0**24  # of a subnormal number
    low = steps.floor()
    tiny = (low + ((random >> 8).float() * 2.0**-24 < steps - low)) * 2.0**-24
    rounded = torch.where(size < 0x38800000, tiny, up)
    rounded = _float(sign | (rounded.view(torch.int32).long() & WORD))
    return torch.where(finite, rounded, values).to(dtype)


def rounded_like(
    matrix: Tensor,
    new: Tensor,
    seed: float,
    salt: int,
    *,
    rows: tuple[int, int] | None = None,
    across: bool = False,
) -> Tensor:
    """``new`` in the dtype of ``matrix``: by chance where there is a seed, to nearest at seed 0.

    Args:
        new: what some rows of ``matrix`` are to hold, or of its transpose.
        rows: from which one on and up to which; all if absent.
        across: they are rows of the transpose.
    """
    if seed == 0:
        return new.to(matrix.dtype)
    height, width = matrix.shape
    first, last = rows or (0, width if across else height)
    index = torch.arange(first, last, device=matrix.device)[:, None]
    if across:
        index = index + width * torch.arange(height, device=matrix.device)
    else:
        index = index * width + torch.arange(width, device=matrix.device)
    seeded = torch.full((), seed, dtype=torch.float32, device=matrix.device)  # a tensor of a number would wait
    return stochastic(new, random_bits(seeded, salt, index), matrix.dtype)


def _float(bits: Tensor) -> Tensor:
    """The float32 numbers of 32 bits held in int64."""
    return (bits - ((bits & 0x80000000) << 1)).to(torch.int32).view(torch.float32)
