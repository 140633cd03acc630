"""The configurations that torch's own test suite lists for an optimizer (``torch.testing._internal``).

They are read in another process: importing that module parses the command line, sets flags and freezes others. It also
asks for the package expecttest, of which it takes the base class of its test cases; to read the tables unittest's does.
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

READ = """
import sys, types, unittest
import torch
sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase)
from torch.testing._internal.common_optimizers import optim_db
wanted = {info.optim_cls.__name__: info for info in optim_db if info.optim_cls.__name__ in ("SGD", "AdamW")}
torch.save(
    {
        name: {
            device: [(config.desc, config.kwargs) for config in info.optim_inputs_func(device)]
            for device in ("cpu", "cuda")
        }
        for name, info in wanted.items()
    },
    sys.argv[1],
)
"""


@cache
def _tables() -> dict[str, dict[str, list[tuple[str, dict[str, Any]]]]]:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "configurations.pt"
        subprocess.run([sys.executable, "-c", READ, str(file)], check=True, capture_output=True)
        tables: dict[str, dict[str, list[tuple[str, dict[str, Any]]]]] = torch.load(file, weights_only=True)
    return tables


def listed(name: str, device: str) -> list[tuple[str, dict[str, Any]]]:
    """(description, arguments) of every configuration of ``torch.optim``'s class ``name``; the list for ``"cuda"`` has
    those for the CPU as well, and more (``capturable``, tensor betas)."""
    return _tables()[name][device]
