"""Made-up results, as training gives them back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from papers.recipe import Scale
from papers.recipes import find
from papers.tables.results import Row, compact, row_of

LAYERS = ("layers.0.weight", "layers.1.weight", "head.weight")
EPOCHS = 4
TINY = Scale("tiny", epochs=EPOCHS, train=256, test=128)

Last = Mapping[str, float]
"""What a made-up run ends with; see :func:`result`."""


def result(name: str, seed: int, scale: Scale = TINY, **last: float) -> dict[str, Any]:
    """Of a run that is measured as its recipe says, and goes evenly from chance to ``test`` and ``train`` accuracy,
    ``test_loss``, ``gradient_norm``, ``sigma``, the mean over layers, ``uneven``, their deviation over it, and
    ``rest``, the norm beside the first direction; ``rise`` is the log of the last test loss over the least before it.
    """
    asked = {"test": 0.5, "train": 0.6, "test_loss": 2.0, "gradient_norm": 1.0}
    asked |= {"sigma": 2.0, "uneven": 0.1, "rest": 4.0, "rise": 0.0, **last}
    recipe = find(name).scaled(scale)
    parts = np.array(recipe.measured) / recipe.epochs
    factors = 1 + asked["uneven"] * np.array([-1.0, 1.0, 0.0]) * math.sqrt(1.5)
    sigma = 1 + parts[:, None] * (asked["sigma"] * factors - 1)
    frobenius = np.hypot(sigma, asked["rest"])
    least = asked["test_loss"] * math.exp(-asked["rise"])
    epochs = [
        {
            "epoch": epoch,
            "lr": recipe.lr,
            "train_accuracy": 0.1 + part * (asked["train"] - 0.1),
            "train_loss": 4.6 - part,
            "test_accuracy": 0.1 + part * (asked["test"] - 0.1),
            "test_loss": asked["test_loss"] if part == 1 else least + 3 * (parts[-2] - part),
            "gradient_norm": part * asked["gradient_norm"],
        }
        for epoch, part in zip(recipe.measured, parts, strict=True)
    ]
    layers = {
        layer: {
            "sigma": sigma[:, i].tolist(),
            "frobenius": frobenius[:, i].tolist(),
            "stable_rank": ((frobenius / sigma) ** 2)[:, i].tolist(),
            "rank": [16, *[None] * (len(parts) - 2), 12],
            "target": None,
        }
        for i, layer in enumerate(LAYERS)
    }
    about = {"machine": "CPU, 1 threads", "torch": "2.9.0", "commit": "abc1234", "settings": {"device": "cpu"}}
    return {"recipe": recipe.as_dict(), "seed": seed, **about, "epochs": epochs, "layers": layers, "step_ms": 2.0}


def made_row(
    name: str,
    methods: Mapping[str, Last],
    seeds: Iterable[int] = range(4),
    scale: Scale = TINY,
    shake: float = 0.01,
) -> Row:
    """Each method ends with its numbers, times ``1 ± shake`` by seed and method."""
    random = np.random.default_rng(0)
    runs = []
    for seed in seeds:
        for method, last in methods.items():
            shaken = {key: value * (1 + shake * random.standard_normal()) for key, value in last.items()}
            runs.append(compact(result(f"{name}/{method}", seed, scale, **shaken)))
    recipes = [find(f"{name}/{method}").scaled(scale) for method in methods]
    return row_of(recipes, runs, {method: 1.0 + 0.05 * i for i, method in enumerate(methods)})


def made(name: str, *runs: tuple[str, int, dict[str, float]], times: dict[str, float] | None = None) -> Row:
    """Of a method, seed and end for each run."""
    recipes = [find(f"{name}/{method}").scaled(TINY) for method, _, _ in runs]
    return row_of(recipes, [compact(result(f"{name}/{method}", seed, **last)) for method, seed, last in runs], times)
