"""Where runs are computed: the device, how it is used, what it is called, and the commit of the code."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch


@dataclass(frozen=True)
class Settings:
    """How a run is computed. What a run finds depends on it by rounding alone."""

    device: str = "cpu"
    bf16: bool = False
    """Forward passes under autocast to bfloat16; weights stay float32."""
    channels_last: bool = False
    compile: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


@dataclass(frozen=True)
class Machine:
    """What a call says of data and device.

    Raises:
        ValueError: a device that is not there, or fewer than one seed together.
    """

    data_dir: Path | None = None
    """Where data sets are, or are downloaded to."""
    download: bool = False
    device: str = "auto"
    """``"auto"`` for a GPU where there is one."""
    bf16: bool = False
    channels_last: bool = False
    compile: bool = False
    together: int = 1
    """Seeds that are trained at once."""

    def __post_init__(self) -> None:
        device_of(self.device)
        if self.together < 1:
            raise ValueError(f"together must be 1 or more, got {self.together}")

    @property
    def settings(self) -> Settings:
        return Settings(device_of(self.device), self.bf16, self.channels_last, self.compile)

    def at_once(self, seeds: int) -> list[range]:
        """Of so many, those that are trained together."""
        return [range(start, min(start + self.together, seeds)) for start in range(0, seeds, self.together)]


def device_of(name: str) -> str:
    """
    Raises:
        ValueError: a name other than of the CPU and of a GPU that torch sees.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    known = ["cpu", *(["cuda"] if gpus else []), *gpus]
    if name not in known:
        none = "" if gpus else " (torch sees no GPU here)"
        raise ValueError(f"device must be auto or one of {', '.join(known)}{none}, got {name!r}")
    return name


def deterministic() -> None:
    """Makes two runs the same to the bit, where the device has such kernels."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS reads at its first product
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.use_deterministic_algorithms(True, warn_only=True)


def described(device: str) -> str:
    """A GPU's name, or the CPU's with the number of threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({processor()}), {torch.get_num_threads()} threads"


def processor() -> str:
    """Its model's name; the kind of machine where the system does not tell."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


@lru_cache(maxsize=1)
def commit() -> str | None:
    """Of the tree that these files are in, with a + where it was changed since; None outside of one."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
