"""The counter of traffic: kernels whose traffic is known exactly."""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl

from benchmarks.counter import Counter, Traffic, measure
from specopt.kernels.products import device as products
from specopt.kernels.updates import device as updates

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counts in Triton's interpreter")


def buffer(elements: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Zeros that begin and end a sector."""
    whole = torch.zeros(elements + 64, dtype=dtype)
    start = -whole.data_ptr() % 64 // whole.element_size()
    return whole[start : start + elements]


def totals(found: Traffic) -> tuple[int, int, int]:
    return found.read, found.written, found.accesses


@triton.jit
def copy_kernel(source, target, n, STEP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at * STEP, at < n, 0.0), at < n)


@triton.jit
def fill_kernel(target, first, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(target + first + at, tl.full((BLOCK,), 1.0, tl.float32), at < n)


@triton.jit
def rounds_kernel(source, blocks, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    """Each program reads its blocks one after the other, and does so ``ROUNDS`` times."""
    source += tl.program_id(0) * blocks * BLOCK
    for _ in range(ROUNDS):
        for block in range(blocks):
            tl.load(source + block * BLOCK + tl.arange(0, BLOCK))


@triton.jit
def transposing_kernel(source, target, n, BLOCK: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (rows < n) & (columns < n)
    tl.store(target + rows * n + columns, tl.load(source + columns * n + rows, inside, 0.0), inside)


@triton.jit
def atomic_kernel(counts):
    tl.atomic_add(counts, 1)
    tl.atomic_cas(counts + 32, 0, 1)


@triton.jit
def grid_kernel(source, together):
    """Programs that a GPU starts one after the other read the same sector."""
    place = tl.program_id(0) + tl.num_programs(0) * tl.program_id(1)
    tl.load(source + place // together * 8)


@triton.jit
def twice_kernel(source, target):
    tl.load(source + tl.program_id(0) * 8)
    tl.load(target + tl.program_id(0) * 8)
    tl.load(source + tl.program_id(0) * 8)


def test_copy_reads_and_writes_every_byte_once() -> None:
    n = 4096
    source, target = buffer(n), buffer(n)
    found = measure(lambda: copy_kernel[(4,)](source, target, n, STEP=1, BLOCK=1024))
    assert totals(found) == (4 * n, 4 * n, 8 * n)
    assert found.launches == found.kernels == ["copy_kernel"]
    assert found.rows[0].programs == 4


def test_masked_lanes_do_not_count_and_a_sector_written_in_part_is_read_first() -> None:
    n = 1001  # 125 sectors and a float
    source, target = buffer(1024), buffer(1024)
    found = measure(lambda: copy_kernel[(2,)](source, target, n, STEP=1, BLOCK=1024))
    assert totals(found) == (126 * 32 + 32, 126 * 32, 8 * n)


def test_strided_loads_move_whole_sectors() -> None:
    n = 512
    source, target = buffer(8 * n), buffer(n)
    found = measure(lambda: copy_kernel[(1,)](source, target, n, STEP=8, BLOCK=n))
    assert totals(found) == (32 * n, 4 * n, 8 * n)


def test_narrow_elements() -> None:
    n = 1024
    source, target = (buffer(n, torch.bfloat16) for _ in range(2))
    found = measure(lambda: copy_kernel[(2,)](source, target, n, STEP=1, BLOCK=512))
    assert totals(found) == (2 * n, 2 * n, 4 * n)


@pytest.mark.parametrize("n", [64, 61])
def test_a_transposed_tile_moves_each_byte_once(n: int) -> None:
    source, target = buffer(n * n), buffer(n * n)
    found = measure(lambda: transposing_kernel[(1,)](source, target, n, BLOCK=64))
    sectors = -(-n * n * 4 // 32)
    assert totals(found) == (32 * (sectors + (n % 8 > 0)), 32 * sectors, 8 * n * n)


def test_the_window_is_exact() -> None:
    blocks, size = 8, 256
    whole = blocks * size * 4
    other = whole - 32  # between two uses of a sector
    source = buffer(blocks * size)
    for window, times in ((other, 1), (other - 32, 2), (10**9, 1)):
        found = measure(lambda: rounds_kernel[(1,)](source, blocks, ROUNDS=2, BLOCK=size), window=window)
        assert totals(found) == (times * whole, 0, 2 * whole)


def test_programs_that_run_together_take_turns() -> None:
    """A block read twice in succession: between its uses every program beside reads one of its own."""
    programs, size = 8, 256
    block = 4 * size

    source = buffer(programs * size)

    def step() -> None:
        rounds_kernel[(programs,)](source, 1, ROUNDS=2, BLOCK=size)

    for together in (1, 2, 4, 8):
        other = together * block - 32
        kept = measure(step, window=other, together=together)
        lost = measure(step, window=other - 32, together=together)
        assert (kept.read, lost.read) == (programs * block, 2 * programs * block)


def test_the_rest_of_the_programs_runs_after_the_first_group() -> None:
    source, target = buffer(8 * 8), buffer(8 * 8)
    for together, window, times in ((8, 15 * 32, 1), (8, 14 * 32, 2), (3, 5 * 32, 1), (3, 4 * 32, 2), (1, 32, 1)):
        found = measure(lambda: twice_kernel[(8,)](source, target), window=window, together=together)
        last = 8 % together or together  # of the last group, which is smaller and so keeps what it reads
        again = 8 if times == 2 and last == together else (8 - last) * (times - 1)
        assert found.read == (16 + again) * 32


def test_programs_are_counted_in_the_order_of_a_gpu() -> None:
    source = buffer(8 * 8)
    found = measure(lambda: grid_kernel[(2, 8)](source, 2), window=0, together=1)
    assert found.read == 8 * 32


def test_what_one_launch_wrote_the_next_finds_on_chip() -> None:
    n = 1024
    x, y, z = buffer(n), buffer(n), buffer(n)

    def step() -> None:
        copy_kernel[(1,)](x, y, n, STEP=1, BLOCK=n)
        copy_kernel[(1,)](y, z, n, STEP=1, BLOCK=n)
        copy_kernel[(1,)](x, y, n, STEP=1, BLOCK=n)

    found = measure(step)
    assert [(row.read, row.written) for row in found.rows] == [(4 * n, 4 * n), (0, 4 * n), (0, 0)]
    apart = measure(step, window=0)
    assert [(row.read, row.written) for row in apart.rows] == [(4 * n, 4 * n)] * 3


def test_a_sector_filled_by_two_launches_is_not_read() -> None:
    target = buffer(8)

    def step() -> None:
        fill_kernel[(1,)](target, 0, 3, BLOCK=8)
        fill_kernel[(1,)](target, 3, 5, BLOCK=8)

    assert totals(measure(step)) == (0, 32, 32)
    assert totals(measure(lambda: fill_kernel[(1,)](target, 0, 7, BLOCK=8))) == (32, 32, 28)

    def read_between() -> None:
        fill_kernel[(1,)](target, 0, 3, BLOCK=8)
        rounds_kernel[(1,)](target, 1, ROUNDS=1, BLOCK=8)
        fill_kernel[(1,)](target, 3, 5, BLOCK=8)

    assert totals(measure(read_between)) == (32, 32, 64)


def test_atomics_load_and_store() -> None:
    counts = torch.zeros(64, dtype=torch.int32)
    found = measure(lambda: atomic_kernel[(3,)](counts))
    assert totals(found) == (2 * 32, 2 * 32, 3 * 16)
    assert counts[0] == 3


def test_operations_of_torch_count_and_views_do_not() -> None:
    x, y = torch.zeros(64, 64), torch.zeros(64, 64)

    def step() -> None:
        x.mT[:2].unbind()
        torch.empty(9)
        x.add_(y)  # reads both
        x.copy_(y.mT)  # reads y
        x[:, :8].mul_(2.0)  # a sector of each row

    found = measure(step)
    assert found.launches == ["aten::add_", "aten::copy_", "aten::mul_"]
    assert found.kernels == []
    assert [row.accesses for row in found.rows] == [3 * 4 * 4096, 2 * 4 * 4096, 2 * 4 * 8 * 64]
    assert [(row.read, row.written) for row in found.rows] == [(2 * 4 * 4096, 4 * 4096), (0, 0), (0, 0)]
    apart = measure(step, window=0)
    assert [row.read for row in apart.rows] == [2 * 4 * 4096, 4 * 4096, 32 * 64]


def test_half_product() -> None:
    """The matrix, the block and the product, each once; the block again for each strip."""
    m, n, k = 128, 192, 16
    w, v, y = buffer(m * n).view(m, n), buffer(n * k).view(n, k), buffer(m * k).view(m, k)
    products.skinny_products([w], [v], [y], None)  # makes the table and the work list
    found = measure(lambda: products.skinny_products([w], [v], [y], None))
    (row,) = (row for row in found.rows if row.name == "product_kernel")
    tables = 1024
    assert 4 * (m * n + n * k) <= row.read <= 4 * (m * n + n * k) + tables
    assert row.written == 4 * m * k
    assert 4 * (m * n + 2 * n * k + m * k) <= row.accesses <= 4 * (m * n + 2 * n * k + m * k) + tables


def test_rank_update() -> None:
    m, n = 96, 128
    w, u, v = buffer(m * n).view(m, n), buffer(m).view(m, 1), buffer(n).view(n, 1)
    c = buffer(8)[:1].view(1, 1)
    for coefficient in (0.0, 1.0):
        c.fill_(coefficient)
        updates.rank_updates_([w], c, [u], [v])
        found = measure(lambda: updates.rank_updates_([w], c, [u], [v]))
        (row,) = found.rows
        assert row.programs == 3
        assert row.written == coefficient * 4 * m * n
        assert row.read - coefficient * 4 * (m * n + m + n) < 1024


def test_outside_nothing_is_recorded_and_the_interpreter_is_as_before() -> None:
    from triton.runtime import interpreter

    before = dict(vars(interpreter.InterpreterBuilder)), dict(vars(interpreter.GridExecutor))
    counter = Counter()
    with counter:
        assert dict(vars(interpreter.GridExecutor)) != before[1]
    with pytest.raises(ZeroDivisionError), counter:
        1 / 0  # noqa: B018
    assert (dict(vars(interpreter.InterpreterBuilder)), dict(vars(interpreter.GridExecutor))) == before
    copy_kernel[(1,)](buffer(8), buffer(8), 8, STEP=1, BLOCK=8)
    assert counter.traffic().rows == ()


def test_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        measure(lambda: None)


def test_the_same_step_gives_the_same_figures() -> None:
    def run() -> Traffic:
        w, v, y = buffer(96 * 128).view(96, 128), buffer(128 * 16).view(128, 16), buffer(96 * 16).view(96, 16)
        products.skinny_products([w], [v], [y], None)
        return measure(lambda: products.skinny_products([w], [v], [y], None), window=32_000, together=2)

    assert run() == run()
