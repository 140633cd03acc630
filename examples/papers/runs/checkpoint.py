"""A run's folder: whether it can be written, and files that are either whole or not there."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from ..recipe import Recipe
from .folders import CHECKPOINT, RESULT
from .machine import Settings

BESIDE = 2**20
"""Bytes for figures and TensorBoard's files."""
LOGGED = 2**10
"""Bytes of an epoch's values of a layer in log.json, layers.csv, result.json and checkpoints, with some to spare."""


def identity_of(recipe: Recipe, seeds: Sequence[int], settings: Settings) -> dict[str, Any]:
    """What a run's checkpoint and result must agree with, as plain values."""
    seed = seeds[0] if len(seeds) == 1 else sorted(seeds)
    return {"recipe": recipe.as_dict(), "seed": seed, "settings": asdict(settings)}


def reserve(folder: Path, size: int) -> None:
    """Makes the folder, and room in it for a moment, so that a run fails before it starts rather than hours later.

    Args:
        size: bytes that the run will have in it at once.

    Raises:
        OSError: the folder cannot be made or written to, or has no room.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            _allocate(file, size)
    except OSError as error:
        room = f"{size / 2**20:.0f} MiB"
        raise OSError(error.errno, f"cannot write {room} there ({error.strerror})", str(folder)) from None


def _allocate(file: BinaryIO | Any, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    for start in range(0, size, 2**20):
        file.write(bytes(min(2**20, size - start)))
    file.flush()


def size_of(model: nn.Module, epochs: int) -> int:
    """Bytes of a run: two checkpoints, the last one and the next (weights, and as much again thrice for an optimizer),
    and logs of so many epochs."""
    weights: int = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    layers = sum(weight.ndim > 1 for weight in model.parameters())
    return 2 * 4 * weights + LOGGED * layers * (epochs + 1) + BESIDE


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write under; the file then takes the place of ``path`` at once, on the disk as well."""
    beside = path.with_name(path.name + ".part")
    try:
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        with suppress(FileNotFoundError):
            beside.unlink()


def write_text(path: Path, text: str) -> None:
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def save(folder: Path, state: Mapping[str, Any]) -> None:
    with replacing(folder / CHECKPOINT) as beside:
        torch.save(dict(state), beside)


def load(folder: Path, expected: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state that :func:`save` wrote, on the CPU, or None where there is none.

    ``load_state_dict`` moves to the device what belongs there. AdamW's count of steps stays where it was loaded to, and
    reading it from a GPU in each step would make the step wait.

    Args:
        expected: plain values that the state must hold, such as the recipe's.

    Raises:
        ValueError: the file is damaged, or of another run; names what differs.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged archive makes unpickling raise
        why = str(error).partition("\n")[0].partition(". ")[0]  # torch tells at length how to unpickle all the same
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {why}); remove it to start anew") from error
    differing = list(differences(expected, {name: state.get(name) for name in expected}))
    if differing:
        raise ValueError(f"{path} is of another run: {'; '.join(differing)}")
    return state


def read_result(folder: Path) -> dict[str, Any] | None:
    """What result.json of a finished run holds.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / RESULT
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}): remove it to finish that run anew") from None
    return found


def differences(wanted: Any, found: Any, name: str = "") -> Iterator[str]:
    """What differs between two trees of plain values, by name."""
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        for key in {**wanted, **found}:
            yield from differences(wanted.get(key), found.get(key), f"{name}.{key}" if name else str(key))
    elif wanted != found:
        yield f"{name} is {found!r} there and {wanted!r} here"
