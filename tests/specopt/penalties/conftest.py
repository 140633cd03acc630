"""Penalties are tested in the precision that is asked for, on a GPU too."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def without_tf32(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN rounds what float32 convolutions multiply to 10 bits unless told otherwise."""
    if device.type == "cuda":
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
