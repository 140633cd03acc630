"""Steps that a gradient scaler skips, as the host or the device alone knows of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from specopt.session import Gate
from tests.specopt.sharding.ranks import digest, state_tensors


@contextmanager
def skipping(optimizer: Any, *, seen: bool) -> Iterator[None]:
    """The optimizer's steps are skipped, the host knowing that (``seen``) or not."""
    flag: Any = torch.ones(())
    flag.is_far = not seen
    optimizer.found_inf, optimizer.grad_scale = flag, torch.ones(())
    shut = property(lambda gate: gate.found_inf is not None and not _is_far(gate) and bool(gate.found_inf))
    with mock.patch.multiple(Gate, is_shut=shut, is_undecided=property(_is_far)):
        yield
    del optimizer.found_inf, optimizer.grad_scale


def bits_of(optimizer: Any) -> tuple[str, list[int]]:
    """Of weights and state, and the steps counted."""
    return digest(state_tensors(optimizer)), [state["spectral_step"] for state in optimizer.state.values()]


def _is_far(gate: Gate) -> bool:
    """Whether what a scaler has found stands for a number on a device, which a copy to the host is not."""
    return getattr(gate.found_inf, "is_far", False)
