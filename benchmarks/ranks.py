"""Ranks of a process group on this machine: nccl with a GPU for each, else gloo on the CPU."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

TIMEOUT = timedelta(minutes=5)
PRELOADED = ["torch._dynamo"]
"""What ``fully_shard`` and optimizers import when they are first called, which takes longer than a small step."""


def device_of_ranks(wanted: str = "auto") -> str:
    """``"cuda"`` where there are at least two GPUs and they are wanted, else ``"cpu"``.

    Args:
        wanted: ``"auto"``, ``"cpu"`` or ``"cuda"``.
    """
    count = torch.cuda.device_count()
    if wanted == "cuda" and count < 2:
        raise SystemExit(f"--device cuda: ranks take two GPUs or more, and torch sees {count}; use auto or cpu")
    return "cuda" if wanted != "cpu" and count >= 2 else "cpu"


def run(world: int, device: str, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(*args)`` on every rank, and its results by rank. The function is one of a module: processes import it.

    Raises:
        RuntimeError: with the traceback of the rank whose function failed first.
    """
    method = "forkserver"  # no rank inherits threads or a GPU's context, and all are forked from what is imported once
    multiprocessing.get_context(method).set_forkserver_preload([function.__module__, *PRELOADED])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            multiprocessing.start_processes(_rank, (world, device, folder, function, args), world, start_method=method)
        except multiprocessing.ProcessRaisedException as error:
            failed = sorted(folder.glob("failed-*"), key=lambda path: path.stat().st_mtime_ns)
            raise RuntimeError(failed[0].read_text() if failed else str(error)) from None
        return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(world)]


def _rank(
    rank: int, world: int, device: str, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    store = dist.FileStore(str(folder / "store"), world)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    try:
        torch.save(function(*args), folder / f"result-{rank}")
    except Exception:  # before this rank is gone, for which others fail that wait for it
        (folder / f"failed-{rank}").write_text(traceback.format_exc())
        raise
    dist.barrier()
    dist.destroy_process_group()
