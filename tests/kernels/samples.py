"""Matrices and blocks to try the kernels on, and how exact a result has to be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

SCALES = {
    torch.float32: (1e-30, 1.0, 1e30),
    torch.bfloat16: (1e-30, 1.0, 1e30),
    torch.float16: (1e-3, 1.0, 1e2),
}
LAYOUTS = ("rows", "columns", "sliced", "stepped", "channels last", "channels last, transposed")

Case = tuple[int, int, torch.dtype, str, int]
"""Rows, columns, dtype, layout, and which of the dtype's scales."""

cases = st.tuples(
    st.integers(1, 150), st.integers(1, 150), st.sampled_from(list(SCALES)), st.sampled_from(LAYOUTS), st.integers(0, 2)
)
case_lists = st.lists(cases, min_size=1, max_size=4)
widths = st.integers(1, 64)
seeds = st.integers(0, 2**31 - 1)


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(case: Case, random: torch.Generator, device: torch.device) -> Tensor:
    """A matrix of one case; it may have fewer entries than asked for where the layout needs a multiple of four."""
    rows, columns, dtype, layout, scale = case

    def noise(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=random) * SCALES[dtype][scale]
        return values.clamp(-torch.finfo(dtype).max / 4, torch.finfo(dtype).max / 4).to(device, dtype)

    if layout == "columns":
        return noise(columns, rows).mT
    if layout == "sliced":
        return noise(rows + 1, columns + 5)[1:, 3:-2]
    if layout == "stepped":
        return noise(2 * rows, 3 * columns)[::2, ::3]
    if layout == "channels last":  # (out, in, 2, 2), read as (out, 2 * 2 * in)
        weight = noise(rows, max(columns // 4, 1), 2, 2).to(memory_format=torch.channels_last)
        return weight.permute(0, 2, 3, 1).flatten(1)
    if layout == "channels last, transposed":  # (in, out, 2, 2), read as (out, in * 2 * 2)
        weight = noise(max(columns // 4, 1), rows, 2, 2).to(memory_format=torch.channels_last)
        return weight.permute(1, 0, 2, 3).flatten(1)
    return noise(rows, columns)


def copy(tensor: Tensor) -> Tensor:
    """The same values at the same strides."""
    fresh = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return fresh.copy_(tensor)


def block(rows: int, columns: int, random: torch.Generator, device: torch.device, scale: float = 1.0) -> Tensor:
    """A float32 block: a slice of the columns of a wider one for odd numbers of rows."""
    wide = (torch.randn(rows, columns + 3 * (rows % 2), generator=random) * scale).to(device)
    return wide[:, :columns]


def assert_as_exact(result: Tensor, reference: Tensor, truth: Tensor, size: float | Tensor | None = None) -> None:
    """``result`` is as near to the float64 ``truth`` as the torch reference is, within a factor of two."""
    assert result.isfinite().all()
    truth = truth.double()
    size = torch.linalg.vector_norm(truth) if size is None else size
    error = torch.linalg.vector_norm(result.double() - truth)
    allowed = 2 * torch.linalg.vector_norm(reference.double() - truth) + 1e-6 * size
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}, size {size:.3g}"


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """The same bits."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
