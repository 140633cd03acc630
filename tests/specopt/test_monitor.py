"""SpectralMonitor notes what the tracker knows, makes no step wait, and changes nothing."""

from __future__ import annotations

import copy
import csv
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import specopt
from specopt.seeing import SpectralHistory, snapshot
from specopt.seeing.history import EVERYTHING, QUANTITIES
from specopt.tracker.common import STATS
from tests.specopt.helpers import OURS, clones, equal, exact, parameters, set_gradients, train
from tests.specopt.monitored import small

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")


@pytest.mark.parametrize("kind", OURS)
def test_record_is_what_the_step_left_and_agrees_with_svd(kind: str) -> None:
    params = parameters(torch.float32)
    optimizer = OURS[kind](params)
    monitor = specopt.SpectralMonitor(optimizer, every=1, weights=True, gradients=True)
    train(optimizer, params, range(3))
    assert monitor.history.steps.tolist() == [1, 2, 3]
    last = {name: monitor.history[name][-1] for name in QUANTITIES}
    matrices = [param for param in params if param.ndim > 1]
    assert monitor.history.names == tuple(f"0.{i}" for i in range(len(matrices)))
    for i, param in enumerate(matrices):
        stats = optimizer.state[param][STATS].tolist()
        for name, stat in snapshot.STORED.items():
            unknown = name == "sigma_after" and kind == "frobenius"
            np.testing.assert_equal(last[name][i], math.nan if unknown else stats[stat])
        values = exact(param)[1]
        assert last["frobenius"][i] == pytest.approx(float(values.norm()), rel=1e-5)
        out_over_in = math.sqrt(param.shape[0] / param.shape[1])
        if kind == "set":
            assert last["sigma_after"][i] == pytest.approx(float(values[0]), rel=1e-2)
            assert last["stable_rank"][i] == pytest.approx(float((values.norm() / values[0]) ** 2), rel=2e-2)
            assert last["target"][i] == pytest.approx(out_over_in)
        elif kind == "snr":
            assert math.isnan(last["target"][i]) and last["sigma"][i] == last["sigma_after"][i]
        else:
            assert last["target"][i] == pytest.approx(out_over_in * math.sqrt(min(param.flatten(1).shape)))
            assert math.isnan(last["sigma"][i]) and math.isnan(last["stable_rank"][i])
    total = math.sqrt(sum(float(param.grad.double().square().sum()) for param in params if param.grad is not None))
    assert monitor.history.gradient_norm[-1] == pytest.approx(total, rel=1e-6)


def test_sigma_is_that_before_the_correction_and_sigma_after_that_after_it() -> None:
    weight = nn.Parameter(3 * torch.eye(10))
    optimizer = specopt.NormScaleAdamW([weight], lr=1e-8)
    monitor = specopt.SpectralMonitor(optimizer, every=1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert monitor.history["sigma"][0, 0] == pytest.approx(3, rel=1e-5)
    assert monitor.history["sigma_after"][0, 0] == pytest.approx(3, rel=1e-5)  # nine of ten are still there
    (row,) = monitor.history.records[0].rows().values()
    assert row["target"] == 1 and row["valid"] == 1 and row["pairs"] == 0.5 and "frobenius" not in row


@pytest.mark.parametrize("kind", OURS)
def test_training_has_the_same_bits_with_a_monitor(kind: str, tmp_path: Path) -> None:
    params = small()
    others = clones(params)
    plain, watched = OURS[kind](params), OURS[kind](others)
    specopt.SpectralMonitor(watched, every=2, to=tmp_path / "x.csv", weights=True, gradients=True)
    random = torch.get_rng_state()
    train(plain, params, range(5))
    train(watched, others, range(5))
    assert equal([p.detach() for p in params], [p.detach() for p in others])
    assert torch.equal(torch.get_rng_state(), random)
    for param, other in zip(params, others, strict=True):
        assert watched.state[other].keys() == plain.state[param].keys()


def test_first_step_and_every_nth_are_noted() -> None:
    params = small()
    optimizer = specopt.SNRSGD(params, lr=0.01)
    monitor = specopt.SpectralMonitor(optimizer, every=3)
    train(optimizer, params, range(10))
    assert monitor.history.steps.tolist() == [1, 3, 6, 9]
    monitor.observe()
    assert monitor.history.steps.tolist() == [1, 3, 6, 9, 10]


def test_compiled_function_that_steps_is_monitored() -> None:
    params = small()
    optimizer = specopt.SNRSGD(params, lr=0.01)
    monitor = specopt.SpectralMonitor(optimizer, every=2)
    set_gradients(params, clones(params), seed=0)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    with pytest.warns(UserWarning, match=r"torch\.compile leaves the step"):
        for _ in range(4):
            step()
    assert monitor.history.steps.tolist() == [1, 2, 4]


def test_wrapped_optimizers_are_monitored_until_they_are_unwrapped() -> None:
    params = small()
    optimizer = specopt.wrap(torch.optim.RMSprop(params, lr=1e-3), specopt.SpectralDecay(0.1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    monitor = specopt.SpectralMonitor(optimizer, every=1)
    train(optimizer, params, range(2))
    scheduler.step()
    assert monitor.history.steps.tolist() == [1, 2] and np.isnan(monitor.history["target"]).all()
    specopt.unwrap(optimizer)
    train(optimizer, params, range(2, 4))
    assert len(monitor.history) == 2
    with pytest.raises(TypeError, match=r"wrapped by specopt\.wrap, got RMSprop"):
        monitor.observe()
    monitor.close()


def test_groups_added_later_appear_and_are_not_known_before() -> None:
    first, second = small(0), small(1)
    optimizer = specopt.SNRSGD(first, lr=0.01)
    monitor = specopt.SpectralMonitor(optimizer, every=1)
    train(optimizer, first, range(2))
    optimizer.add_param_group({"params": second})
    train(optimizer, first, range(2, 3))  # the new ones have no gradient yet
    train(optimizer, [*first, *second], range(3, 4))
    sigma = monitor.history["sigma"]
    assert monitor.history.names == ("0.0", "0.1", "0.2", "1.0", "1.1", "1.2") and sigma.shape == (4, 6)
    assert np.isnan(sigma[:3, 3:]).all() and np.isfinite(sigma[3]).all() and np.isfinite(sigma[:, :3]).all()


def test_weights_whose_control_is_off_are_not_noted_and_parts_have_a_row_each() -> None:
    params = small()
    groups = [{"params": params[:1], "snr_lambda": 0.0}, {"params": params[1:2], "view": "rows:3"}]
    optimizer = specopt.SNRSGD(groups, lr=0.01)
    monitor = specopt.SpectralMonitor(optimizer, every=1)
    train(optimizer, params[:2], range(1))
    assert monitor.history.names == ("1.0[0]", "1.0[1]", "1.0[2]")
    assert np.isfinite(monitor.history["sigma"]).all()


def test_steps_go_on_from_a_loaded_state_and_a_step_seen_again_takes_the_place_of_the_old(tmp_path: Path) -> None:
    params = small()
    optimizer = specopt.NormScaleAdamW(params, lr=1e-3)
    path = tmp_path / "sigma.csv"
    with specopt.SpectralMonitor(optimizer, every=1, to=path) as monitor:
        train(optimizer, params, range(3))
        saved = copy.deepcopy(optimizer.state_dict())
        train(optimizer, params, range(3, 5))
        assert monitor.history.steps.tolist() == [1, 2, 3, 4, 5]
        optimizer.load_state_dict(copy.deepcopy(saved))
        train(optimizer, params, range(3, 4))
        assert monitor.step == 4 and monitor.history.steps.tolist() == [1, 2, 3, 4]
    others = clones(params)
    resumed = specopt.NormScaleAdamW(others, lr=1e-3)
    with specopt.SpectralMonitor(resumed, every=2, to=path) as second:
        resumed.load_state_dict(saved)
        train(resumed, others, range(3))
    assert second.history.steps.tolist() == [4, 6]
    read = SpectralHistory.from_csv(path)
    assert read.steps.tolist() == [1, 2, 3, 4, 6]
    assert read["sigma"][3].tolist() == second.history["sigma"][0].tolist()


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("made", [1, 5, 8, 11])
def test_steps_between_looks_count(base: type[torch.optim.Optimizer], made: int) -> None:
    params = small()
    rule = specopt.NormScale(mode="cap", every=4)
    optimizer = specopt.wrap(base(params, lr=1e-3), rule)
    train(optimizer, params, range(made))
    assert specopt.SpectralMonitor(optimizer).step == made
    resumed = specopt.wrap(base(clones(params), lr=1e-3), rule)
    with specopt.SpectralMonitor(resumed) as monitor:
        resumed.load_state_dict(optimizer.state_dict())
        assert monitor.step == made


def test_steps_go_on_though_trackers_have_started_anew() -> None:
    params = small()
    optimizer = specopt.NormScaleAdamW(params, lr=1e-3)
    train(optimizer, params, range(3))
    optimizer.param_groups[0]["block"] = 16
    train(optimizer, params, range(3, 5))
    assert specopt.SpectralMonitor(optimizer).step == 5


def carries_hooks() -> type[torch.optim.SGD]:
    class Carrying(torch.optim.SGD):
        def __getstate__(self) -> dict[str, Any]:
            return dict(self.__dict__)

    return Carrying


@pytest.mark.parametrize("how", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copies_of_an_optimizer_work_and_are_not_monitored(how: Callable[[Any], Any], tmp_path: Path) -> None:
    params = small()
    optimizer = specopt.wrap(torch.optim.Adam(params, lr=1e-3), specopt.NormScale(mode="cap"))
    with specopt.SpectralMonitor(optimizer, every=1, to=tmp_path / "x.csv") as monitor:
        train(optimizer, params, range(1))
        copied = how(optimizer)
        theirs = copied.param_groups[0]["params"]
        train(copied, theirs, range(2))
        assert len(monitor.history) == 1
        train(optimizer, params, range(1, 2))
        assert len(monitor.history) == 2


def test_optimizers_that_take_their_hooks_along_can_be_copied(tmp_path: Path) -> None:
    params = small()
    optimizer = specopt.wrap(carries_hooks()(params, lr=1e-3), specopt.SpectralPenalty(0.01))
    with specopt.SpectralMonitor(optimizer, every=1, to=tmp_path / "x.csv") as monitor:
        train(optimizer, params, range(1))
        copied = copy.deepcopy(optimizer)
        train(copied, copied.param_groups[0]["params"], range(2))
        assert len(monitor.history) == 1


def test_closing_lets_go_and_can_be_repeated(tmp_path: Path) -> None:
    params = small()
    optimizer = specopt.SNRSGD(params, lr=0.01)
    with pytest.raises(ZeroDivisionError), specopt.SpectralMonitor(optimizer, 1, tmp_path / "x.csv") as monitor:
        train(optimizer, params, range(1))
        raise ZeroDivisionError
    monitor.close()
    assert not optimizer._optimizer_step_post_hooks and not optimizer._optimizer_load_state_dict_post_hooks
    train(optimizer, params, range(1, 2))
    assert len(monitor.history) == 1
    with pytest.raises(RuntimeError, match="the monitor is closed"):
        monitor.observe()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"to": 3}, TypeError, "to must be the path of a CSV file, .* got int"),
        ({"to": {"x.csv": 1}}, TypeError, "several of these, got dict"),
        ({"to": ["x.csv", None]}, TypeError, "several of these, got NoneType"),
        ({"every": 0}, ValueError, "every must be a whole number from 1 up, got 0"),
        ({"every": 2.5}, ValueError, "every must be a whole number from 1 up, got 2.5"),
        ({"every": True}, ValueError, "every must be a whole number from 1 up, got True"),
        ({"keep": 0}, ValueError, "keep must be a whole number from 1 up, got 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    options: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=message):
        specopt.SpectralMonitor(specopt.SNRSGD(small()), **options)


def test_plain_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"optimizer must be one of specopt, or wrapped by specopt.wrap, got SGD"):
        specopt.SpectralMonitor(torch.optim.SGD(small()))


def test_error_of_a_function_is_raised_by_the_step() -> None:
    def broken(step: int, rows: object) -> None:
        raise KeyError("mine")

    params = small()
    optimizer = specopt.SNRSGD(params, lr=0.01)
    specopt.SpectralMonitor(optimizer, 1, broken)
    with pytest.raises(KeyError, match="mine"):
        train(optimizer, params, range(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_gradient_norm_neither_overflows_nor_underflows(dtype: torch.dtype, scale: float) -> None:
    if dtype == torch.float16:
        scale = 1e4 if scale > 1 else 1.0
    params = [param.detach().to(dtype).requires_grad_() for param in small()]
    optimizer = specopt.SNRSGD(params, lr=0.0)
    monitor = specopt.SpectralMonitor(optimizer, 1, gradients=True)
    for param in params:
        param.grad = (scale * torch.randn(param.shape)).to(dtype)
    optimizer.step()
    total = math.hypot(*[float(param.grad.double().norm()) for param in params if param.grad is not None])
    assert monitor.history.gradient_norm[0] == pytest.approx(total, rel=1e-6)


def test_gradient_norm_covers_mixed_dtypes_and_is_unknown_where_one_is_sparse() -> None:
    params = [torch.randn(5, 4).requires_grad_(), torch.randn(3, dtype=torch.float64).requires_grad_()]
    embedding = nn.Parameter(torch.randn(6, 2))
    groups = [{"params": params}, {"params": [embedding], "spectral": False}]
    optimizer = specopt.SNRSGD(groups, lr=0.1)
    monitor = specopt.SpectralMonitor(optimizer, 1, gradients=True)
    set_gradients(params, clones(params), seed=0)
    optimizer.step()
    total = math.hypot(*[float(param.grad.double().norm()) for param in params if param.grad is not None])
    assert monitor.history.gradient_norm[0] == pytest.approx(total, rel=1e-6)
    embedding.grad = torch.eye(6)[:, :2].to_sparse()
    optimizer.step()
    assert math.isnan(monitor.history.gradient_norm[1])
    assert EVERYTHING not in monitor.history.records[1].rows()


def test_gradient_norm_is_without_the_factor_of_a_scaler() -> None:
    param = nn.Parameter(torch.randn(5, 4))
    optimizer = specopt.SNRSGD([param], lr=0.1, fused=True)
    monitor = specopt.SpectralMonitor(optimizer, 1, gradients=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((param * param).sum()).backward()
    before = 2 * param.detach().norm()
    scaler.step(optimizer)
    assert monitor.history.gradient_norm[0] == pytest.approx(float(before), rel=1e-5)


def test_weight_that_is_not_finite_is_noted_as_not_valid(tmp_path: Path) -> None:
    params = small()
    optimizer = specopt.NormScaleAdamW(params, lr=1e-3)
    path = tmp_path / "x.csv"
    with specopt.SpectralMonitor(optimizer, 1, path, weights=True) as monitor, torch.no_grad():
        params[0][0, 0] = torch.inf
        train(optimizer, params, range(1))
    assert monitor.history["valid"][0].tolist() == [0, 1, 1]
    assert not np.isfinite(monitor.history["frobenius"][0, 0]) and np.isnan(monitor.history["sigma_after"][0, 0])
    with open(path, newline="") as file:
        assert [line["valid"] for line in csv.DictReader(file)] == ["0.0", "1.0", "1.0"]
