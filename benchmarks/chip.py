"""What a chip's cache makes of accesses: the sectors that each touches, and which of them memory has to move.

A sector stays on chip until ``window`` others have been accessed since its last use. An access to a sector that is not
on chip begins a *stay*: see :mod:`benchmarks.traffic` for what a stay costs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SECTOR = 32
"""Bytes that memory moves at least."""
FULL = np.uint32(0xFFFFFFFF)
"""The mask of a sector with all its bytes written."""
PART = 1 << 22
"""Accesses that are sorted at a time, about."""


class Launch:
    """The accesses of one launch: for each instruction of each program the sectors that it touched, and the bytes of
    them that it wrote as a mask (0: read)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.programs = self.accesses = 0
        self._program = self._turn = 0
        self._places: list[tuple[int, int]] = []
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []

    def program(self, index: int) -> None:
        self._program, self._turn = index, 0
        self.programs += 1

    def add(self, sectors: np.ndarray, masks: np.ndarray, size: int) -> None:
        self._places.append((self._program, self._turn))
        self._parts.append((sectors, masks))
        self._turn += 1
        self.accesses += size

    def close(self, together: int) -> None:
        """Puts the accesses into the order in which ``together`` programs at a time make them."""
        program, turn = np.array(self._places, np.int64).reshape(-1, 2).T
        order = np.lexsort((program, turn, program // together))
        none = np.empty(0, np.int64), np.empty(0, np.uint32)
        sectors, masks = zip(none, *(self._parts[i] for i in order), strict=True)
        self.sectors, self.masks = np.concatenate(sectors), np.concatenate(masks)
        del self._places, self._parts


def sectors_of(addresses: np.ndarray, size: int, write: bool) -> tuple[np.ndarray, np.ndarray]:
    """The sectors that elements lie in, ascending, and the bytes of each that are written."""
    if (addresses & (size - 1)).any():
        raise ValueError(f"an access of {size} bytes at an address that is not a multiple of {size}")
    sectors = addresses >> 5
    masks = np.zeros(1, np.uint32)
    if write:
        masks = np.uint32((1 << size) - 1) << (addresses & (SECTOR - 1)).astype(np.uint32)
    sectors, masks = _merged(sectors, masks)
    if (sectors[1:] < sectors[:-1]).any():
        order = np.argsort(sectors, kind="stable")
        sectors, masks = _merged(sectors[order], masks[order])
    return sectors, masks


def _merged(sectors: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours in the same sector made one. A single mask stands for reads."""
    first = np.flatnonzero(np.concatenate([[True], sectors[1:] != sectors[:-1]]))
    if not masks[0]:
        return sectors[first], np.zeros(len(first), np.uint32)
    return sectors[first], np.bitwise_or.reduceat(masks, first)


def moved(launches: Sequence[Launch], window: int) -> tuple[np.ndarray, np.ndarray]:
    """Sectors read from memory and written to it, for each launch."""
    none = np.empty(0, np.int64), np.empty(0, np.uint32)
    sectors = np.concatenate([none[0], *(launch.sectors for launch in launches)])
    masks = np.concatenate([none[1], *(launch.masks for launch in launches)])
    starts = np.cumsum([0, *(len(launch.sectors) for launch in launches)])
    read, written = (np.zeros(len(launches), np.int64) for _ in range(2))
    parts = -(-len(sectors) // PART)  # a sector's fate depends on its own accesses and the clock alone
    for part in range(parts):
        times = np.flatnonzero(sectors % parts == part) if parts > 1 else np.arange(len(sectors))
        began, fetched, wrote = _stays(sectors[times], masks[times], times, window)
        for counts, at in ((read, began[fetched]), (written, wrote)):
            counts += np.bincount(np.searchsorted(starts, at, side="right") - 1, minlength=len(launches))
    return read, written


def _stays(
    sectors: np.ndarray, masks: np.ndarray, times: np.ndarray, window: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For accesses in order of time: when each stay began, whether its sector had to be read, and for each stay with a
    write the time of the first."""
    order = np.argsort(sectors, kind="stable")
    sectors, masks, times = sectors[order], masks[order], times[order]
    gap = np.diff(times, prepend=0) - 1
    first = np.flatnonzero((np.diff(sectors, prepend=-1) != 0) | (gap > window))
    if not len(first):
        return times, np.empty(0, np.bool_), times
    stay = np.repeat(np.arange(len(first)), np.diff(first, append=len(sectors)))
    never, writes = np.iinfo(np.int64).max, masks != 0
    place = np.arange(len(sectors))
    first_read = np.minimum.reduceat(np.where(writes, never, place), first)
    before = np.bitwise_or.reduceat(np.where(place < first_read[stay], masks, np.uint32(0)), first)
    first_write = np.minimum.reduceat(np.where(writes, times, never), first)
    return times[first], before != FULL, first_write[first_write != never]
