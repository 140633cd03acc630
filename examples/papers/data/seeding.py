"""Generators for each use of a seed, so that one seed given to all of them draws nothing twice.

Without it, the training images that get a wrong label and those held out for validation would be the same ones.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch


class Use(IntEnum):
    SUBSET = 1
    VALIDATION = 2
    LABEL_NOISE = 3
    EPOCH = 4
    EVALUATION = 5
    NOISE = 6


def check_seed(seed: int) -> None:
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")


def generator(use: Use, seed: int, i: int = 0, *, device: torch.device | str = "cpu") -> torch.Generator:
    """Seeded by (use, seed, i); neighbours have nothing in common.

    Raises:
        ValueError: ``seed`` below 0.
    """
    check_seed(seed)
    (state,) = np.random.SeedSequence((use, seed, i)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state))
