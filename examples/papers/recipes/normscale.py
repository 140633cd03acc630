"""The rows of Norm Scaling (blog post and authors' code, December 2023), on CIFAR-100.

The authors': 200 epochs, batch 512, Adam with lr 1e-3, times 0.1 at epochs 60 and 120, no weight decay; every method
starts from the same orthogonal weights times the targets, ``sqrt(d_k/d_{k-1})`` of layer sizes (``target="size"``),
and leaves down-sampling convolutions, biases and norms alone. Training images are cropped and flipped at random. AdamW
without weight decay is Adam.

``frobenius`` has the stated targets, ``sqrt(min(d_k, d_{k-1})·d_k/d_{k-1})`` of layer sizes. An MLP's layers start with
these norms. Those of a convolution lie far above its start: 256 for 64 channels to 64 at 32 x 32, which start with 8,
so that the first step scales it up by as much.

ResNet-50 is the authors' variant, of bottleneck blocks with a 3 x 3 stem and no max-pool. ResNet-34 has basic blocks:
theirs was of bottlenecks too, and the document does not tell how it differs from their ResNet-50.

``none-published``, ``frobenius-published`` and ``spectral-published`` are the same with the defects of the published
code (:attr:`papers.recipe.Recipe.published`).

``ours``: the first eight singular values of each matrix capped at twice the target in every third step, the last layer
left alone, whose target of 0.14 to 0.22 would hold the logits down. For MLP 5 x 2000 examples/search.py found that cap,
in every step, best on a validation split; every third step was taken for its cost. In other rows nothing was tuned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..methods import Method
from ..recipe import Recipe

NONE = Method("none", base="adamw")
FROBENIUS = Method("frobenius", base="adamw", norm_scale={"norm": "frobenius", "mode": "set"})
SPECTRAL = Method("spectral", base="adamw", norm_scale={"norm": "spectral", "mode": "set"})
OURS = Method(
    "ours",
    base="adamw",
    norm_scale={"mode": "cap", "rank": 8, "every": 3},
    gain=2.0,
    spared=("*downsample*", "head*"),
)

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp-5x2000": ("mlp", {"depth": 5, "width": 2000}),
    "mlp-7x4000": ("mlp", {"depth": 7, "width": 4000}),
    "resnet34": ("resnet34", {}),
    "resnet50": ("resnet50-cifar", {}),
}


def recipes() -> Iterator[Recipe]:
    """Row by row, the stated method first and then as published."""
    for name in ROWS:
        for method in (NONE, FROBENIUS, SPECTRAL, OURS):
            yield recipe(name, method)
        for method in (NONE, FROBENIUS, SPECTRAL):
            published = replace(method, name=f"{method.name}-published")
            yield replace(recipe(name, published), published=True)


def recipe(row: str, method: Method) -> Recipe:
    model, options = ROWS[row]
    return Recipe(
        name=f"normscale/{row}/{method.name}",
        data="cifar100",
        model=model,
        model_options=options,
        method=method,
        batch=512,
        epochs=200,
        lr=1e-3,
        milestones=(0.3, 0.6),
        start="orthogonal",
    )
