"""A real text that is there without a download: the IANA time zone database, which is in the public domain.

The package ``tzdata`` has it in one file of about 100 kB, as rules, zones and links::

    R E 1981 ma - Mar lastSu 1u 1 S
    Z Europe/Zurich 0:34:8 - LMT 1853 Jul 16
    L America/Denver US/Mountain
"""

from __future__ import annotations

import zlib
from importlib import resources
from typing import NamedTuple

import torch
from torch import Tensor

HELD_OUT = 10
"""Every tenth window is not trained on."""


class Text(NamedTuple):
    """Windows of a text that follow one another, as tokens: one for each character that there is."""

    train: Tensor
    """(n, context + 1): what is seen, and the last one's successor."""
    held_out: Tensor
    characters: str
    check: int
    """CRC-32 of the text."""

    def batch(self, seed: int, step: int, size: int) -> Tensor:
        """Windows (size, context + 1) to train on, a function of seed and step alone: however many ranks share them,
        and whenever they were started."""
        generator = torch.Generator().manual_seed(_mixed(seed, step))
        return self.train[torch.randint(len(self.train), (size,), generator=generator)]


def _mixed(seed: int, step: int) -> int:
    """Another number for each of 2³¹ steps of a seed."""
    return (seed << 31) + step


def time_zones(context: int) -> Text:
    """
    Args:
        context: tokens that a model sees.

    Raises:
        ValueError: the package tzdata is not there.
    """
    try:
        file = resources.files("tzdata.zoneinfo").joinpath("tzdata.zi")
        return windows(file.read_text(encoding="utf-8"), context)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise ValueError(f"the text is that of the package tzdata ({error}): pip install tzdata") from None


def windows(text: str, context: int) -> Text:
    """A text cut into windows.

    Raises:
        ValueError: a text too short for a window to train on and one to hold out.
    """
    if len(text) < HELD_OUT * (context + 1):
        raise ValueError(
            f"context must be at most {len(text) // HELD_OUT - 1} for {len(text)} characters, got {context}"
        )
    characters = "".join(sorted(set(text)))
    places = {character: place for place, character in enumerate(characters)}
    tokens = torch.tensor([places[character] for character in text])
    cut = tokens.unfold(0, context + 1, context + 1)
    is_held_out = torch.arange(len(cut)) % HELD_OUT == HELD_OUT - 1
    return Text(cut[~is_held_out], cut[is_held_out], characters, zlib.crc32(text.encode()))
