"""Ranks of a process group on this machine, over gloo: one function run by all of them, and what each returns."""

from __future__ import annotations

import faulthandler
import hashlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

TIMEOUT = timedelta(minutes=5)
"""A rank that waits for one that hangs gives up after it. (Of one that has ended, gloo hears at once.)"""

PRELOADED = [
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "torch._dynamo",  # which the first DTensor would import
    "specopt",
]
"""Imported once, by the server that all ranks are forked from: it takes seconds, and ranks are many."""


def run(world: int, function: Callable[..., Any], *args: Any, folder: Path) -> list[Any]:
    """``function(*args)`` on every rank, and its results by rank. The function is one of a module: processes import it.

    Raises:
        AssertionError: with the traceback of the rank that failed first.
    """
    codes = _joined(world, _rank, folder, function, args)
    crashed = [path for path in sorted(folder.glob("crashed-*")) if path.read_text()]
    failed = sorted(folder.glob("failed-*"), key=lambda path: path.stat().st_mtime_ns)
    for path in [*crashed, *failed][:1]:
        raise AssertionError(f"{path.name}:\n{path.read_text()}")
    assert codes == [0] * world, "a rank has died"
    return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(world)]


def run_with_deaths(
    world: int, function: Callable[..., Any], *args: Any, folder: Path, timeout: timedelta
) -> dict[int, Any]:
    """The same where ranks kill themselves on the way: what the others return, which wait for one another no longer
    than the time-out.

    Raises:
        AssertionError: with the traceback of a survivor whose function raises.
    """
    codes = _joined(world, _mortal_rank, folder, function, args, timeout)
    for path in sorted(folder.glob("failed-*")):
        raise AssertionError(f"{path.name}:\n{path.read_text()}")
    assert {0, -signal.SIGKILL} == set(codes), f"some ranks die and the others end, got the exit codes {codes}"
    survivors = (rank for rank, code in enumerate(codes) if code == 0)
    return {rank: torch.load(folder / f"result-{rank}", weights_only=False) for rank in survivors}


def _joined(world: int, target: Callable[..., None], *args: Any) -> list[int | None]:
    """The exit codes of all ranks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    processes = [context.Process(target=target, args=(rank, world, *args)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def _join_group(rank: int, world: int, folder: Path, timeout: timedelta) -> None:
    faulthandler.enable((folder / f"crashed-{rank}").open("w"))
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)


def _rank(rank: int, world: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        _join_group(rank, world, folder, TIMEOUT)
        torch.save(function(*args), folder / f"result-{rank}")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"failed-{rank}").write_text(traceback.format_exc())
        os._exit(1)  # the others are in a collective that will not come: no exit handler waits for them here


def _mortal_rank(
    rank: int, world: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...], timeout: timedelta
) -> None:
    try:
        _join_group(rank, world, folder, timeout)
        torch.save(function(*args), folder / f"result-{rank}")
    except BaseException:
        (folder / f"failed-{rank}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)  # a group of which a rank is missing is not left in order


@contextmanager
def all_reduces(see: Callable[[int, bool], None]) -> Iterator[None]:
    """Calls of ``all_reduce`` are numbered from 0, and seen before and (True) behind each."""
    original, calls = dist.all_reduce, 0

    def all_reduce(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        call, calls = calls, calls + 1
        see(call, False)
        work = original(*args, **kwargs)
        see(call, True)
        return work

    dist.all_reduce = all_reduce
    try:
        yield
    finally:
        dist.all_reduce = original


def digest(tensors: Iterable[Tensor]) -> str:
    """Of the bits of tensors; of a sharded one, of the part that lies here."""
    seen = hashlib.sha256()
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        seen.update(local.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Weights and state of an optimizer, in the order of its groups."""
    found: list[Tensor] = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            found.append(param)
            state = optimizer.state.get(param, {})
            found += [state[key] for key in sorted(state) if isinstance(state[key], Tensor)]
    return found
