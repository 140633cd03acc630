"""Seeing what happens: reports of the weights as they are, and what the tracker finds while training runs."""

from .history import SpectralHistory
from .monitor import SpectralMonitor
from .report import spectral_report
from .table import SpectralReport, SpectralRow

__all__ = ["SpectralHistory", "SpectralMonitor", "SpectralReport", "SpectralRow", "spectral_report"]
