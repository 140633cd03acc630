"""Generalization gap against gradient norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .style import FEW, Array, Path, axes_of, columns, finish, label, labels_of, legend, look, value_axis

Values = Sequence[float] | Array


def gap_against_gradient_norm(
    methods: Mapping[str, tuple[Values, Values]],
    *,
    xlabel: str = "gradient norm",
    ylabel: str = "generalization gap",
    ax: Axes | None = None,
    path: Path | None = None,
) -> Figure:
    """A point for each run, with colour and marker by method. In the source the norm is that of the loss' gradient by
    the input, and the gap is training accuracy minus test accuracy.

    Args:
        methods: gradient norms and gaps, as many of one as of the other, by the method's name. Points that are not
            finite are left out.
        xlabel, ylabel: what was measured.
        ax: axes to draw into.
        path: where to save the figure.

    Raises:
        ValueError: norms and gaps of different length, or no finite point.

    Source: Yoshida and Miyato, Spectral norm regularization, arXiv 1705.10941.
    """
    points = {name: _points(name, *pair) for name, pair in methods.items()}
    together = np.concatenate([np.empty((2, 0)), *points.values()], axis=1)
    if not together.size:
        raise ValueError("methods must hold a finite point, and have none")
    ax = axes_of(ax, 5.5 + 2.6 * columns(len(points)), 3.8 if len(points) <= FEW else 5.2)
    for i, (name, (norms, gaps)) in enumerate(zip(labels_of(list(points)), points.values(), strict=True)):
        seen = look(i)
        face = seen.color if i % 2 == 0 else "white"  # which grey print shows as well
        ax.scatter(norms, gaps, s=30, marker=seen.marker, facecolors=face, edgecolors=seen.color, label=name, zorder=2)
    label(ax, xlabel, ylabel)
    value_axis(ax, "x", together[0])
    value_axis(ax, "y", together[1])
    legend(ax, len(points))
    return finish(ax, path)


def _points(name: str, norms: Values, gaps: Values) -> Array:
    """(2, points)."""
    x, y = np.asarray(norms, np.float64), np.asarray(gaps, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"methods must hold as many gradient norms as gaps, got {x.shape} and {y.shape} for {name}")
    both = np.stack([x, y])
    return both[:, np.isfinite(both).all(axis=0)]
