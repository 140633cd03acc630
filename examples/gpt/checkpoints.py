"""Checkpoints that all ranks write together, and that are either whole or do not count.

::

    OUT/step-00000040/          whole: it has this name since the last of its bytes was on the disk
        __0_0.distcp ...        the ranks' parts and .metadata, as torch.distributed.checkpoint writes them
        whole.json              the recipe, and of every other file its length and CRC-32
    OUT/step-00000060.part/     being written, or all that a death has left of that: never read, removed by the next

The folder has to be one that all ranks see: a checkpoint of which some rank cannot read its share is an error on all of
them, and does not count. A whole checkpoint whose files have been damaged since is passed over with a warning, and the
one before it is taken, of which :data:`KEPT` are there; training then makes the same steps again. Where no checkpoint
is whole there is an error, so that nothing starts anew unasked.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from papers.runs.checkpoint import differences, write_text
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save as save_parts

NAME, PART, WHOLE = "step-", ".part", "whole.json"
METADATA = ".metadata"
"""Written last, by rank 0."""
KEPT = 2
"""The newest, and the one to fall back to."""
CHUNK = 2**20

T = TypeVar("T")


def save(folder: Path, step: int, states: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    """Writes a checkpoint of all ranks, and removes what is older than the one before it.

    Args:
        folder: of all checkpoints of a training.
        step: how many have been made.
        states: what torch.distributed.checkpoint takes.
        recipe: plain values that whoever loads it must agree with.

    Raises:
        ValueError: a file cannot be written, or not be read again on some rank. All ranks raise; the whole
            checkpoints that were there still are.
    """
    whole = folder / f"{NAME}{step:08d}"
    part = whole.with_name(whole.name + PART)
    from_first(lambda: _remove(folder.glob(NAME + 8 * "[0-9]" + PART)))
    with _one_error(f"{part} cannot be written"):
        written = save_parts(dict(states), checkpoint_id=part)
    files = {METADATA, *(place.relative_path for place in written.storage_data.values())}
    about = {"recipe": recipe, "files": _sums_of(part, sorted(files))}
    from_first(lambda: _complete(part, whole, json.dumps(about, indent=1)))


def _sums_of(part: Path, files: Sequence[str]) -> dict[str, list[int]]:
    """Length and CRC-32 of every file, by its name.

    Raises:
        ValueError: one that is not there for the rank that reads it, or metadata that some rank does not see.
    """
    sees = _gathered(os.path.exists(part / METADATA))
    unseen = [f"{METADATA} by rank {rank}" for rank, seen in enumerate(sees) if not seen]
    sums = _shared_out(lambda name: _fingerprint(part / name), files)
    unseen += [name for name in files if sums[name] is None]
    if unseen:
        raise ValueError(f"{part} has to be on a disk that all ranks see, and cannot be read: {', '.join(unseen)}")
    return sums


def _complete(part: Path, whole: Path, about: str) -> None:
    write_text(part / WHOLE, about)
    _sync(part)
    _remove(path for path in _by_age(whole.parent) if path >= whole)  # found damaged, else no rank would be here again
    os.replace(part, whole)
    _sync(whole.parent)
    _remove(_by_age(whole.parent)[KEPT:])


def newest(folder: Path, recipe: Mapping[str, Any]) -> tuple[int, Path] | None:
    """The step and the place of the newest whole checkpoint; None where there never was one. The same on every rank.

    Raises:
        ValueError: checkpoints are there, and none is whole; or the newest is of another recipe.
    """
    there = from_first(lambda: [(path, _about(path)) for path in _by_age(folder)])
    problems = []
    for path, about in there:
        problem = about.get("problem") or _damage(path, about["files"])
        if not problem:
            differing = list(differences(recipe, about["recipe"]))
            if differing:
                raise ValueError(f"{path} is of another training: {'; '.join(differing)}")
            return int(path.name.removeprefix(NAME)), path
        problems.append(f"{path.name}: {problem}")
        if dist.get_rank() == 0:
            warnings.warn(f"{path} is damaged and passed over ({problem})", stacklevel=2)
    if problems:
        raise ValueError(f"no checkpoint in {folder} is whole ({'; '.join(problems)}); remove them to start anew")
    return None


def read(path: Path, states: dict[str, Any]) -> dict[str, Any]:
    """What :func:`save` wrote, cut up as ``states`` are, whatever the ranks were then. ``states`` stay as they are, for
    they share the memory of what is being trained.

    Raises:
        ValueError: a file cannot be read on some rank. All ranks raise.
    """
    found: dict[str, Any] = _copied(states)
    with _one_error(f"{path} cannot be read"):
        load(found, checkpoint_id=path)
    return found


@contextmanager
def _one_error(what: str) -> Iterator[None]:
    """Of all ranks that torch.distributed.checkpoint has failed on, one ValueError that says what and why."""
    try:
        yield
    except CheckpointException as error:  # a BaseException, with a traceback for each rank
        told = "; ".join(f"rank {rank}: {_told(failure)}" for rank, (failure, _) in error.failures.items())
        raise ValueError(f"{what} ({told})") from None


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _copied(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    return {name: _copied(branch) for name, branch in tree.items()} if isinstance(tree, dict) else tree


def _about(path: Path) -> dict[str, Any]:
    """What whole.json says, or its ``"problem"``."""
    try:
        about = json.loads((path / WHOLE).read_text(encoding="utf-8"))
        files = {name: [int(length), int(check)] for name, (length, check) in about["files"].items()}
        return {"recipe": about["recipe"], "files": files}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {"problem": f"{WHOLE} cannot be read: {error!r}"}


def _damage(path: Path, files: Mapping[str, list[int]]) -> str | None:
    """What has happened to the files of a checkpoint; every rank reads its share of them, and all hear of it."""
    found = _shared_out(lambda name: _fingerprint(path / name), list(files))
    wrong = [name for name, sums in files.items() if found[name] != sums]
    if not wrong:
        return None
    return ", ".join(f"{name} is {'missing' if found[name] is None else 'not what was written'}" for name in wrong)


def _fingerprint(path: Path) -> list[int] | None:
    """Length and CRC-32 of a file; None where it cannot be read."""
    length, check = 0, 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                length, check = length + len(chunk), zlib.crc32(chunk, check)
    except OSError:
        return None
    return [length, check]


def from_first(make: Callable[[], T]) -> T:
    """What rank 0 makes, on every rank.

    Raises:
        ValueError: rank 0 has failed. All ranks raise, so that none waits for it.
    """
    box: list[Any] = [None, None]
    cause = None
    if dist.get_rank() == 0:
        try:
            box[0] = make()
        except Exception as error:
            box[1], cause = _told(error), error
    dist.broadcast_object_list(box, src=0)
    found: T = box[0]
    failure: str | None = box[1]
    if failure is not None:
        raise ValueError(f"rank 0 has failed: {failure}") from cause
    return found


def _shared_out(function: Callable[[str], Any], names: Sequence[str]) -> dict[str, Any]:
    """``function`` of every name, of which each rank makes its share."""
    mine = {name: function(name) for name in names[dist.get_rank() :: dist.get_world_size()]}
    return {name: value for part in _gathered(mine) for name, value in part.items()}


def _gathered(mine: T) -> list[T]:
    """Every rank's, by rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def _by_age(folder: Path) -> list[Path]:
    """Checkpoints that have been completed, the newest first."""
    return sorted(folder.glob(NAME + 8 * "[0-9]"), reverse=True)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Puts the names in a folder on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
