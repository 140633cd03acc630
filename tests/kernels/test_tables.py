"""Pointer tables, apart from the kernels that read them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from specopt.kernels import tables


@pytest.mark.parametrize("pointer", [0, 4096, 2**63 - 16, 2**63, 0xFF00_0000_1234_5670, 2**64 - 16])
def test_an_address_of_any_64_bits_is_held_by_a_table(pointer: int) -> None:
    tensor = cast(Any, SimpleNamespace(data_ptr=lambda: pointer))
    row = np.zeros(1, np.int64)
    row[0] = tables.address(tensor)
    for rows in ([(tables.address(tensor),)], row[:, None]):
        held = tables.upload(rows, torch.int64, torch.device("cpu"))
        assert int(held) % 2**64 == pointer
    assert (tables.address(tensor) % 16 == 0) == (pointer % 16 == 0)
