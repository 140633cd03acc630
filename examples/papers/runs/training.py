"""A training run of a recipe between two epochs: from one seed, or from several at once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from ..data import Images
from ..data.seeding import Use, generator
from ..methods import groups_of, optimizer_of
from ..objective import DERIVATIVES, Batch, Objective
from ..recipe import Recipe
from .checkpoint import identity_of
from .log import Log
from .machine import Settings
from .member import Member
from .stack import merged, networks_of

EPOCHS_OF_A_SEED = 1_000_003


class Training:
    """The state of a run between two epochs.

    Everything random comes from the seed and the number of the epoch, so a run that goes on from a checkpoint repeats
    the one that was never stopped. Several seeds train as many networks at once, each as if it were alone, by one
    forward, one backward and one step: the same to rounding, but for dropout, whose masks they draw in another way.

    Raises:
        ValueError: a recipe that fits no data, or a penalty on derivatives of a compiled network.
    """

    def __init__(self, recipe: Recipe, images: Images, seeds: Sequence[int], settings: Settings = Settings()) -> None:
        if settings.compile and recipe.method.penalty in DERIVATIVES:
            raise ValueError(
                f"compile must be off for {recipe.name}: torch differentiates what it has compiled once, not twice"
            )
        self.recipe, self.settings, self.seeds = recipe, settings, tuple(seeds)
        self.members = [Member(recipe, images, seed, settings) for seed in self.seeds]
        models = [member.model for member in self.members]
        example = self.members[0].example()
        self.networks = networks_of(models, example, settings.compile)
        groups = [groups_of(recipe.method, model, example, recipe.published) for model in models]
        self.optimizer = optimizer_of(recipe.method, merged(groups), lr=recipe.lr, momentum=recipe.momentum)
        self.objective = Objective(recipe.method, self.networks.forward, self.networks.weights, self._autocast)
        self.schedule = LambdaLR(self.optimizer, self._factor)
        for member in self.members:
            member.log.targets = targets_of(self.optimizer, member.model)
        self.rate = float(self.schedule.get_last_lr()[0])
        """The learning rate of the last step."""
        self.chances: list[torch.Generator] = []
        self.epochs_done = 0

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return self.members[0].train.steps

    @property
    def logs(self) -> list[Log]:
        return [member.log for member in self.members]

    @property
    def model(self) -> nn.Module:
        """The first seed's."""
        return self.members[0].model

    def _factor(self, step: int) -> float:
        """Of the learning rate."""
        total = self.recipe.epochs * self.steps
        return self.recipe.gamma ** sum(step >= round(part * total) for part in self.recipe.milestones)

    def run_epoch(self, bar: tqdm[Any] | None = None) -> None:
        """All batches of the next epoch, then a row of the log where the recipe has one."""
        if self.epochs_done == 0 and not self.logs[0].epochs:
            self.measure()
        self.begin(self.epochs_done)
        start = self._now()
        for batch in self.batches(self.epochs_done):
            self.step(batch)
            if bar is not None:
                bar.update()
        taken = 1e3 * (self._now() - start) / self.steps / len(self.seeds)
        self.epochs_done += 1
        for log in self.logs:
            log.step_ms.append(taken)
        if self.epochs_done in self.recipe.measured:
            self.measure()

    def begin(self, epoch: int) -> None:
        """Seeds all that an epoch draws but its batches."""
        torch.manual_seed(self.seeds[0] * EPOCHS_OF_A_SEED + epoch)  # of a single network's dropout
        self.chances = [generator(Use.NOISE, seed, epoch, device=self.settings.device) for seed in self.seeds]
        self.networks.train()

    def batches(self, epoch: int) -> Iterator[Batch]:
        for some in zip(*(member.train.epoch(epoch) for member in self.members), strict=True):
            images, labels = (torch.cat(parts) if len(some) > 1 else parts[0] for parts in zip(*some, strict=True))
            self.networks.draw(self.recipe.batch, self.chances)
            yield Batch(images, labels, len(some), self._projection())

    def _projection(self) -> Tensor | None:
        """Of each network one for its batch, from its own seed."""
        if self.recipe.method.penalty != "spect-reg":
            return None
        classes, device = self.members[0].images.classes, self.settings.device
        drawn = [torch.randn(classes, generator=chance, device=device) for chance in self.chances]
        return drawn[0] if len(drawn) == 1 else torch.stack(drawn).repeat_interleave(self.recipe.batch, 0)

    def step(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        self.networks.clear()
        self.objective.fill_gradients(batch)
        self.networks.hand_over()
        self.optimizer.step()
        self.rate = float(self.schedule.get_last_lr()[0])
        self.schedule.step()

    def time_step(self, batch: Batch) -> float:
        """Seconds of a step."""
        start = self._now()
        self.step(batch)
        return self._now() - start

    def measure(self) -> None:
        for member in self.members:
            member.measure(self.epochs_done, self.rate, self._autocast())

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(torch.device(self.settings.device).type, torch.bfloat16, enabled=self.settings.bf16)

    def _now(self) -> float:
        if torch.device(self.settings.device).type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def state(self) -> dict[str, Any]:
        return {
            **identity_of(self.recipe, self.seeds, self.settings),
            "epochs_done": self.epochs_done,
            "models": [member.model.state_dict() for member in self.members],
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "logs": [log.state() for log in self.logs],
        }

    def load(self, state: dict[str, Any]) -> None:
        for member, weights, log in zip(self.members, state["models"], state["logs"], strict=True):
            member.model.load_state_dict(weights)
            member.log = Log(**log)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.epochs_done = state["epochs_done"]


def targets_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, float]:
    """sigma* of each weight of the model by name, where a rule has one; of a rule for Frobenius norms
    ``F* / sqrt(min(rows, columns))``, the root of the singular values' mean square where there are
    ``min(rows, columns)``."""
    names = {param: name for name, param in model.named_parameters()}
    return {
        names[param]: entry
        for group in optimizer.param_groups
        if isinstance(group.get("target"), list)
        for param, entry in zip(group["params"], group["target"], strict=True)
        if isinstance(entry, float) and param in names
    }
