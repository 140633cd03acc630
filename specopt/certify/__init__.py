"""Certificates: upper bounds on the norms of layers and networks that hold for sure."""

from .certificate import Certificate, CertificateRow
from .entry import certify

__all__ = ["Certificate", "CertificateRow", "certify"]
