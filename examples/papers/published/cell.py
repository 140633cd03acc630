"""What a paper has of one method in one row."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """Accuracies and gaps are fractions, losses mean cross entropies in nats; None for what a paper does not tell."""

    accuracy: float | None = None
    """On the test images: of the last epoch in Norm Scaling, while the others do not say of which."""
    accuracy_std: float | None = None
    """The standard deviation of the accuracy over runs."""
    replication: float | None = None
    """The accuracy that a published replication of the paper found."""
    replication_std: float | None = None
    gap: float | None = None
    """The least training accuracy less test accuracy over epochs whose test accuracy exceeds the row's threshold."""
    loss: float | None = None
    """On the test images, after the last epoch."""
    sigma: float | None = None
    """The mean spectral norm over layers, after the last epoch."""
    sigma_deviation: float | None = None
    """The standard deviation of spectral norms over layers, over the last 100 epochs."""
