"""Which implementation of an operation runs: the torch reference or the Triton kernels."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

Backend = Literal["reference", "triton"]

ACCELERATORS = ("cuda", "xpu")  # ROCm devices call themselves "cuda" in torch


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def backend_for(device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend for tensors of one device and dtype.

    CUDA, ROCm and XPU tensors go to Triton, everything else, and float64 everywhere, to the torch reference.
    ``SPECOPT_BACKEND=reference|triton`` forces one (float64 stays with the reference); with
    ``TRITON_INTERPRET=1`` the Triton kernels also run on CPU tensors.

    Raises:
        ValueError: ``SPECOPT_BACKEND`` holds another word.
        RuntimeError: Triton is forced but not installed, or forced on a CPU tensor without its interpreter.
    """
    forced = os.environ.get("SPECOPT_BACKEND", "")
    if forced not in ("", "reference", "triton"):
        raise ValueError(f"SPECOPT_BACKEND must be 'reference' or 'triton', got {forced!r}")
    if forced == "reference" or dtype == torch.float64:
        return "reference"
    if forced == "triton":
        if not has_triton():
            raise RuntimeError("SPECOPT_BACKEND=triton, but the package triton is not installed")
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError("SPECOPT_BACKEND=triton on CPU tensors needs TRITON_INTERPRET=1")
        return "triton"
    return "triton" if device.type in ACCELERATORS and has_triton() else "reference"


def on_host(like: Tensor) -> bool:
    """Whether the torch reference runs where values may be looked at."""
    return like.device.type == "cpu" and backend_for(like.device, like.dtype) == "reference"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: what sums are kept in and what blocks are stored in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products in float32, though the user may allow TF32 or bfloat16 inside others."""
    changed: list[tuple[Any, str, Any]] = []
    try:
        for backend in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)):
            for name, full in (("fp32_precision", ("ieee", "none")), ("allow_tf32", (False,))):
                value = getattr(backend, name, None)
                if value is not None:
                    if value not in full:  # to write is dearer than to read, by far
                        setattr(backend, name, full[0])
                        changed.append((backend, name, value))
                    break
        yield
    finally:
        for backend, name, value in changed:
            setattr(backend, name, value)


def allocate(shapes: Sequence[tuple[int, int]], like: Tensor, *, zero: bool = False) -> list[Tensor]:
    """Contiguous blocks beside ``like``; on a device cut out of one allocation, so that filling them is one launch."""
    if like.device.type == "cpu":
        return [like.new_zeros(shape) if zero else like.new_empty(shape) for shape in shapes]
    starts = [0]
    for rows, columns in shapes:
        starts.append(starts[-1] + -(-rows * columns // 32) * 32)  # keeps 16-byte loads possible
    buffer = like.new_zeros(starts[-1]) if zero else like.new_empty(starts[-1])
    return [
        buffer[at : at + rows * columns].view(rows, columns)
        for at, (rows, columns) in zip(starts, shapes, strict=False)
    ]


def live(active: Tensor | None, count: int) -> Sequence[int]:
    """Indices a reference operation has to work on.

    On the CPU the mask is read, so finished matrices cost nothing; elsewhere reading it would stall the host, so all
    are computed and :func:`keep` puts the finished ones back.
    """
    if active is None or active.device.type != "cpu":
        return range(count)
    return [i for i, on in enumerate(active.tolist()) if on]


def keep(active: Tensor | None, index: int, new: Tensor, old: Tensor) -> Tensor:
    """``new`` where matrix ``index`` is active, else ``old``."""
    if active is None or active.device.type == "cpu":
        return new
    return torch.where(active[index], new, old)
