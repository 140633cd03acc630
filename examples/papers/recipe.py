"""A recipe: everything that decides a training run but its seed and its machine."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any

from .methods import Method

STARTS = ("default", "orthogonal")


@dataclass(frozen=True)
class Scale:
    """A run made smaller than its recipe, by the same measure for every method of a row."""

    name: str
    epochs: int | None = None
    """In place of the recipe's."""
    train: int | None = None
    """Images to train on at most; None for all."""
    test: int | None = None
    channels: float = 1.0
    """On the channels of convolutional networks and the width of an MLP."""
    batch: int = 1
    """What batch sizes are divided by, down to 32 at the least; none is larger than the set."""


FULL = Scale("full")
SCALES = {
    scale.name: scale
    for scale in (
        FULL,
        Scale("half", channels=0.5),
        Scale("cpu", epochs=8, train=4000, test=1000, channels=0.25, batch=8),
        Scale("tiny", epochs=2, train=256, test=128, channels=0.125, batch=2),
    )
}


@dataclass(frozen=True)
class Recipe:
    """A cell of a table. The learning rate falls to ``gamma`` times itself at each of ``milestones``, fractions of the
    run.

    Raises:
        ValueError: a number or a choice that makes no sense, by name.
    """

    name: str
    """Such as ``snr/vgg-cifar10-b64/snr``: table, row, method."""
    data: str
    model: str
    method: Method
    batch: int
    epochs: int
    lr: float
    model_options: Mapping[str, Any] = field(default_factory=dict)
    momentum: float = 0.9
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    augment: bool = True
    start: str = "default"
    """How weights are drawn: as the models do, normal with He's variance, or ``"orthogonal"`` times the target."""
    label_noise: float = 0.0
    """The fraction of training labels that are replaced by wrong ones."""
    threshold: float | None = None
    """The test accuracy from which on an epoch counts for the generalization gap; None where the paper has none."""
    published: bool = False
    """The published code of Norm Scaling as it was run: every layer has the first layer's target, test images are
    cropped and flipped at random, and images are normalized by CIFAR-10's mean and deviation."""
    train: int | None = None
    """Images to train on at most, drawn by the seed; None for all."""
    balanced: bool = False
    """As many training images of each class as of every other."""
    test: int | None = None
    points: int | None = None
    """How often a run is measured and kept, evenly over its epochs; None for after each epoch."""
    validation: float = 0.0
    """This fraction of the training images, the same ones for every seed, takes the place of the test images, which are
    then nowhere in the run."""
    scale: str = "full"

    def __post_init__(self) -> None:
        for name in ("batch", "epochs", "train", "test", "points"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        for name in ("lr", "gamma"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive finite number, got {getattr(self, name)!r}")
        for name, values in (
            ("milestones", self.milestones),
            ("label_noise", (self.label_noise,)),
            ("validation", (self.validation,)),
        ):
            if not all(0 <= value < 1 for value in values):
                raise ValueError(f"{name} must be fractions from 0 to below 1, got {getattr(self, name)!r}")
        if self.start not in STARTS:
            raise ValueError(f"start must be one of {', '.join(STARTS)}, got {self.start!r}")

    @property
    def row(self) -> str:
        """The recipe's name without its method."""
        return self.name.rpartition("/")[0]

    @property
    def measured(self) -> list[int]:
        """Epochs after which a run is measured, 0 for before the first."""
        points = min(self.points or self.epochs, self.epochs)
        return [round(i * self.epochs / points) for i in range(points + 1)]

    def scaled(self, scale: Scale) -> Recipe:
        """The same at a smaller scale; its threshold of the generalization gap does not carry over."""
        if scale == FULL:
            return self
        options = dict(self.model_options)
        if self.model == "mlp":
            options["width"] = max(16, round(options["width"] * scale.channels))
        else:
            options["scale"] = scale.channels
        train, test = fewer(self.train, scale.train), fewer(self.test, scale.test)
        return replace(
            self,
            model_options=options,
            epochs=scale.epochs or self.epochs,
            batch=min(self.batch, max(32, self.batch // scale.batch), train or self.batch),
            train=train,
            test=test,
            threshold=None,
            scale=scale.name,
        )

    def lasting(self, epochs: int | None) -> Recipe:
        """The same for so many epochs, where a number is given; the paper's threshold is that of its own number."""
        if epochs in (None, self.epochs):
            return self
        return replace(self, epochs=epochs, threshold=None)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for results and checkpoints."""
        return asdict(self)


def divided(count: int, classes: int) -> int:
    """Images of a balanced choice of so many at most."""
    return count - count % classes


def fewer(one: int | None, other: int | None) -> int | None:
    """None for all there are."""
    return min((count for count in (one, other) if count is not None), default=None)


def completed(found: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as :meth:`Recipe.as_dict` has it, of what an earlier version wrote: what it did not know is as if it
    were not there."""
    method = {"method": _in_order(Method, found["method"])} if "method" in found else {}
    return _in_order(Recipe, {**found, **method})


def _in_order(kind: type[Method] | type[Recipe], found: Mapping[str, Any]) -> dict[str, Any]:
    """With the defaults of what is not there; first the fields, as they are declared."""
    there = {**_defaults(kind), **found}
    return {one.name: there[one.name] for one in fields(kind) if one.name in there} | there


def _defaults(kind: type[Method] | type[Recipe]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        json.dumps({one.name: one.default for one in fields(kind) if one.default is not MISSING})
    )
    return found
