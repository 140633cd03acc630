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
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import specopt
from specopt import kernels
from specopt.seeing import SpectralHistory, snapshot
from specopt.seeing.history import COLUMNS, EVERYTHING, QUANTITIES, Record
from specopt.tracker.common import STATS, HostCopy, Stat
from tests.specopt.helpers import DEVICE, OURS, clones, equal, exact, parameters, set_gradients, train

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")

Noted = list[tuple[int, dict[str, dict[str, float]]]]


def small(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(70, 66), (12, 5), (8, 4, 3, 3), (7,)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def noted() -> tuple[Noted, Callable[[int, dict[str, dict[str, float]]], None]]:
    rows: Noted = []
    return rows, lambda step, found: rows.append((step, found))


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


class Writer:
    """What SummaryWriter is asked for."""

    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars[tag, step] = value


def test_several_sinks_get_the_same_values(tmp_path: Path) -> None:
    params = small()
    optimizer = specopt.NormScaleAdamW([(f"layer{i}.weight", p) for i, p in enumerate(params)], lr=1e-3)
    rows, function = noted()
    writer, path = Writer(), tmp_path / "new" / "sigma.csv"
    with specopt.SpectralMonitor(optimizer, 2, [path, writer, function], weights=True, gradients=True) as monitor:
        train(optimizer, params, range(4))
        lines = path.read_text().splitlines()  # before it is closed: a run that is killed leaves them
        assert len(lines) == 1 + 3 * (3 + 1)
    history = SpectralHistory.from_csv(path)
    assert history.steps.tolist() == monitor.history.steps.tolist() == [step for step, _ in rows] == [1, 2, 4]
    assert history.names == monitor.history.names == ("layer0.weight", "layer1.weight", "layer2.weight")
    for name in QUANTITIES:
        np.testing.assert_array_equal(history[name], monitor.history[name])
    np.testing.assert_array_equal(history.gradient_norm, monitor.history.gradient_norm)
    for i, (step, found) in enumerate(rows):
        assert found[EVERYTHING] == {"gradient_norm": history.gradient_norm[i]}
        assert writer.scalars["gradient_norm", step] == history.gradient_norm[i]
        for j, name in enumerate(history.names):
            assert found[name]["sigma"] == writer.scalars[f"sigma/{name}", step] == history["sigma"][i, j]
    assert not any(math.isnan(value) for value in writer.scalars.values())


def test_tensorboard_reads_what_a_summary_writer_was_given(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    params = small()
    optimizer = specopt.NormScaleAdamW(params, lr=1e-3)
    writer = SummaryWriter(str(tmp_path))  # type: ignore[no-untyped-call]
    with specopt.SpectralMonitor(optimizer, every=2, to=writer) as monitor:
        train(optimizer, params, range(4))
    events = EventAccumulator(str(tmp_path)).Reload()
    scalars = events.Scalars("sigma/0.1")
    assert [event.step for event in scalars] == [1, 2, 4]
    assert [event.value for event in scalars] == pytest.approx(monitor.history["sigma"][:, 1].tolist(), rel=1e-6)
    writer.add_scalar("still", 1.0, 1)  # type: ignore[no-untyped-call]
    writer.close()  # type: ignore[no-untyped-call]


class Flight:
    """An event of copies that are under way until they are let arrive, or waited for."""

    def __init__(self) -> None:
        self.landed = self.waited = False

    def query(self) -> bool:
        return self.landed

    def synchronize(self) -> None:
        self.landed = self.waited = True


@pytest.fixture
def flights(monkeypatch: pytest.MonkeyPatch) -> list[Flight]:
    """Copies of the monitor arrive when they are told to, as from a GPU."""
    found: list[Flight] = []

    class InFlight(HostCopy):
        @classmethod
        def of(cls, tensor: Tensor) -> HostCopy:
            found.append(Flight())
            return HostCopy(tensor.clone(), found[-1])  # type: ignore[arg-type]

    monkeypatch.setattr(snapshot, "HostCopy", InFlight)
    return found


def test_nothing_is_waited_for_before_the_end_and_records_keep_their_order(flights: list[Flight]) -> None:
    params = small()
    optimizer = specopt.NormScaleAdamW(params, lr=1e-3)
    rows, function = noted()
    monitor = specopt.SpectralMonitor(optimizer, every=1, to=function)
    train(optimizer, params, range(2))
    sigmas = [float(optimizer.state[params[0]][STATS][Stat.SIGMA])]
    assert rows == [] and len(flights) == 2
    flights[1].landed = True
    train(optimizer, params, range(2, 3))
    assert rows == []  # the second is there, the first is not
    flights[0].landed = True
    train(optimizer, params, range(3, 4))
    assert [step for step, _ in rows] == [1, 2] and rows[1][1]["0.0"]["sigma"] == sigmas[0]
    assert not any(flight.waited for flight in flights)
    monitor.close()
    assert [step for step, _ in rows] == [1, 2, 3, 4]
    assert [flight.waited for flight in flights] == [False, False, True, True]


class NoSync(TorchDispatchMode):
    """Refuses what would read a value back from a device."""

    READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "allclose")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.split("::")[1] in self.READS:
            raise AssertionError(f"the host waits for {func._schema.name}")
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("triton_backend")
def test_monitor_reads_nothing_back_from_the_device(flights: list[Flight], monkeypatch: pytest.MonkeyPatch) -> None:
    # an interpreted kernel reads memory itself; that its launch does not wait is tested where the kernels are
    monkeypatch.setattr(
        kernels, "frobenius_norms", lambda weights: torch.stack([torch.linalg.matrix_norm(w) for w in weights])
    )
    params = [torch.randn(20, 18).requires_grad_(), torch.randn(6, 5).requires_grad_(), torch.ones(3).requires_grad_()]
    groups = [{"params": params[:1]}, {"params": params[1:], "target": "initial"}]
    optimizer = specopt.NormScaleAdamW(groups, lr=1e-3, block=4, max_passes=1)
    monitor = specopt.SpectralMonitor(optimizer, every=1, weights=True, gradients=True)
    train(optimizer, params, range(1))

    def refuse(*_: object) -> Any:
        raise AssertionError("the host waits")

    with pytest.MonkeyPatch.context() as patch, NoSync():
        for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__"):
            patch.setattr(Tensor, name, refuse)
        monitor._after_step(optimizer)
        with pytest.raises(AssertionError, match="the host waits"):
            bool(params[0].detach().sum() > 0)
    assert len(flights) == 4 and not any(flight.waited for flight in flights)
    monitor.close()
    assert monitor.history.steps.tolist() == [1, 2] and np.isfinite(monitor.history["frobenius"]).all()


@pytest.mark.usefixtures("triton_backend")
def test_whole_step_with_a_monitor_reads_nothing_back(flights: list[Flight], monkeypatch: pytest.MonkeyPatch) -> None:
    from specopt.kernels.bucket import Bucket

    params = [torch.randn(20, 18).requires_grad_(), torch.randn(6, 5).requires_grad_()]
    optimizer = specopt.SNRSGD(params, lr=0.01, block=4, max_passes=1, momentum=0.9)
    monitor = specopt.SpectralMonitor(optimizer, every=1, gradients=True)
    train(optimizer, params, range(2))
    for launch in ("launch_pass", "launch_solve"):  # an interpreted kernel reads memory itself
        monkeypatch.setattr(Bucket, launch, lambda *_, **__: None)
    with NoSync():
        optimizer.step()
    assert len(flights) == 6 and not any(flight.waited for flight in flights)
    monitor.close()
    assert monitor.history.steps.tolist() == [1, 2, 3]


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("kind", ["snr", "set"])
def test_record_of_a_step_by_the_kernels_is_that_of_the_reference(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    histories = []
    for backend in ("triton", "reference"):
        monkeypatch.setenv("SPECOPT_BACKEND", backend)
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(shape, generator=generator).to(DEVICE).requires_grad_() for shape in ((30, 24), (9, 4))]
        optimizer = OURS[kind](params, block=8, max_passes=2)
        monitor = specopt.SpectralMonitor(optimizer, every=1, weights=True)
        for _ in range(2):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).to(DEVICE)
            optimizer.step()
        monitor.close()
        histories.append(monitor.history)
    for name in ("sigma", "target", "valid", "frobenius"):
        np.testing.assert_allclose(histories[0][name], histories[1][name], rtol=1e-2)
    # the kernels know the first direction alone, and of the others norms of columns, which are lower bounds
    np.testing.assert_allclose(histories[0]["sigma_after"], histories[1]["sigma_after"], rtol=5e-2)


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", OURS)
def test_monitored_steps_on_a_gpu_never_synchronize(kind: str) -> None:
    params = [param.detach().to(DEVICE).requires_grad_() for param in parameters(torch.float32)]
    optimizer = OURS[kind](params)
    monitor = specopt.SpectralMonitor(optimizer, every=1, weights=True, gradients=True)
    for step in range(24):
        generator = torch.Generator(DEVICE).manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator, device=DEVICE)
        torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    monitor.close()
    assert monitor.history.steps.tolist() == list(range(1, 25))
    assert monitor.history["frobenius"][-1, 0] == pytest.approx(float(params[0].norm()), rel=1e-5)


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


def test_file_that_cannot_be_written_is_refused_before_any_step(tmp_path: Path) -> None:
    optimizer = specopt.SNRSGD(small())
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        specopt.SpectralMonitor(optimizer, to=tmp_path / "file" / "sigma.csv")
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        specopt.SpectralMonitor(optimizer, to=str(tmp_path))
    other = tmp_path / "other.csv"
    other.write_text("step,loss\n1,2\n")
    with pytest.raises(
        ValueError, match=r"to must name a new file, or one that SpectralMonitor wrote, got '.*other.csv'"
    ):
        specopt.SpectralMonitor(optimizer, to=[tmp_path / "good.csv", other])
    assert other.read_text() == "step,loss\n1,2\n"
    assert not optimizer._optimizer_step_post_hooks


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


def test_full_disk_ends_a_file_with_a_warning_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = small()
    optimizer = specopt.SNRSGD(params, lr=0.01)
    rows, function = noted()
    monitor = specopt.SpectralMonitor(optimizer, 1, [tmp_path / "x.csv", function])

    def full(record: Record) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(monitor._sinks[0], "write", full)
    with pytest.warns(UserWarning, match=r"the monitor writes no more to .*x.csv: .*No space left"):
        train(optimizer, params, range(1))
    train(optimizer, params, range(1, 3))
    assert [step for step, _ in rows] == [1, 2, 3] == monitor.history.steps.tolist()
    monitor.close()


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


def record(step: int, sigma: dict[str, float]) -> Record:
    return Record(step, tuple(sigma), {"sigma": np.array(list(sigma.values()))})


def test_history_aligns_names_and_keeps_the_last() -> None:
    records = [record(1, {"a": 1.0}), record(2, {"b": 2.0, "a": 3.0}), record(3, {"b": 4.0})]
    history = SpectralHistory(records)
    assert history.names == ("a", "b")
    np.testing.assert_array_equal(history["sigma"], [[1, np.nan], [3, 2], [np.nan, 4]])
    assert np.isnan(history["residual"]).all() and history["residual"].shape == (3, 2)
    assert SpectralHistory(records, keep=2).steps.tolist() == [2, 3]
    assert len(SpectralHistory()) == 0 and SpectralHistory()["sigma"].shape == (0, 0)
    with pytest.raises(KeyError, match=r"quantity must be one of sigma, .* got 'norm'"):
        history["norm"]


def test_csv_that_was_cut_off_is_read_and_continued(tmp_path: Path) -> None:
    params = small()
    optimizer = specopt.SNRSGD(params, lr=0.01)
    path = tmp_path / "x.csv"
    with specopt.SpectralMonitor(optimizer, 1, path):
        train(optimizer, params, range(2))
    path.write_text(path.read_text().rstrip("\n").rsplit(",", 6)[0])
    assert SpectralHistory.from_csv(path).names == ("0.0", "0.1", "0.2")
    assert np.isnan(SpectralHistory.from_csv(path)["sigma"][1, 2])
    with specopt.SpectralMonitor(optimizer, 1, path):
        train(optimizer, params, range(2, 3))
    read = SpectralHistory.from_csv(path)
    assert read.steps.tolist() == [1, 2, 3] and np.isfinite(read["sigma"][2]).all()
    (tmp_path / "other.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"path must be of a file that SpectralMonitor wrote, got '.*other.csv'"):
        SpectralHistory.from_csv(tmp_path / "other.csv")


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_number_that_was_cut_off_is_no_number(tmp_path: Path, cut: int) -> None:
    params = small()
    optimizer = specopt.SNRSGD(params, lr=0.01)
    path = tmp_path / "x.csv"
    with specopt.SpectralMonitor(optimizer, 1, path, gradients=True):
        train(optimizer, params, range(2))
    whole = SpectralHistory.from_csv(path)
    path.write_text(path.read_text()[:-cut])
    read = SpectralHistory.from_csv(path)
    assert read.gradient_norm[0] == whole.gradient_norm[0] and np.isnan(read.gradient_norm[1])
    with specopt.SpectralMonitor(optimizer, 1, path, gradients=True):
        train(optimizer, params, range(2, 3))
    read = SpectralHistory.from_csv(path)
    assert np.isnan(read.gradient_norm[1]) and np.isfinite(read.gradient_norm[2])


def test_columns_of_the_file_name_every_quantity_once() -> None:
    assert len(set(COLUMNS)) == len(COLUMNS) == len(QUANTITIES) + 3
    assert set(snapshot.STORED) | {"target", "frobenius", "stable_rank"} == set(QUANTITIES)


def test_what_a_device_sends_lands_on_the_host_whatever_the_default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a tensor of the CPU can be pinned."""
    asked: list[Any] = []

    def empty(*_: Any, **options: Any) -> Tensor:
        asked.append(options)
        raise NotImplementedError

    class OnDevice:
        shape, dtype, device = (2,), torch.float32, torch.device("cuda")

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(NotImplementedError):
        HostCopy.of(OnDevice())  # type: ignore[arg-type]
    assert asked == [{"dtype": torch.float32, "device": "cpu", "pin_memory": True}]
