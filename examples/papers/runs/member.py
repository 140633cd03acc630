"""One seed of a run: its images, its network, and what is measured of both."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Batches, Images, evaluation
from ..data.batches import Batch
from ..methods import start_orthogonal
from ..models import build
from ..recipe import Recipe, divided
from .log import Log
from .machine import Settings
from .measures import Norms, evaluate, input_gradient_norms, norms, spectra

EXAMPLES = 2
"""Images of the forward that records the layers' sizes."""
EVALUATED = 500
"""Images at once where nothing is trained."""
DIFFERENTIATED, LARGE, DIFFERENTIATED_LARGE = 250, 32 * 32, 64
"""Images at once of which gradients are measured, whose graphs are held; fewer of more pixels than CIFAR's."""
TRAIN_EVALUATED, GRADIENTS = 10_000, 1_000
"""Training images whose accuracy, and test images whose gradient, is measured: all, or the first so many (of a set that
comes in the order of its classes, drawn by the seed)."""
VALIDATION_SEED = 0
RANKED = 4
"""Whole spectra, of which ranks are counted, are made before training and so often during it."""
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class Member:
    """What one seed decides: which images, their order, the network's first weights."""

    def __init__(self, recipe: Recipe, images: Images, seed: int, settings: Settings) -> None:
        self.recipe, self.settings, self.seed = recipe, settings, seed
        self.images = chosen(recipe, images, seed).to(settings.device)
        if recipe.label_noise:
            self.images = self.images.with_label_noise(recipe.label_noise, seed)
        self.mean, self.std = (CIFAR10_MEAN, CIFAR10_STD) if recipe.published else (images.mean, images.std)
        self.train = Batches(
            self.images.train_x,
            self.images.train_y,
            recipe.batch,
            mean=self.mean,
            std=self.std,
            augment=recipe.augment,
            seed=seed,
            flip=images.flips,
            memory_format=settings.memory_format,
        )
        self.model, self.log = self._network(), Log()

    def _network(self) -> nn.Module:
        torch.manual_seed(self.seed)
        model = build(self.recipe.model, self.images.shape, self.images.classes, **self.recipe.model_options)
        # torch's stubs have no memory_format
        model.to(self.settings.device, memory_format=self.settings.memory_format)  # type: ignore[call-overload]
        if self.recipe.start == "orthogonal":
            start_orthogonal(model, self.example(), self.seed)
        return model

    def example(self) -> Tensor:
        """Some images as the network gets them."""
        images, _ = next(self._evaluation(self.images.test_x[:EXAMPLES], self.images.test_y[:EXAMPLES]))
        return images

    def measure(self, epoch: int, lr: float, autocast: AbstractContextManager[Any]) -> None:
        """Adds a row to the log."""
        x, y = self.images.train_x[:TRAIN_EVALUATED], self.images.train_y[:TRAIN_EVALUATED]
        with autocast:
            train = evaluate(self.model, self._evaluation(x, y))
            test = evaluate(self.model, self._tests())
        gradients = input_gradient_norms(self.model, self._differentiated())
        row = {
            "epoch": epoch,
            "lr": lr,
            "train_accuracy": train.accuracy,
            "train_loss": train.loss,
            "test_accuracy": test.accuracy,
            "test_loss": test.loss,
            "gradient_norm": gradients.double().mean().item(),
        }
        self.log.add(row, self._layers(epoch))

    def _layers(self, epoch: int) -> dict[str, dict[str, float]]:
        measured = self.recipe.measured
        ranked = {measured[round(i * (len(measured) - 1) / RANKED)] for i in range(RANKED + 1)}
        if epoch not in ranked:
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


def chosen(recipe: Recipe, images: Images, seed: int) -> Images:
    """Those of a data set that a run has."""
    if recipe.validation:
        images = images.validation(round(recipe.validation * len(images.train_x)), VALIDATION_SEED)
    train, test = len(images.train_x), len(images.test_x)
    train, test = min(recipe.train or train, train), min(recipe.test or test, test)
    if recipe.balanced:
        train = divided(train, images.classes)
    return images.subset(train, test, seed, balanced=recipe.balanced)


def values_of(found: Norms) -> dict[str, float]:
    return {"sigma": found.sigma, "stable_rank": found.stable_rank, "frobenius": found.frobenius}
