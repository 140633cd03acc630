"""Checkpoints of a model and its optimizer by ``torch.distributed.checkpoint``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as checkpoint
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict


def save_to(folder: Path, model: nn.Module, optimizer: Any) -> None:
    checkpoint.save(_states(model, optimizer), checkpoint_id=folder)


def load_from(folder: Path, model: nn.Module, optimizer: Any, *, without: Sequence[str] = ()) -> None:
    """Into all of the state but the entries called so."""
    states = _states(model, optimizer)
    for entries in states["optimizer"]["state"].values():
        for name in without:
            entries.pop(name, None)
    checkpoint.load(states, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])


def _states(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
