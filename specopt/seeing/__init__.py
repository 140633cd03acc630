"""Seeing what happens: reports of the weights as they are, and what the tracker finds while training runs."""

from .report import spectral_report
from .table import SpectralReport, SpectralRow

__all__ = ["SpectralReport", "SpectralRow", "spectral_report"]
