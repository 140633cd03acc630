"""The leading singular values of layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..seeing.naming import distinct
from ..seeing.table import SpectralRow
from .style import (
    FEW,
    PLAIN,
    Array,
    Path,
    axes_of,
    depth_colors,
    figure_of,
    finish,
    label,
    labels_of,
    legend,
    look,
    value_axis,
)

Values = Sequence[float] | Array


def spectra(
    layers: Iterable[SpectralRow] | Mapping[str, Values],
    *,
    relative: bool = False,
    names: Sequence[str] | None = None,
    ax: Axes | None = None,
    path: Path | None = None,
) -> Figure:
    """Singular values by their place, a line for each layer; above eight layers coloured by depth.

    Args:
        layers: a report (``spectral_report(optimizer, top=16)``), or singular values by name, largest first.
        relative: divide by the layer's σ₁; a layer of zeros is left out.
        names: the layers to show; all by default.
        ax: axes to draw into.
        path: where to save the figure.

    Raises:
        ValueError: an unknown name, or no layer with a finite singular value.
        TypeError: neither a report nor a mapping.
    """
    found = _chosen(_by_name(layers), names)
    if relative:
        found = {name: values / values[0] for name, values in found.items() if len(values) and values[0] > 0}
    found = {name: values for name, values in found.items() if np.isfinite(values).any()}
    if not found:
        raise ValueError("layers must hold a finite singular value (with relative=True, one above 0), and have none")
    ax = axes_of(ax, 8.5, 3.8)
    if len(found) <= FEW:
        for i, (name, values) in enumerate(zip(labels_of(list(found)), found.values(), strict=True)):
            seen = look(i)
            places = np.arange(1, len(values) + 1)
            ax.plot(
                places, values, color=seen.color, linestyle=seen.style, marker=seen.marker, markersize=4, label=name
            )
        legend(ax, len(found))
    else:
        _by_depth(ax, list(found.values()))
    label(ax, "i", "σᵢ / σ₁" if relative else "σᵢ")
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    value_axis(ax, "y", np.concatenate(list(found.values())))
    return finish(ax, path)


def _by_depth(ax: Axes, layers: Sequence[Array]) -> None:
    colors, scale = depth_colors(), Normalize(1, len(layers))
    for i, values in enumerate(layers):
        alone = "." if len(values) == 1 else None
        ax.plot(np.arange(1, len(values) + 1), values, color=colors(scale(i + 1)), linewidth=1.2, marker=alone)
    bar = figure_of(ax).colorbar(ScalarMappable(scale, colors), ax=ax, pad=0.02)
    bar.set_label(f"layer, of {len(layers)} in their order", fontsize=PLAIN)
    bar.ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    bar.ax.tick_params(labelsize=PLAIN - 1)


def _by_name(layers: Iterable[SpectralRow] | Mapping[str, Values]) -> dict[str, Array]:
    if isinstance(layers, Mapping):
        found = {name: np.asarray(values, np.float64) for name, values in layers.items()}
    else:
        rows = list(layers)
        if strange := [type(row).__name__ for row in rows if not isinstance(row, SpectralRow)]:
            raise TypeError(f"layers must be a report, or singular values by name, got a list with {strange[0]}")
        names = distinct([row.name for row in rows])
        found = {name: np.array(row.spectrum, np.float64) for name, row in zip(names, rows, strict=True)}
    for name, values in found.items():
        if values.ndim != 1:
            raise ValueError(f"layers must hold one-dimensional singular values, got {values.shape} for {name}")
    return found


def _chosen(layers: dict[str, Array], names: Sequence[str] | None) -> dict[str, Array]:
    if names is None:
        return layers
    if not len(names) or set(names) - set(layers):
        raise ValueError(f"names must be among {', '.join(layers)}, got {list(names)}")
    return {name: layers[name] for name in names}
