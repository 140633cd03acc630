"""What tests of wrapped optimizers share."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

import specopt

PENALTY = specopt.SpectralPenalty(0.3)
SET = specopt.NormScale()


class Bare(Optimizer):
    """Neither learning rate nor closure."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(param.grad, alpha=0.01)
