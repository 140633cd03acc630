"""Where tests run: on the GPU where there is one, else the Triton kernels go through Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined

import pytest
from hypothesis import HealthCheck, settings

from tests.interpreter import make_quick

make_quick()

for name, examples in (("default", 25), ("full", 200)):
    settings.register_profile(
        name,
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
settings.load_profile("full" if os.environ.get("SPECOPT_TEST_FULL") == "1" else "default")


LONG = ("test_traffic.py", "test_backends.py", "test_examples.py", "test_device_robustness.py", "test_data_parallel.py")
"""Files that take longest for the tests that they hold."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: a worker that gets one last keeps the others waiting."""
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What a file draws while it is imported, its parameters' weights among it, is the same whichever files are
    collected."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test that draws without a seed of its own draws the same alone and after others."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_group_left() -> Iterator[None]:
    """A process group that a test leaves behind would fail a later one that makes its own."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
        pytest.fail("the test has left its process group")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def on_device(device: torch.device) -> Iterator[None]:
    """Tensors that a test makes lie where the kernels run."""
    with device:
        yield


@pytest.fixture
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECOPT_BACKEND", "triton")


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SPECOPT_BACKEND", request.param)
    return str(request.param)
