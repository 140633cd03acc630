"""spectral_report tells what the weights are now, whatever the tracker last saw; as a list, a table and in files."""

from __future__ import annotations

import csv
import io
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import specopt
from specopt.seeing.naming import distinct, shortened
from tests.specopt.helpers import DEVICE, clones, exact, parameters, set_gradients, train

pytestmark = pytest.mark.filterwarnings("ignore:the first step moves")


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("norm", ["spectral", "frobenius"])
def test_report_agrees_with_svd_and_changes_nothing(norm: str, steps: int) -> None:
    params = parameters(torch.float32)
    optimizer = specopt.NormScaleAdamW(params, lr=1e-2, norm=norm)
    for step in range(steps):
        set_gradients(params, clones(params), seed=step)
        optimizer.step()
    before = [param.detach().clone() for param in params]
    rows = specopt.spectral_report(optimizer)
    assert all(torch.equal(param.detach(), old) for param, old in zip(params, before, strict=True))
    matrices = [param for param in params if param.ndim > 1]
    assert [row.shape for row in rows] == [tuple(param.shape) for param in matrices]
    for row, param in zip(rows, matrices, strict=True):
        values = exact(param)[1]
        assert row.sigma == pytest.approx(float(values[0]), rel=1e-4)
        assert row.frobenius == pytest.approx(float(values.norm()), rel=1e-5)
        assert row.stable_rank == pytest.approx(float((values.norm() / values[0]) ** 2), rel=1e-3)
        assert row.residual <= 1e-3
        target = math.sqrt(param.shape[0] / param.shape[1])
        scale = 1.0 if norm == "spectral" else math.sqrt(min(param.flatten(1).shape))
        assert row.target == pytest.approx(scale * target)
        assert row.finite and not row.capped


def test_report_of_a_penalty_has_no_target_and_says_what_is_not_finite() -> None:
    weights = [nn.Parameter(torch.randn(70, 80)), nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.zeros(70, 70))]
    with torch.no_grad():
        weights[0][0, 0] = torch.nan
    first, second, third = specopt.spectral_report(specopt.SNRSGD(weights))
    assert first.target is None and not first.finite
    assert second.finite and second.name == "0.1"
    assert third.sigma == 0 and math.isnan(third.stable_rank) and third.finite


class Quantized(torch.Tensor):
    """int8 and a scale that say that they are float32: what torchao makes of a frozen weight. It has no ``mm``."""

    q: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, q: Tensor, scale: Tensor) -> Quantized:
        return torch.Tensor._make_wrapper_subclass(cls, q.shape, dtype=torch.float32)  # type: ignore[attr-defined, no-any-return]

    def __init__(self, q: Tensor, scale: Tensor) -> None:
        self.q, self.scale = q, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["q", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Quantized:
        return Quantized(inner["q"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return Quantized(args[0].q, args[0].scale)
        if func in (torch.ops.aten.addmm.default, torch.ops.aten.t.default):
            return func(*(x.q * x.scale if isinstance(x, Quantized) else x for x in args))
        raise NotImplementedError(str(func))


def test_a_frozen_quantized_weight_is_left_out_of_reports_and_the_rest_is_controlled() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    quantized = Quantized(torch.ones(5, 6, dtype=torch.int8), torch.tensor(0.1))
    model[0].weight = nn.Parameter(quantized, requires_grad=False)
    optimizer = specopt.NormScaleAdamW(model, target=1.5)
    monitor = specopt.SpectralMonitor(optimizer, every=1, weights=True)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(3, 6)).sum().backward()
        optimizer.step()
    assert [row.name for row in specopt.spectral_report(optimizer)] == ["1.weight"]
    assert float(exact(model[1].weight)[1][0]) == pytest.approx(1.5, rel=1e-3)
    assert len(monitor.history) == 2


def test_report_of_nothing_is_empty_and_says_so() -> None:
    report = specopt.spectral_report(specopt.SNRSGD([nn.Parameter(torch.zeros(3))]))
    assert report == [] and report.to_dict() == {}
    assert str(report) == "no matrix is controlled"
    file = io.StringIO()
    report.to_csv(file)
    assert len(file.getvalue().splitlines()) == 1


@pytest.mark.parametrize("kind", ["snr", "set"])
def test_report_leaves_state_and_random_numbers_alone(kind: str) -> None:
    params = parameters(torch.float32)
    optimizer = specopt.SNRSGD(params, lr=0.1) if kind == "snr" else specopt.NormScaleAdamW(params, lr=1e-2)
    train(optimizer, params, range(2))
    states = {id(p): dict(optimizer.state[p]) for p in params}
    values = [value.clone() for state in states.values() for value in state.values() if isinstance(value, Tensor)]
    random, owners = torch.get_rng_state(), set(optimizer.state)
    specopt.spectral_report(optimizer)
    assert torch.equal(torch.get_rng_state(), random)
    assert set(optimizer.state) == owners
    after = [value for p in params for value in optimizer.state[p].values() if isinstance(value, Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(values, after, strict=True))
    assert all(optimizer.state[p].keys() == states[id(p)].keys() for p in params)
    numbers = [{k: v for k, v in optimizer.state[p].items() if not isinstance(v, Tensor)} for p in params]
    assert numbers == [{k: v for k, v in states[id(p)].items() if not isinstance(v, Tensor)} for p in params]


def falling(shape: tuple[int, int], values: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    count = min(shape)
    sides = [torch.linalg.qr(torch.randn(n, count, generator=generator, dtype=torch.float64))[0] for n in shape]
    return (sides[0] * values) @ sides[1].mT


I = torch.arange(1, 401, dtype=torch.float64)  # noqa: E741
SPECTRA = {
    "random": (torch.randn(512, 400, generator=torch.Generator().manual_seed(0)) / 20, 1e-3),
    "falling slowly": (falling((400, 512), I**-0.5), 1e-3),
    "falling quickly": (falling((512, 400), I**-1.0), 1e-3),
    "nearly flat": (falling((500, 400), I**-0.02), 2e-2),
    "three above a flat rest": (falling((500, 400), torch.where(I <= 3, 1.0, 0.95).double()), 4e-2),
    "flat": (falling((512, 400), torch.ones(400, dtype=torch.float64)), 1e-5),
    "huge": (falling((500, 400), 1e30 * I**-0.5), 1e-3),
    "tiny": (falling((400, 500), 1e-30 * I**-0.5), 1e-3),
}


@pytest.mark.parametrize("kind", SPECTRA)
def test_top_singular_values_are_within_the_stated_accuracy_and_never_above(kind: str) -> None:
    values, tolerance = SPECTRA[kind]
    weight = values.float()
    (row,) = specopt.spectral_report(specopt.NormScaleAdamW([nn.Parameter(weight.clone())]))
    truth = torch.linalg.svdvals(weight.double())[:8]
    error = torch.tensor(row.spectrum, dtype=torch.float64) / truth - 1
    assert row.sigma == row.spectrum[0] == pytest.approx(float(truth[0]), rel=1e-4)
    assert -tolerance <= float(error.min()) and float(error.max()) <= 1e-5


def test_the_norm_where_the_spectrum_is_flat_at_its_top() -> None:
    """Orthogonal, but for the rounding to bfloat16."""
    weights = [torch.linalg.qr(torch.randn(100, 80, generator=torch.Generator().manual_seed(s))).Q for s in range(8)]
    params = [nn.Parameter(weight.bfloat16()) for weight in weights]
    for row, param in zip(specopt.spectral_report(specopt.SNRSGD(params)), params, strict=True):
        assert row.sigma == pytest.approx(float(exact(param)[1][0]), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_spectrum_in_other_precisions_and_layouts(dtype: torch.dtype) -> None:
    weights = [torch.randn(150, 90), torch.randn(90, 150).mT, torch.randn(70, 8, 3, 3), torch.randn(200, 200)[::2, ::2]]
    params = [nn.Parameter(weight.to(dtype)) for weight in weights]
    for row, param in zip(specopt.spectral_report(specopt.SNRSGD(params), top=16), params, strict=True):
        assert row.spectrum == pytest.approx(exact(param)[1][:16].tolist(), rel=1e-2)


@pytest.mark.usefixtures("triton_backend")
def test_spectrum_by_the_kernels_of_a_device() -> None:
    params = [nn.Parameter(torch.randn(shape).to(DEVICE)) for shape in ((70, 66), (9, 4))]
    for row, param in zip(specopt.spectral_report(specopt.SNRSGD(params)), params, strict=True):
        assert row.spectrum == pytest.approx(exact(param)[1][:8].tolist(), rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_report_waits_for_a_gpu_once() -> None:
    params = [param.detach().to(DEVICE).requires_grad_() for param in parameters(torch.float32)]
    optimizer = specopt.NormScaleAdamW(params, lr=1e-2)
    specopt.spectral_report(optimizer)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            specopt.spectral_report(optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing CUDA operation" in str(warning.message) for warning in seen) == 1


def test_report_inside_of_autocast_is_that_outside() -> None:
    optimizer = specopt.SNRSGD([nn.Parameter(torch.randn(90, 100))])
    outside = specopt.spectral_report(optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        assert specopt.spectral_report(optimizer) == outside


@pytest.mark.parametrize("top", [1, 3, 16])
def test_top_asks_for_so_many_values_and_a_small_matrix_has_no_more(top: int) -> None:
    params = [nn.Parameter(torch.randn(90, 100)), nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(1, 70))]
    rows = specopt.spectral_report(specopt.SNRSGD(params), top=top)
    assert [len(row.spectrum) for row in rows] == [top, min(top, 3), 1]
    assert rows[1].spectrum == pytest.approx(exact(params[1])[1][:top].tolist(), rel=1e-5)
    assert all(row.sigma == row.spectrum[0] for row in rows)


@pytest.mark.parametrize("top", [0, 17, -1, 2.0, True, None, "8"])
def test_top_that_no_block_tells_is_refused(top: Any) -> None:
    with pytest.raises(ValueError, match=r"top must be a whole number from 1 to 16, got"):
        specopt.spectral_report(specopt.SNRSGD([nn.Parameter(torch.randn(4, 4))]), top=top)


def some_rows() -> specopt.SpectralReport:
    names = [f"transformer.encoder.layers.{i}.self_attn.out_proj.weight" for i in range(50)]
    row = specopt.SpectralRow(
        "", (64, 3, 3, 3), 1.25, None, 1e-4, 20.25, 5.625, True, False, (1.25, 1.0, 0.5)
    )  # fmt: skip
    rows = [replace(row, name=name, sigma=row.sigma + i) for i, name in enumerate(names)]
    nan, inf = math.nan, math.inf
    broken = specopt.SpectralRow("head", (2, 2), nan, 1.0, inf, nan, inf, False, True, (nan, nan))
    return specopt.SpectralReport([*rows, broken, replace(row, name="head", target=0.0, frobenius=1e-20)])


def test_table_has_a_line_for_each_row_and_points_under_points() -> None:
    report = some_rows()
    head, rule, *lines = str(report).splitlines()
    assert len(lines) == len(report) == 52
    assert max(map(len, [head, rule, *lines])) <= 140
    assert len({line.index("64x3x3x3") for line in lines[:50]}) == 1
    assert len({line.index(".", line.index("64x3x3x3")) for line in lines[:50]}) == 1
    assert [line.split()[2] for line in lines[:3]] == ["1.2500", "2.2500", "3.2500"]
    assert lines[50].endswith("not finite, capped")
    assert len({line.split()[0] for line in lines[:50]}) == 50
    assert "σ2..σ3 / σ1" in head


def test_dictionaries_hold_every_field_and_no_row_is_lost_to_a_name_used_twice() -> None:
    report = some_rows()
    dicts, by_name = report.to_dicts(), report.to_dict()
    assert len(dicts) == len(by_name) == 52
    assert by_name["head (2)"]["target"] == 0.0
    assert dicts[0]["spectrum"] == (1.25, 1.0, 0.5) and by_name[report[0].name]["shape"] == (64, 3, 3, 3)


def test_csv_reads_back_as_the_same_numbers(tmp_path: Path) -> None:
    report = some_rows()
    report.to_csv(tmp_path / "report.csv")
    with open(tmp_path / "report.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["sigma"]) for row in rows[:50]] == [row.sigma for row in report[:50]]
    assert rows[0]["shape"] == "64x3x3x3" and rows[0]["target"] == "" and rows[51]["target"] == "0.0"
    assert rows[0]["sigma_3"] == "0.5" and rows[50]["sigma_3"] == "" and rows[50]["sigma_1"] == "nan"
    assert rows[50]["finite"] == "False"


def test_json_is_valid_where_numbers_are_not(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    report = some_rows()
    report.to_json(str(tmp_path / "report.json"))
    rows = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert rows[50]["sigma"] is None and rows[50]["residual"] is None and rows[50]["spectrum"] == [None, None]
    assert rows[0]["target"] is None and rows[0]["shape"] == [64, 3, 3, 3] and rows[0]["sigma"] == 1.25
    file = io.StringIO()
    report.to_json(file)
    assert json.loads(file.getvalue()) == rows


@pytest.mark.parametrize("write", [specopt.SpectralReport.to_csv, specopt.SpectralReport.to_json])
def test_what_is_no_file_is_refused(write: Any) -> None:
    with pytest.raises(TypeError, match="path_or_file must be a path or a text file, got int"):
        write(some_rows(), 3)


NAMES = [
    f"model.transformer.encoder.layers.{i}.{part}.weight"
    for i in range(24)
    for part in ("self_attention.query_projection", "self_attention.key_projection", "feed_forward.linear1", "norm")
]


@pytest.mark.parametrize("width", [8, 12, 24, 32, 40, 100])
def test_shortened_names_fit_and_stay_apart(width: int) -> None:
    short = shortened(NAMES, width)
    assert max(map(len, short)) <= width and len(set(short)) == len(NAMES)
    assert shortened(["a", "a"], width) == ["a", "a"]
    assert all(a == b for a, b in zip(short, NAMES, strict=True) if len(b) <= width and width >= 40)


def test_shortened_names_keep_the_number_of_the_layer() -> None:
    for short, name in zip(shortened(NAMES, 40), NAMES, strict=True):
        assert name.split(".")[4] in short.replace("…", ".").split(".")


def test_distinct_names_are() -> None:
    assert distinct(["w", "v", "w", "w (2)", "w"]) == ["w", "v", "w (2)", "w (2) (2)", "w (3)"]
