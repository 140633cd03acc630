"""Ranks of one start find each other, also where those of an earlier start have left their names.

torchrun keeps one store over its restarts, and with it the addresses of ranks that are no more: a process group that is
made anew on it connects to them, and fails (github.com/pytorch/pytorch/issues/135712). How often it has restarted does
not tell the starts apart, as every machine counts for itself. So ranks agree, in the store, on who they are.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store

PAUSE = 0.02
"""Seconds between looks at the store."""


def meet(store: Store, rank: int, world: int, timeout: timedelta) -> Store:
    """A part of the store that is empty, and the same for all ranks that call this now.

    Every rank signs with a name that nobody had before. Rank 0 lists what it finds, which may be of the dead. Every
    rank confirms a list that it is on, and rank 0 settles the one that all have confirmed.

    Raises:
        TimeoutError: some rank has not come.
    """
    name, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    store.set(f"name/{rank}", name)
    while time.monotonic() < deadline:
        names = [f"name/{each}" for each in range(world)]
        if rank == 0 and store.check(names):
            store.set("list", " ".join(_text(store, key) for key in names))
        listed = _text(store, "list")
        if name in listed:
            store.set(f"confirmed/{rank}", listed)
        if rank == 0 and all(_text(store, f"confirmed/{each}") == listed for each in range(world)):
            store.set("settled", listed)
        settled = _text(store, "settled")
        if name in settled:
            return PrefixStore(settled.split()[0], store)
        time.sleep(PAUSE)
    raise TimeoutError(f"rank {rank} of {world} has waited for the others for {timeout.total_seconds():g} s")


def _text(store: Store, key: str) -> str:
    """Of a key, "" where it is not there."""
    return store.get(key).decode() if store.check([key]) else ""
