"""Where runs are on the disk, which of them were begun, and that no two processes train in one place."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..recipe import Recipe

CHECKPOINT, RESULT = "checkpoint.pt", "result.json"
"""Of a run that goes on, and of one that is finished."""
LOCK = ".lock"
LONGEST = 200
"""Characters of a folder's name, which may have 255."""

Seeds = tuple[int, ...]
"""In ascending order: those that are trained at once."""


def folder_of(recipe: Recipe, seeds: Collection[int], folder: Path) -> Path:
    """Of runs that are trained at once, in that of all.

    Raises:
        ValueError: so many seeds that the folder's name were too long.
    """
    name = name_of(seeds)
    if len(name) > LONGEST:
        raise ValueError(f"{len(seeds)} seeds that are no range are too many to train together: take fewer at once")
    return folder / recipe.name / name


def name_of(seeds: Collection[int]) -> str:
    """``seed-3``, or ``seeds-0..4,7``."""
    ranges: list[list[int]] = []
    for seed in sorted(seeds):
        if ranges and seed == ranges[-1][1] + 1:
            ranges[-1][1] = seed
        else:
            ranges.append([seed, seed])
    text = ",".join(str(first) if first == last else f"{first}..{last}" for first, last in ranges)
    return f"seed-{text}" if len(seeds) == 1 else f"seeds-{text}"


def seeds_of(name: str) -> Seeds:
    """Of a folder's name; none of one that is no run's."""
    found = re.fullmatch(r"seeds?-(\d+(?:\.\.\d+)?(?:,\d+(?:\.\.\d+)?)*)", name)
    if not found:
        return ()
    ends = [part.split("..") for part in found[1].split(",")]
    return tuple(seed for part in ends for seed in range(int(part[0]), int(part[-1]) + 1))


def begun(recipe: Recipe, folder: Path) -> list[Seeds]:
    """Seeds that have a checkpoint together; the largest first."""
    found = [seeds_of(path.parent.name) for path in (folder / recipe.name).glob(f"seed*/{CHECKPOINT}")]
    return sorted((seeds for seeds in found if seeds), key=lambda seeds: (-len(seeds), seeds))


def finished(recipe: Recipe, folder: Path) -> list[int]:
    """Seeds that have a result."""
    found = [seeds_of(path.parent.name) for path in (folder / recipe.name).glob(f"seed-*/{RESULT}")]
    return sorted(seeds[0] for seeds in found if len(seeds) == 1)


def parts_of(seeds: Sequence[int], begun: Sequence[Seeds]) -> list[Seeds]:
    """What to train at once, so that what was begun goes on: each of ``begun`` that has one of the seeds, whole, then
    the others together."""
    left = set(seeds)
    parts: list[Seeds] = []
    for some in begun:
        if left & set(some) and not any(set(some) & set(part) for part in parts):
            parts.append(some)
            left -= set(some)
    return [*parts, tuple(sorted(left))] if left else parts


@contextmanager
def locked(folders: Sequence[Path]) -> Iterator[None]:
    """While this holds, no other process trains there; where the system has no such locks, nothing holds it off.

    Raises:
        OSError: another one does already.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with ExitStack() as stack:
        for folder in folders:
            file = stack.enter_context(open(folder / LOCK, "w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise OSError(error.errno, "another process trains there", str(folder)) from None
        yield
