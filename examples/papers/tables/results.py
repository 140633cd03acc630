"""What was run of a row, small enough to be kept: measures by epoch, norms of layers, seeds, hardware and commit.

Numbers are rounded to four digits, and layers are kept at 41 epochs at most; means over layers at all.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import published
from ..data import CLASSES
from ..recipe import SCALES, Recipe
from ..recipes import find, names
from ..recipes import rows as recipes_of
from ..runs.measures import generalization_gap

DIGITS = 4
LAYER_EPOCHS = 41
COLUMNS = ("epoch", "train_accuracy", "train_loss", "test_accuracy", "test_loss", "gradient_norm")
LAYER_VALUES = ("sigma", "frobenius", "stable_rank", "rank")
OWN = ("name", "method", "published", "lr", "threshold")
"""What recipes of one row may differ in; all else is the row's protocol."""

Values = list[float | None]
"""None where a number was not finite."""


@dataclass(frozen=True)
class Run:
    """One method from one seed."""

    method: str
    seed: int
    epochs: Mapping[str, Values]
    """``COLUMNS``, and ``sigma_mean`` and ``sigma_deviation`` over the layers: a value before training and one after
    each measured epoch, whose number stands in ``epoch``. Measured are all, or every n-th and the last."""
    layers: Mapping[str, Mapping[str, Any]]
    """By weight: ``LAYER_VALUES`` at ``layer_epochs``, and ``target``."""
    layer_epochs: list[int]
    about: Mapping[str, Any] = field(default_factory=dict)
    """Machine, torch, commit, settings, and what the recipe has of its own."""

    def last(self, name: str) -> float | None:
        """After the last epoch."""
        return self.epochs[name][-1]

    def trained(self, name: str) -> Values:
        """After each measured epoch, without the value before training."""
        return self.epochs[name][1:]

    def late(self, name: str, part: float) -> Values:
        """After those measured epochs that lie in the last ``part`` of the run."""
        numbers = [float(number or 0) for number in self.trained("epoch")]
        begin = (1 - part) * numbers[-1]
        return [value for number, value in zip(numbers, self.trained(name), strict=True) if number > begin]

    def best(self, name: str) -> float:
        return max((value for value in self.trained(name) if value is not None), default=0.0)

    def learned(self, chance: float) -> bool:
        """Whether its losses stayed finite, and its test accuracy came above twice that of chance."""
        losses = [*self.epochs["train_loss"], *self.epochs["test_loss"]]
        return None not in losses and self.best("test_accuracy") > 2 * chance

    def gap(self, threshold: float) -> float | None:
        """The generalization gap: the least of training accuracy less test accuracy over measured epochs whose test
        accuracy exceeds ``threshold``; None where none does."""
        pairs = zip(self.trained("train_accuracy"), self.trained("test_accuracy"), strict=True)
        known = [(train, test) for train, test in pairs if train is not None and test is not None]
        return generalization_gap([train for train, _ in known], [test for _, test in known], threshold)


@dataclass(frozen=True)
class Row:
    """What there is of a row at one scale."""

    name: str
    scale: str
    protocol: Mapping[str, Any]
    """What all recipes of the row share, and ``device`` and ``precision``, which runs that are compared share too."""
    threshold: float | None
    """The paper's, of the generalization gap."""
    runs: tuple[Run, ...] = ()
    times: Mapping[str, float] = field(default_factory=dict)
    """A training step's time over the first method's, by method."""

    @property
    def size(self) -> str:
        """What is compared and kept together: the scale, and the number of epochs where it is not the scale's own, as
        in ``full-20-epochs``."""
        own = [find(name).scaled(SCALES[self.scale]).epochs for name in names(f"{self.name}/*")]
        epochs = self.protocol["epochs"]
        return self.scale if epochs in own else f"{self.scale}-{epochs}-epochs"

    @property
    def size_in_words(self) -> str:
        """``full scale``, or ``full, 20 epochs``."""
        return f"{self.scale} scale" if self.size == self.scale else f"{self.scale}, {self.protocol['epochs']} epochs"

    @property
    def table(self) -> str:
        """Of the paper."""
        return self.name.partition("/")[0]

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(run.method for run in self.runs))

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.runs})

    def of(self, method: str) -> dict[int, Run]:
        """By seed."""
        return {run.seed: run for run in self.runs if run.method == method}

    def accuracies(self, method: str) -> dict[int, float]:
        """Of the test images after the last epoch, by seed, where finite."""
        found = {seed: run.last("test_accuracy") for seed, run in self.of(method).items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def gap_threshold(self) -> float | None:
        """The paper's, at its own scale. Else the least over the paper's methods of the mean of their best test
        accuracies, less 0.01, rounded down to 0.01: one threshold for all methods, which the paper's can reach.

        Runs that did not learn, whose losses did not stay finite or whose accuracy never came above twice that of
        chance, are not asked, nor are those of this library's own methods and of published defects. None where there
        are no others."""
        if self.threshold is not None:
            return self.threshold
        chance = 1 / CLASSES[self.protocol["data"]]
        best = [
            statistics.fmean(learned)
            for method in published.methods(self.name)
            if (learned := [run.best("test_accuracy") for run in self.of(method).values() if run.learned(chance)])
        ]
        return math.floor(100 * (min(best) - 0.01) + 1e-9) / 100 if best else None


def largest_first(rows: Iterable[Row]) -> list[Row]:
    """By scale; of one scale, its own number of epochs before others, and those from the longest on."""
    scales = list(SCALES)
    return sorted(rows, key=lambda row: (scales.index(row.scale), row.size != row.scale, -int(row.protocol["epochs"])))


def in_order(table: str, rows: Iterable[Row]) -> list[Row]:
    """Those of the table that anything was run of, in its order; of one row, the largest size first."""
    order = list(recipes_of(table))
    return sorted(
        (row for row in largest_first(rows) if row.runs and row.name in order), key=lambda row: order.index(row.name)
    )


def compact(result: Mapping[str, Any]) -> Run:
    """Of what :func:`papers.runs.running.train` gives back."""
    recipe, rows = result["recipe"], result["epochs"]
    sigmas = [[layer["sigma"][i] for layer in result["layers"].values()] for i in range(len(rows))]
    epochs = {name: [rounded(row[name]) for row in rows] for name in COLUMNS}
    epochs["sigma_mean"] = [_over(statistics.fmean, layers) for layers in sigmas]
    epochs["sigma_deviation"] = [_over(statistics.pstdev, layers) for layers in sigmas]
    kept = thinned(len(rows))
    layers = {
        name: {key: [rounded(layer[key][i]) for i in kept] for key in LAYER_VALUES}
        | {"target": _plain_target(layer.get("target"))}
        for name, layer in result["layers"].items()
    }
    about = {key: result.get(key) for key in ("machine", "torch", "commit", "settings")}
    about |= own_of(recipe)
    return Run(
        method=recipe["name"].rpartition("/")[2],
        seed=result["seed"],
        epochs=epochs,
        layers=layers,
        layer_epochs=[int(rows[i]["epoch"]) for i in kept],
        about=about,
    )


def row_of(
    recipes: Sequence[Recipe],
    runs: Sequence[Run] = (),
    times: Mapping[str, float] | None = None,
    *,
    how: Mapping[str, str] | None = None,
) -> Row:
    """Of recipes of one row at one scale, whose published threshold may be gone with the scale.

    Args:
        how: the device and precision of runs that are still to come.

    Raises:
        ValueError: runs of more than one device or precision.
    """
    first = recipes[0]
    protocol = protocol_of(first) | dict(how or how_of_all(runs))
    return Row(first.row, first.scale, protocol, first.threshold, tuple(runs), dict(times or {}))


def how_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """The device's type and the precision of forward passes, of a run's settings."""
    device = str(settings["device"]).partition(":")[0]
    return {"device": device, "precision": "bfloat16" if settings.get("bf16") else "float32"}


def how_of_all(runs: Sequence[Run]) -> dict[str, str]:
    """What they share; nothing of no runs."""
    found = list({in_words(how): how for run in runs for how in [how_of(run.about["settings"])]}.values())
    if len(found) > 1:
        raise ValueError(f"runs must be of one device and precision, got {'; '.join(map(in_words, found))}")
    return found[0] if found else {}


def in_words(how: Mapping[str, str]) -> str:
    return " ".join(how.values())


def protocol_of(recipe: Recipe) -> dict[str, Any]:
    plain: dict[str, Any] = _plain({key: value for key, value in recipe.as_dict().items() if key not in OWN})
    return plain


def own_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe, as a dictionary, does not share with its row."""
    return {key: _plain(recipe[key]) for key in OWN}


# --- numbers ----------------------------------------------------------------------------------------------------------


def rounded(value: float | None) -> float | None:
    """To four digits; None of what is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.{DIGITS}g}")


def thinned(count: int) -> list[int]:
    """Places of at most ``LAYER_EPOCHS`` of so many, evenly, the first and the last among them."""
    if count <= LAYER_EPOCHS:
        return list(range(count))
    return [round(i * (count - 1) / (LAYER_EPOCHS - 1)) for i in range(LAYER_EPOCHS)]


def _over(mean: Any, layers: Sequence[float | None]) -> float | None:
    return None if None in layers or not layers else rounded(mean(layers))


def _plain_target(target: Any) -> Any:
    return [rounded(each) for each in target] if isinstance(target, list | tuple) else rounded(target)


def _plain(tree: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(tree))
