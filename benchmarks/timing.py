"""Times of work on one device: medians of many, with the spread of the middle half."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

Work = Callable[[], object]

PAUSE = 20_000_000
"""Cycles that the GPU is kept waiting, about 10 ms, while the host enqueues: then its own time is seen and no gaps."""


FLUSHED = 1 << 28
"""Bytes written to empty the caches, at least."""


class Stopwatch:
    """Seconds. :meth:`on_device` writes a buffer larger than the last cache before, so that the work begins cold."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.gpu = device.type == "cuda"
        cache = torch.cuda.get_device_properties(device).L2_cache_size if self.gpu else 0
        self.flushed = torch.empty(max(2 * cache, FLUSHED), dtype=torch.uint8, device=device)

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def wall(self, work: Work) -> float:
        """From an idle device to an idle device."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def on_device(self, work: Work) -> float:
        """The device's own time between two events; on a CPU the time on the clock."""
        self.flushed.zero_()
        if not self.gpu:
            return self.wall(work)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.wait()
        torch.cuda._sleep(PAUSE)
        start.record()
        work()
        end.record()
        self.wait()
        return start.elapsed_time(end) / 1e3

    def on_host(self, work: Work) -> float | None:
        """Until the call returns with its launches enqueued; None without a GPU."""
        if not self.gpu:
            return None
        self.wait()
        start = time.perf_counter()
        work()
        taken = time.perf_counter() - start
        self.wait()
        return taken

    def launches(self, work: Work) -> int | None:
        """Kernels, copies and fills that the device ran; None without a GPU."""
        if not self.gpu:
            return None
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        self.wait()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
            work()
            self.wait()
        found = [event.name for event in seen.events() if event.device_type == DeviceType.CUDA]
        return sum(not name.startswith(("Optimizer.", "ProfilerStep")) for name in found)  # ranges are no launches


class Summary(NamedTuple):
    median: float
    spread: float
    """Distance of the quartiles, per cent of the median."""


def summary(values: Sequence[float]) -> Summary | None:
    if not values:
        return None
    median = statistics.median(values)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (median,) * 3
    return Summary(median, 100 * (high - low) / median)


def repeated(measure: Callable[[Work], float], work: Work, *, warm_up: int = 5, repeats: int = 30) -> Summary:
    for _ in range(warm_up):
        work()
    found = summary([measure(work) for _ in range(repeats)])
    assert found is not None
    return found
