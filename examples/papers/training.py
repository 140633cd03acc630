"""One run: a recipe, trained from one seed, in a folder of its own, which a killed run leaves fit to go on from."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from .checkpoint import identity_of
from .data import Batches, Images, evaluation
from .data.batches import Batch
from .log import Log
from .machine import Settings
from .measures import Norms, evaluate, input_gradient_norms, norms, spectra
from .methods import fill_gradients, optimizer_for, start_orthogonal
from .models import build
from .recipe import Recipe

EXAMPLES = 2
"""Images of the forward that records the layers' sizes."""
EVALUATED = 500
"""Images at once where nothing is trained."""
DIFFERENTIATED, LARGE, DIFFERENTIATED_LARGE = 250, 32 * 32, 64
"""Images at once of which gradients are measured, whose graphs are held; fewer of more pixels than CIFAR's."""
TRAIN_EVALUATED, GRADIENTS = 10_000, 1_000
"""Training images whose accuracy, and test images whose gradient, is measured after an epoch: all, or the first so many
(of a set that comes in the order of its classes, drawn by the seed)."""
VALIDATION_SEED = 0
EPOCHS_OF_A_SEED = 1_000_003
RANKED = 4
"""Whole spectra, of which ranks are counted, are made before training and so often during it."""
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class Training:
    """The state of a run between two epochs.

    Everything random comes from the seed and the number of the epoch, so a run that goes on from a checkpoint repeats
    the one that was never stopped.
    """

    def __init__(self, recipe: Recipe, images: Images, seed: int, settings: Settings = Settings()) -> None:
        self.recipe, self.settings, self.seed = recipe, settings, seed
        if recipe.validation:
            images = images.validation(round(recipe.validation * len(images.train_x)), VALIDATION_SEED)
        train, test = len(images.train_x), len(images.test_x)
        images = images.subset(min(recipe.train or train, train), min(recipe.test or test, test), seed)
        images = images.to(settings.device)
        if recipe.label_noise:
            images = images.with_label_noise(recipe.label_noise, seed)
        self.images = images
        self.mean, self.std = (CIFAR10_MEAN, CIFAR10_STD) if recipe.published else (images.mean, images.std)
        self.train = Batches(
            images.train_x,
            images.train_y,
            recipe.batch,
            mean=self.mean,
            std=self.std,
            augment=recipe.augment,
            seed=seed,
            flip=images.flips,
            memory_format=settings.memory_format,
        )
        self.model, self.optimizer = self._start()
        self.forward = cast(nn.Module, torch.compile(self.model)) if settings.compile else self.model
        self.schedule = LambdaLR(self.optimizer, self._factor)
        self.log, self.epochs_done = Log(targets=targets_of(self.optimizer, self.model)), 0

    def _start(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        recipe = self.recipe
        torch.manual_seed(self.seed)
        model = build(recipe.model, self.images.shape, self.images.classes, **recipe.model_options)
        # torch's stubs have no memory_format
        model.to(self.settings.device, memory_format=self.settings.memory_format)  # type: ignore[call-overload]
        example, _ = next(self._evaluation(self.images.test_x[:EXAMPLES], self.images.test_y[:EXAMPLES]))
        if recipe.start == "orthogonal":
            start_orthogonal(model, example, self.seed)
        optimizer = optimizer_for(
            recipe.method, model, example, lr=recipe.lr, momentum=recipe.momentum, one_target=recipe.published
        )
        return model, optimizer

    def _factor(self, step: int) -> float:
        """Of the learning rate."""
        total = self.recipe.epochs * self.train.steps
        return self.recipe.gamma ** sum(step >= round(part * total) for part in self.recipe.milestones)

    def run_epoch(self, bar: tqdm[Any] | None = None) -> None:
        """All batches of the next epoch, then a row of the log."""
        if self.epochs_done == 0 and not self.log.epochs:
            self.measure()
        torch.manual_seed(self.seed * EPOCHS_OF_A_SEED + self.epochs_done)  # of dropout
        self.forward.train()
        start = self._now()
        for images, labels in self.train.epoch(self.epochs_done):
            self.step(images, labels)
            if bar is not None:
                bar.update()
        self.log.step_ms.append(1e3 * (self._now() - start) / self.train.steps)
        self.epochs_done += 1
        self.measure()

    def step(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad()
        fill_gradients(self.recipe.method, self.forward, images, labels, self._autocast)
        self.optimizer.step()
        self.schedule.step()

    def time_step(self, images: Tensor, labels: Tensor) -> float:
        """Seconds of a step."""
        start = self._now()
        self.step(images, labels)
        return self._now() - start

    def measure(self) -> None:
        x, y = self.images.train_x[:TRAIN_EVALUATED], self.images.train_y[:TRAIN_EVALUATED]
        with self._autocast():
            train = evaluate(self.model, self._evaluation(x, y))
            test = evaluate(self.model, self._tests())
        gradients = input_gradient_norms(self.model, self._differentiated())
        row = {
            "epoch": self.epochs_done,
            "lr": float(self.schedule.get_last_lr()[0]),
            "train_accuracy": train.accuracy,
            "train_loss": train.loss,
            "test_accuracy": test.accuracy,
            "test_loss": test.loss,
            "gradient_norm": gradients.double().mean().item(),
        }
        self.log.add(row, self._layers())

    def _layers(self) -> dict[str, dict[str, float]]:
        ranked = {round(i * self.recipe.epochs / RANKED) for i in range(RANKED + 1)}
        if self.epochs_done not in ranked:
            return {name: values_of(found) | {"rank": math.nan} for name, found in norms(self.model).items()}
        return {name: values_of(found) | {"rank": found.rank} for name, found in spectra(self.model).items()}

    def _tests(self, most: int | None = None, size: int = EVALUATED) -> Iterator[Batch]:
        return self._evaluation(self.images.test_x[:most], self.images.test_y[:most], size, self.recipe.published)

    def _differentiated(self) -> Iterator[Batch]:
        _, height, width = self.images.shape
        return self._tests(GRADIENTS, DIFFERENTIATED if height * width <= LARGE else DIFFERENTIATED_LARGE)

    def _evaluation(self, x: Tensor, y: Tensor, size: int = EVALUATED, augment: bool = False) -> Iterator[Batch]:
        return evaluation(
            x,
            y,
            size,
            self.mean,
            self.std,
            augment,
            self.seed,
            flip=self.images.flips,
            memory_format=self.settings.memory_format,
        )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.settings.device).type, torch.bfloat16, enabled=self.settings.bf16)

    def _now(self) -> float:
        if torch.device(self.settings.device).type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def state(self) -> dict[str, Any]:
        return {
            **identity_of(self.recipe, self.seed, self.settings),
            "epochs_done": self.epochs_done,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "log": self.log.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.epochs_done, self.log = state["epochs_done"], Log(**state["log"])


def values_of(found: Norms) -> dict[str, float]:
    return {"sigma": found.sigma, "stable_rank": found.stable_rank, "frobenius": found.frobenius}


def targets_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, float]:
    """sigma* of each weight by name, where a rule has one; of a rule for Frobenius norms ``F* / sqrt(min(rows,
    columns))``, the root of the singular values' mean square where there are ``min(rows, columns)``."""
    names = {param: name for name, param in model.named_parameters()}
    return {
        names[param]: entry
        for group in optimizer.param_groups
        if isinstance(group.get("target"), list)
        for param, entry in zip(group["params"], group["target"], strict=True)
        if isinstance(entry, float)
    }
