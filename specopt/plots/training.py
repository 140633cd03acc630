"""Quantities of every layer over the steps of a training."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from ..seeing.history import SpectralHistory
from .style import (
    FEW,
    PLAIN,
    SMALL,
    Array,
    Path,
    axes_of,
    few_ticks,
    figure_of,
    finish,
    is_wide,
    label,
    labels_of,
    legend,
    look,
    row_labels,
    step_axis,
    value_axis,
)


def spectral_norms(
    history: SpectralHistory | Path,
    *,
    quantity: str = "sigma_after",
    relative: bool = False,
    names: Sequence[str] | None = None,
    ax: Axes | None = None,
    path: Path | None = None,
) -> Figure:
    """σ₁ of each layer over training, with its target as a dotted line where there are few layers.

    Args:
        history: a monitor's, or the path of the CSV file it wrote.
        quantity: ``"sigma_after"`` the correction, or ``"sigma"`` before it; ``"frobenius"`` under Frobenius scaling.
        relative: divide by the target.
        names: the layers to show; all by default.
        ax: axes to draw into.
        path: where to save the figure.

    Raises:
        TypeError: a history that is neither.
        ValueError: another quantity, an unknown name, nothing to show, or a file of something else.
    """
    symbols = {"sigma_after": "σ₁", "sigma": "σ₁ before the correction", "frobenius": "‖W‖_F"}
    if quantity not in symbols:
        raise ValueError(f"quantity must be one of {', '.join(symbols)}, got {quantity!r}")
    history = _read(history)
    values, target, sigma = (_columns(history, name, names) for name in (quantity, "target", "sigma"))
    target = np.where(np.isnan(sigma) == (quantity == "frobenius"), target, np.nan)  # F* where no sigma is tracked
    if relative:
        values = values / np.where(target > 0, target, np.nan)
        return _over_training(history, values, f"{symbols[quantity]} / target", names, None, ax, path)
    return _over_training(history, values, symbols[quantity], names, target, ax, path)


def stable_ranks(
    history: SpectralHistory | Path,
    *,
    names: Sequence[str] | None = None,
    ax: Axes | None = None,
    path: Path | None = None,
) -> Figure:
    """``(‖W‖_F / σ₁)²`` of each layer over training: how many directions carry the weight.

    Args: see :func:`spectral_norms`; the monitor needs ``weights=True``.

    Raises:
        TypeError: a history that is neither.
        ValueError: an unknown name, nothing to show, as without ``weights=True``, or a file of something else.
    """
    history = _read(history)
    values = _columns(history, "stable_rank", names)
    return _over_training(history, values, "stable rank", names, None, ax, path)


def _read(history: SpectralHistory | Path) -> SpectralHistory:
    if isinstance(history, SpectralHistory):
        return history
    if isinstance(history, (str, os.PathLike)):
        return SpectralHistory.from_csv(history)
    raise TypeError(f"history must be a SpectralHistory or the path of its CSV file, got {type(history).__name__}")


def _columns(history: SpectralHistory, quantity: str, names: Sequence[str] | None) -> Array:
    known = history.names
    unknown = sorted(set(names or ()) - set(known))
    if unknown or (names is not None and not len(names)):
        raise ValueError(
            f"names must be among {', '.join(known) or 'none: the history is empty'}, got {list(names or ())}"
        )
    chosen = known if names is None else names
    return history[quantity][:, [known.index(name) for name in chosen]]


def _over_training(
    history: SpectralHistory,
    values: Array,
    what: str,
    names: Sequence[str] | None,
    target: Array | None,
    ax: Axes | None,
    path: Path | None,
) -> Figure:
    if not np.isfinite(values).any():
        needs = "; the monitor needs weights=True for it" if what.startswith(("stable rank", "‖W‖_F")) else ""
        raise ValueError(f"history must hold values of {what}, and has none{needs}")
    shown = list(history.names if names is None else names)
    if len(shown) <= FEW:
        ax = _lines(history, values, what, shown, target, ax)
    else:
        ax = _heat_map(history, values, what, shown, ax)
    return finish(ax, path)


def _lines(
    history: SpectralHistory, values: Array, what: str, names: Sequence[str], target: Array | None, ax: Axes | None
) -> Axes:
    ax = axes_of(ax, 8.5, 3.8)
    for i, (name, column) in enumerate(zip(labels_of(names), values.T, strict=True)):
        seen = look(i)
        single = seen.marker if np.isfinite(column).sum() == 1 else None
        ax.plot(history.steps, column, color=seen.color, linestyle=seen.style, marker=single, linewidth=1.6, label=name)
        if target is not None and np.isfinite(target[:, i]).any():
            ax.plot(history.steps, target[:, i], color=seen.color, linestyle=(0, (1, 3)), linewidth=1, zorder=1)
    if target is not None and np.isfinite(target).any():
        ax.plot([], [], color="0.5", linestyle=(0, (1, 3)), linewidth=1, label="targets")
    label(ax, "step", what)
    step_axis(ax.xaxis, history.steps.tolist())
    value_axis(ax, "y", values)
    legend(ax, len(names) + 1)
    return ax


def _heat_map(history: SpectralHistory, values: Array, what: str, names: Sequence[str], ax: Axes | None) -> Axes:
    ax = axes_of(ax, 8.5, min(14.0, 1.2 + 0.16 * len(names)))
    colors = colormaps["viridis"].with_extremes(bad="0.85")
    rows = np.ma.masked_invalid(values.T)
    edges = np.arange(len(names) + 1) - 0.5
    mesh = ax.pcolormesh(_edges(history.steps), edges, rows, cmap=colors, norm=_norm(values), rasterized=True)
    ax.set_ylim(len(names) - 0.5, -0.5)
    label(ax, "step", "")
    step_axis(ax.xaxis, history.steps.tolist())
    bar = figure_of(ax).colorbar(mesh, ax=ax, pad=0.02, aspect=max(20, len(names) / 2))
    bar.set_label(what, fontsize=PLAIN)
    bar.ax.tick_params(labelsize=SMALL + 1)
    few_ticks(bar.ax.yaxis, values, log=isinstance(mesh.norm, LogNorm))
    row_labels(ax, names)
    return ax


def _norm(values: Array) -> Normalize:
    found = values[np.isfinite(values)]
    low, high = found.min(), found.max()
    if is_wide(values):
        return LogNorm(low, high)
    return Normalize(low, high if high > low else low + max(abs(low), 1.0) * 1e-3)


def _edges(steps: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Array:
    """Limits of the columns: half way between steps."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middle[0]], middle, [2 * steps[-1] - middle[-1]]])
