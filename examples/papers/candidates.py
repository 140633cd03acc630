"""Settings of this library from which the best for a row is chosen on a validation split (see examples/search.py)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from .methods import Method
from .recipe import Recipe

HELD_OUT = 0.1
"""Of the training images: those that candidates are judged by."""
FREE = ("*downsample*", "head*")
"""Modules that are left alone beside shortcuts: the last layer, whose small target holds the logits down."""


def candidates(recipe: Recipe) -> Iterator[Recipe]:
    """Those of a row, which differ from ``recipe`` in their method alone, but not in what it decays, after its own
    method. All are trained on the same part of the training set."""
    for method in (recipe.method, *decaying(recipe.method)):
        name = f"search/{recipe.row}/{method.name}"
        yield replace(recipe, name=name, method=method, validation=HELD_OUT, threshold=None)


def runnable(recipes: Iterable[Recipe]) -> Iterator[Recipe]:
    """The candidates of a row, each as a recipe of its own, on the whole training set and judged by the test images:
    ``normscale/mlp-5x2000/cap-8-gain-2``.

    They have the settings of the row's first recipe but for the method, and of its first one on each other base, whose
    name then ends theirs: ``digits/mlp/cap-8-gain-2-adamw``.

    Args:
        recipes: of the row, in their order.
    """
    bases: list[str] = []
    for recipe in recipes:
        base = recipe.method.base
        if base not in bases:
            bases.append(base)
            for method in decaying(recipe.method):
                name = method.name if len(bases) == 1 else f"{method.name}-{base}"
                yield replace(recipe, name=f"{recipe.row}/{name}", method=replace(method, name=name))


def decaying(like: Method) -> Iterator[Method]:
    """On the base of ``like``, and with its weight decay."""
    for method in methods(like.base):
        yield replace(method, weight_decay=like.weight_decay, decayed=like.decayed)


def methods(base: str) -> Iterator[Method]:
    """Penalties by lambda, of every layer but shortcuts; and, with the last layer free as well, caps by rank, gain and
    the steps from one to the next, Frobenius scaling by gain, and spectral scaling as stated."""
    for snr_lambda in (0.01, 0.1):
        yield Method(f"snr-{snr_lambda:g}", base=base, snr_lambda=snr_lambda)
    for gain in (1.0, 2.0, 4.0):
        for rank in (1, 8):
            yield _scaled(f"cap-{rank}-gain-{gain:g}", base, gain, mode="cap", rank=rank)
        for every in (3, 8):
            yield _scaled(f"cap-8-gain-{gain:g}-every-{every}", base, gain, mode="cap", rank=8, every=every)
        yield _scaled(f"cap-full-48-gain-{gain:g}", base, gain, mode="cap", rank="full", every=48)
    for gain in (0.5, 1.0, 2.0):
        yield _scaled(f"frobenius-gain-{gain:g}", base, gain, norm="frobenius")
    yield _scaled("set-gain-1", base, 1.0, mode="set")


def _scaled(name: str, base: str, gain: float, **options: str | int) -> Method:
    return Method(name, base=base, norm_scale=options, gain=gain, spared=FREE)
