"""The solve kernel against the trackers on the torch reference, from the same state."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from specopt.kernels import records as r
from specopt.kernels.bucket import RITZ, Bucket, Tracked
from specopt.kernels.solves import decisions, rows
from specopt.kernels.solves import device as solves
from specopt.tracker import common
from specopt.tracker.common import BLOCK, LEFT, RIGHT, STATS, STEP, Stat
from specopt.views import Matrix

from .samples import DEVICE, generator
from .solve_records import (
    TRACKERS,
    Records,
    assert_same_state,
    begin,
    both,
    check,
    decaying,
    matrix_of,
    spectrum,
    twin,
    warm,
)

pytestmark = pytest.mark.usefixtures("on_device")

# --- a step --------------------------------------------------------------------------------------------------------
SHAPES = [((65, 41), 8), ((23, 130), 8), ((147, 61), 16), ((70, 67), 32), ((20, 19), 4), ((9, 8), 2)]


@TRACKERS
@pytest.mark.parametrize("count", [20, 21])
@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_a_warm_step_is_the_references(tracker, count, shape, block, monkeypatch):
    check([warm(decaying(*shape), tracker, count, block=block)], tracker, 2, monkeypatch)


@TRACKERS
def test_the_largest_block(tracker, monkeypatch):
    check([warm(decaying(131, 140), tracker, block=64)], tracker, 2, monkeypatch)


@TRACKERS
@pytest.mark.parametrize("count", [0, 1])
def test_a_cold_step_makes_several_pairs(tracker, count, monkeypatch):
    matrix = matrix_of(decaying(60, 45), tracker, max_passes=4)
    begin(matrix, tracker, count)
    check([matrix], tracker, 4, monkeypatch)
    assert matrix.state[STATS][Stat.PAIRS] == (4 if tracker == "pairs" else 3.5)


@TRACKERS
def test_a_settled_matrix_makes_one_pair_beside_one_that_is_not(tracker, monkeypatch):
    """The passes of a matrix that is done may leave anything where its products were."""
    still = warm(decaying(50, 40), tracker, tolerance=10.0, top=1.0)
    restless = warm(decaying(45, 61, 1), tracker, count=21)
    records = check([still, restless], tracker, 2, monkeypatch)
    pairs_made = [float(matrix.state[STATS][Stat.PAIRS]) for matrix in (still, restless)]
    assert pairs_made == ([1, 2] if tracker == "pairs" else [0.5, 1.5])
    assert not records.wants(0)


@TRACKERS
def test_matrices_share_a_launch_and_do_not_touch_each_other(tracker, monkeypatch):
    def some() -> list[Matrix]:
        wide = torch.zeros(60, 3 * 50)
        wide[:, ::3] = decaying(60, 50, 2)
        return [
            warm(decaying(40, 9), tracker),  # exact
            warm(decaying(65, 41), tracker),
            warm(decaying(12, 90), tracker),  # exact, read transposed
            warm(decaying(55, 43, 1).mT.contiguous().mT, tracker, count=33),
            warm(torch.full((20, 18), math.nan), tracker),
            warm(wide[:, ::3], tracker, count=7),
            warm(decaying(16, 140).mT.contiguous().mT, tracker),  # exact
        ]

    options = {"max_passes": 2}
    together, apart = some(), some()
    for matrix in [*together, *apart]:
        matrix.group.update(options)
    check(together, tracker, 2, monkeypatch)
    for one, other in zip(together, apart, strict=True):
        getattr(Records([other], tracker), f"{tracker}_step")(2)
        for key in one.state:
            assert key == STEP or torch.equal(one.state[key].nan_to_num(), other.state[key].nan_to_num()), key


@TRACKERS
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scales_whose_squares_are_out_of_range(tracker, scale, monkeypatch):
    weights = [decaying(65, 41, scale=scale), decaying(50, 11, scale=scale)]
    matrices = [warm(weight, tracker, target=0.9 * scale, top=0.4 * scale) for weight in weights]
    check(matrices, tracker, 2, monkeypatch)
    torch.testing.assert_close(matrices[1].state[STATS][Stat.SIGMA].item(), scale, rtol=1e-5, atol=0.0)


@TRACKERS
def test_a_zero_matrix_stays_zero(tracker, monkeypatch):
    matrices = [warm(torch.zeros(40, 30), tracker), warm(torch.zeros(40, 9), tracker)]
    for matrix in matrices:
        matrix.state[STATS][Stat.CAPPED] = 1
    check(matrices, tracker, 2, monkeypatch)
    assert all((matrix.weight == 0).all() for matrix in matrices)


@TRACKERS
def test_a_matrix_of_subnormal_numbers_counts_as_zero(tracker, monkeypatch):
    matrices = [warm(decaying(65, 41, scale=1e-41), tracker), warm(decaying(50, 11, scale=1e-41), tracker)]
    before = [matrix.weight.clone() for matrix in matrices]
    _, twins, _ = both(matrices, tracker, 2, monkeypatch)  # its first vectors are any
    for matrix, expected, old in zip(matrices, twins, before, strict=True):
        assert_same_state(matrix, expected)
        assert torch.equal(matrix.weight, old) and matrix.state[STATS][Stat.SIGMA] == 0
        kept = [value for value in matrix.state.values() if isinstance(value, torch.Tensor) and value.ndim > 1]
        assert all(value.isfinite().all() for value in kept)


@TRACKERS
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_a_weight_that_is_not_finite_changes_nothing_but_the_stats(tracker, bad, monkeypatch):
    weights = [decaying(40, 33), decaying(30, 8)]
    for weight in weights:
        weight[3:5] = bad
    matrices = [warm(weight, tracker) for weight in weights]
    before = [twin(matrix) for matrix in matrices]
    check(matrices, tracker, 2, monkeypatch)
    for matrix, old in zip(matrices, before, strict=True):
        if not matrix.weight.isfinite().all():
            assert matrix.state[STATS][Stat.VALID] == 0
            for key in matrix.state.keys() - {STATS, STEP}:
                assert torch.equal(matrix.state[key], old.state[key])


@TRACKERS
def test_equal_singular_values(tracker, monkeypatch):
    """Any of them is right; a direction outside the block may lie above all within."""
    monkeypatch.setenv("SPECOPT_BACKEND", "reference")
    flat = warm(spectrum(60, 40, torch.full((40,), 2.0, dtype=torch.float64), 3), tracker, target=2.0)
    exact = warm(spectrum(30, 8, torch.full((8,), 2.0, dtype=torch.float64), 3), tracker, target=2.0)
    records = Records([flat, exact], tracker)
    getattr(records, f"{tracker}_step")(2)
    for i, matrix in enumerate((flat, exact)):
        sigma = matrix.state[STATS][Stat.SIGMA]
        assert 1.9 < sigma < 2.001 or not matrix.complete
        vectors = [records.scratch[i][f"{side}_VECTORS"][:, 0].double() for side in ("LEFT", "RIGHT")]
        for vector in vectors:
            torch.testing.assert_close(vector.norm().item(), 1.0, rtol=1e-5, atol=0.0)
    for key in flat.state.keys() & {BLOCK, LEFT, RIGHT}:
        basis = flat.state[key][:, : flat.columns].double()
        norms = basis.norm(dim=0)
        assert ((norms - 1).abs() < 1e-4).logical_or(norms == 0).all()
        assert (basis.mT @ basis - torch.diag(norms**2)).abs().max() < 1e-4


@TRACKERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exact_matrices_in_half_precision(tracker, dtype, monkeypatch):
    matrix = warm(decaying(60, 13).to(dtype), tracker, lr=0.0)
    check([matrix], tracker, 1, monkeypatch)


@TRACKERS
def test_following_a_weight_that_moves(tracker):
    """Six steps after a cold start: sigma as the exact decomposition has it."""
    matrix = matrix_of(decaying(64, 50), tracker, lr=0.0)
    begin(matrix, tracker, 0)
    random = generator(5)
    for step in range(6):
        matrix.weight.add_(0.01 * decaying(64, 50, seed=int(torch.randint(100, (), generator=random, device="cpu"))))
        getattr(Records([matrix], tracker), f"{tracker}_step")(4 if step == 0 else 2)
    exact = torch.linalg.svdvals(matrix.weight.double())[0]
    assert abs(float(matrix.state[STATS][Stat.SIGMA] / exact) - 1) < 1e-3
    assert matrix.state[STATS][Stat.RESIDUAL] < 0.05


@TRACKERS
def test_two_runs_give_the_same_bits(tracker):
    found = []
    for _ in range(2):
        matrix = warm(decaying(60, 45), tracker)
        records = Records([matrix], tracker)
        getattr(records, f"{tracker}_step")(2)
        found.append([value for value in matrix.state.values() if isinstance(value, Tensor)] + [records.sigmas[:, :7]])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


# --- stages --------------------------------------------------------------------------------------------------------
@triton.jit
def _strips_kernel(lengths, out, K: tl.constexpr):
    length = tl.load(lengths + tl.program_id(0))
    tl.store(out + 2 * tl.program_id(0), rows.strip_rows(length, K))
    tl.store(out + 2 * tl.program_id(0) + 1, rows.strips_of(length, K))


@pytest.mark.parametrize("kp", [16, 32, 64])
def test_host_and_device_cut_the_same_strips(kp, device):
    lengths = torch.tensor([1, 31, 32, 33, 128, 129, 2000, 2048, 2049, 8192, 8193, 50257], dtype=torch.int32)
    found = torch.zeros(len(lengths), 2, dtype=torch.int32, device=device)
    _strips_kernel[(len(lengths),)](lengths.to(device), found, K=kp)
    for length, (size, count) in zip(lengths.tolist(), found.tolist(), strict=True):
        assert count == rows.strips(length, kp) <= rows.MOST_STRIPS.value
        assert (count - 1) * size < length <= count * size
        needed = count * (kp * kp + 2 * kp)
        assert rows.partial_rows((length, length), kp) * kp == needed
        assert min(rows.partial_rows(shape, kp) for shape in ((1, length), (length, 10 * length + 1))) * kp >= needed


def test_a_shorter_side_of_more_strips_writes_into_no_other_matrix():
    """2,048 rows of 64 columns are cut into 64 strips, and 2,080 into 33."""

    def tracked(m, n):
        weight, right = (torch.randn(*shape, generator=generator(4)).to(DEVICE) for shape in ((m, n), (n, 40)))
        stats, probe = torch.zeros(len(Stat), device=DEVICE), torch.zeros(n, 8, device=DEVICE)
        return Tracked(weight, 40, 8, False, stats, right=right, right_probe=probe)

    bucket = Bucket([tracked(2048, 2080), tracked(40, 48)])
    bucket.set_numbers(np.ones((2, r.NUMBERS.value), np.float32))
    bucket.set_addresses([[0] * 7] * 2)
    start = (bucket._host[1][r.LEFT_PRODUCT.value] - bucket._scratch.data_ptr()) // 4
    bucket._scratch.fill_(1.0)
    bucket.launch_solve(RITZ, round=0, last=False, found_inf=None)
    assert (bucket._scratch[:start] != 1.0).any()
    assert (bucket._scratch[start : start + 40 * 64] == 1.0).all()


@TRACKERS
def test_the_bits_do_not_depend_on_how_many_programs_share_a_solve(tracker):
    """Of 3 strips on one side and 2 on the other."""
    found = []
    for most in (1, 2, 100):
        matrices = [warm(decaying(300, 150), tracker, tolerance=10.0, top=1.0), warm(decaying(70, 140), tracker)]
        records = Records(matrices, tracker)
        for key, work in records.solving.items():
            count = [min(int((work[:, 0] == b).sum()), most) for b in range(2)]
            tasks = [(b, index, count[b]) for b in range(2) for index in range(count[b])]
            records.solving[key] = torch.tensor(tasks, dtype=torch.int32, device=work.device)
            assert most != 100 or torch.equal(records.solving[key], work)
        getattr(records, f"{tracker}_step")(2)
        assert not records.wants(0) and (records.tickets == 0).all()
        state = [value for m in matrices for value in m.state.values() if isinstance(value, Tensor)]
        vectors = [scratch[f"{side}_VECTORS"][:, 0] for scratch in records.scratch for side in ("LEFT", "RIGHT")]
        found.append([*state, *vectors, *(m.weight for m in matrices), records.sigmas, records.scalars])
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            torch.testing.assert_close(same, one, rtol=0, atol=0, equal_nan=True)


@TRACKERS
@pytest.mark.parametrize("off", [1e-2, 1e-5])
def test_a_small_residual_is_not_lost_in_rounding(tracker, off):
    """Also over several strips; squares subtracted from each other would leave 3e-4."""
    matrix = warm(decaying(300, 150), tracker, tolerance=10.0, top=1.0, lr=0.0)
    left, sigma, right = torch.linalg.svd(matrix.weight.double(), full_matrices=False)
    k = matrix.columns
    for key, truth in ((LEFT, left), (RIGHT, right.mT), (BLOCK, right.mT)):
        if key in matrix.state:
            tilted = truth[:, :k].clone()
            tilted[:, 0] += off * truth[:, k + 3]
            matrix.state[key][:, :k] = torch.linalg.qr(tilted)[0]
    wide = torch.linalg.qr(matrix.state[RIGHT if tracker == "halves" else BLOCK][:, :k].double())[0]
    records = Records([matrix], tracker)
    getattr(records, f"{tracker}_step")(2)
    product = matrix.weight.double() @ wide
    if tracker == "pairs":  # of the Ritz triplet
        u, _, v = torch.linalg.svd(product, full_matrices=False)
        image = matrix.weight.double().mT @ u[:, 0] / sigma[0]
        truth = (image - (image @ (wide @ v[0])) * (wide @ v[0])).norm()
    else:  # of the first column beside its image
        image, old = product[:, 0] / sigma[0], torch.linalg.qr(left[:, :k] + 0)[0]
        tilted = left[:, :k].clone()
        tilted[:, 0] += off * left[:, k + 3]
        old = torch.linalg.qr(tilted)[0][:, 0]
        truth = (image - (image @ old) * old).norm()
    torch.testing.assert_close(float(matrix.state[STATS][Stat.RESIDUAL]), float(truth), rtol=2e-2, atol=3e-7)


# --- what is decided -----------------------------------------------------------------------------------------------
CHOICES = [
    {"mode": "set", "target": 3.0},
    {"mode": "cap", "target": 3.0},
    {"mode": "cap", "target": 0.2},
    {"mode": "rescale", "target": 3.0},
    {"mode": "rescale", "target": 0.2},
    {"mode": "set", "target": 3.0, "capped": True},
    {"mode": "set", "target": 0.2, "capped": True},
    {"mode": "set", "target": 3.0, "capped": True, "raise_small": True},
    {"mode": "set", "target": 3.0, "lr": 0.0},
    {"mode": "rescale", "target": 3.0, "lr": 0.0},
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: " ".join(str(value) for value in choice.values()))
def test_the_correction_is_the_rules(choice, monkeypatch):
    choice = dict(choice)
    capped = choice.pop("capped", False)
    matrices = [warm(decaying(50, 41), "pairs", **choice), warm(decaying(40, 10), "pairs", **choice)]
    for matrix in matrices:
        matrix.state[STATS][Stat.CAPPED] = float(capped)
    records = check(matrices, "pairs", 2, monkeypatch)
    if choice.get("lr") == 0 or (choice["mode"] == "cap" and choice["target"] == 3.0):
        assert (records.scalars[:, r.CHANGE.value] == 0).all() and (records.scalars[:, r.FACTOR.value] == 1).all()


def test_target_and_learning_rate_on_the_device_come_first():
    for rate in (0.0, 0.1):
        options = {"target_at": torch.tensor(3.0), "lr": torch.tensor(rate)}
        matrices = [warm(decaying(50, 41), "pairs", **options), warm(decaying(40, 10), "pairs", **options)]
        records = Records(matrices, "pairs")
        records.product(0, 0)
        records.solve(solves.RITZ, 0, False)
        expected = (3 - records.scalars[:, r.SIGMA.value]) * (rate != 0)
        torch.testing.assert_close(records.scalars[:, r.CHANGE.value], expected)


def test_the_step_count_on_the_device_moves_once_a_step():
    counts = [torch.tensor(4.0), torch.tensor(7.0)]
    matrices = [
        warm(decaying(50, 41), "pairs", step=counts[0]),
        warm(decaying(40, 10), "pairs", step=counts[1]),
        warm(decaying(40, 11), "pairs"),
    ]
    Records(matrices, "pairs").pairs_step(3)
    assert [count.item() for count in counts] == [5, 8]


@TRACKERS
def test_a_lost_block_calls_for_a_pair_in_every_round(tracker):
    """Unless their number is fixed."""
    for limit, wanted in ((None, True), (2, False)):
        matrix = warm(decaying(60, 45), tracker, max_passes=limit, tolerance=1e-6)
        matrix.state[STATS][Stat.RESIDUAL] = 0.5
        records = Records([matrix], tracker)
        getattr(records, f"{tracker}_step")(2)
        assert records.wants(0) == wanted


@TRACKERS
def test_nothing_happens_where_a_scaler_has_found_an_infinity(tracker):
    matrices = [warm(decaying(40, 33), tracker), warm(decaying(40, 9), tracker)]
    before = [twin(matrix) for matrix in matrices]
    records = Records(matrices, tracker)
    for kind in (solves.RITZ, solves.BASIS, solves.TURN):
        records.solve(kind, 0, True, torch.tensor([1.0]))
    assert records.scalars.isnan().all() and records.sigmas.isnan().all()
    for matrix, old in zip(matrices, before, strict=True):
        assert all(key == STEP or torch.equal(matrix.state[key], old.state[key]) for key in old.state)
    getattr(records, f"{tracker}_step")(1)
    assert not records.scalars[:, r.SIGMA.value].isnan().any()


def test_the_schedule_is_the_trackers():
    assert decisions.COLD_MAX.value == common.COLD_MAX
    assert decisions.LOST.value == common.LOST
    assert decisions.JUMP.value == common.JUMP
    names = [name for name in vars(r) if name.startswith("STAT_")]
    assert {name: getattr(r, name).value for name in names} == {f"STAT_{stat.name}": stat.value for stat in Stat}
