"""examples/train_distributed.py, of which rank 1 is killed in its seventh step, between two sums over ranks, the first
time that torchrun starts it."""

from __future__ import annotations

import os
import signal
from typing import Any

from torch.optim.optimizer import register_optimizer_step_pre_hook

from tests.examples import gpt_ranks  # noqa: F401 - puts examples/ on the path
from tests.specopt.sharding.ranks import all_reduces

import train_distributed  # isort: skip

STEP, SUM = 7, 1


class Death:
    """Counts steps of optimizers, and in one of them sums."""

    def __init__(self) -> None:
        self.steps, self.sums = 0, 0

    def step(self, *_: Any) -> None:
        self.steps, self.sums = self.steps + 1, 0

    def sum(self, _: int, begun: bool) -> None:
        self.sums += begun
        if self.steps == STEP and self.sums == SUM:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    death = Death()
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        register_optimizer_step_pre_hook(death.step)
    with all_reduces(death.sum):
        train_distributed.main()
