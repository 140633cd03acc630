"""Figures of what :class:`specopt.SpectralMonitor` and :func:`specopt.spectral_report` have found. Needs matplotlib.

Every function returns a matplotlib ``Figure``, made without pyplot, so that nothing stays open. ``ax=`` draws into axes
that are there (in a figure with ``layout="constrained"``, which makes room for legends), ``path=`` saves. Up to eight
layers are lines with a legend; more are a heat map with a name beside each row, or lines coloured by depth. Colours get
lighter in their order, and lines and markers differ, so that grey print tells them apart.
"""

from __future__ import annotations

try:
    import matplotlib
except ModuleNotFoundError as error:
    if error.name != "matplotlib":
        raise
    raise ModuleNotFoundError(
        "specopt.plots draws with matplotlib, which is not installed: pip install 'specopt[plots]'", name="matplotlib"
    ) from error

from .scatter import gap_against_gradient_norm
from .spectrum import spectra
from .training import spectral_norms, stable_ranks

del matplotlib

__all__ = ["gap_against_gradient_norm", "spectra", "spectral_norms", "stable_ranks"]
