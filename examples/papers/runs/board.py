"""A run's log in TensorBoard's files, where tensorboard is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .log import Log

FOLDER = "tensorboard"


class Board:
    """Scalars by epoch: accuracies, losses, gradient norm, and sigma and stable rank of each layer."""

    def __init__(self, writer: Any, written: int) -> None:
        self.writer, self.written = writer, written

    def add(self, log: Log) -> None:
        """What has come since the last call."""
        for i in range(self.written, len(log.epochs)):
            row = log.epochs[i]
            epoch = int(row["epoch"])
            for name, value in row.items():
                if name != "epoch":
                    self.writer.add_scalar(name, value, epoch)
            for layer, values in log.layers.items():
                for quantity in ("sigma", "stable_rank"):
                    self.writer.add_scalar(f"{quantity}/{layer}", values[quantity][i], epoch)
        self.written = len(log.epochs)
        self.writer.flush()


def board_of(run: Path, log: Log, epochs_done: int) -> Board | None:
    """Files of a run that goes on after so many epochs. What was written of the last of these and of later ones is
    hidden: a kill may have come after its checkpoint, and before it stood here."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    written = sum(row["epoch"] < epochs_done for row in log.epochs)
    return Board(SummaryWriter(run / FOLDER, purge_step=epochs_done or None), written)
