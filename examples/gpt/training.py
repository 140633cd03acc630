"""A training that is the same on any number of ranks, in any of the three ways, and from any checkpoint on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from . import checkpoints
from .model import Shape, capped_adamw, gpt
from .parallel import share_of, spread_out, summed
from .text import Text


@dataclass(frozen=True)
class Recipe:
    """What decides every number of a training, but for rounding."""

    shape: Shape = field(default_factory=Shape)
    batch: int = 32
    """Windows in a step, of all ranks together."""
    lr: float = 3e-3
    warm_up: int = 20
    """Steps until the learning rate is there."""
    cap: float = 1.5
    seed: int = 0


class Training:
    """One rank's part of a training."""

    def __init__(self, recipe: Recipe, text: Text, way: str, device: torch.device) -> None:
        self.recipe, self.text, self.device, self.step = recipe, text, device, 0
        self.model = gpt(len(text.characters), recipe.shape, recipe.seed)
        self.forward = spread_out(self.model, way, device)
        self.optimizer = capped_adamw(self.model, recipe.lr, recipe.cap)

    def advance(self) -> Tensor:
        """One step; the loss of this rank's share of the batch."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * min(1.0, (self.step + 1) / recipe.warm_up)
        self.optimizer.zero_grad()
        loss = self._loss(self.forward, share_of(self.text.batch(recipe.seed, self.step, recipe.batch)))
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.step += 1
        return loss.detach()

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Over all windows that are not trained on. Under ``fully_shard`` a forward takes all ranks, so each makes
        exactly one, of no windows too."""
        own = share_of(self.text.held_out)
        total = self._loss(self.model, own, "sum").double()
        total, count = summed(torch.stack([total, torch.full_like(total, own[:, 1:].numel())])).tolist()
        return float(total / count)

    def _loss(self, model: nn.Module, windows: Tensor, reduction: str = "mean") -> Tensor:
        windows = windows.to(self.device)
        return nn.functional.cross_entropy(model(windows[:, :-1]), windows[:, 1:].flatten(), reduction=reduction)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint of this training must agree with."""
        return {**asdict(self.recipe), "text": self.text.check}

    def save(self, folder: Path) -> None:
        checkpoints.save(folder, self.step, self.states(), self.identity())

    def resume(self, folder: Path) -> bool:
        """Takes up the newest whole checkpoint, of any number of ranks and any way; whether there was one.

        Raises:
            ValueError: checkpoints of another recipe or text, none of them whole, or a state that the optimizer
                refuses. Nothing has been taken up.
        """
        found = checkpoints.newest(folder, self.identity())
        if found is None:
            return False
        step, path = found
        states = checkpoints.read(path, self.states())
        # The optimizer's goes first, and it alone may still refuse: that the model's fits is seen in reading.
        set_state_dict(
            self.model, self.optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"]
        )
        self.step = step
        return True

    def states(self) -> dict[str, Any]:
        """What a checkpoint holds: tensors share the memory of what is trained."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}
