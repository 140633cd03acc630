"""``specopt.certify``: rows for every layer beside what is tracked; the model stays as it is; bad input is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import specopt
from specopt.certify import Certificate

pytestmark = [
    pytest.mark.filterwarnings("ignore:the first step moves"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is"),
]


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.svdvals(matrix.detach().double().flatten(1))[0])


def by_name(certificate: Certificate) -> dict[str, Any]:
    return {row.name: row for row in certificate.rows}


class Everything(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.linear = nn.Linear(8, 12)
        self.conv = nn.Conv1d(8, 12, 3, groups=4)
        self.transposed = nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.uneven = nn.MultiheadAttention(8, 2, kdim=5, vdim=7)
        self.rnn = nn.RNN(8, 6)
        self.lstm = nn.LSTM(8, 6, num_layers=2, bidirectional=True, proj_size=3)
        self.gru = nn.GRUCell(8, 6)
        self.bilinear = nn.Bilinear(3, 4, 5)
        self.norm = nn.LayerNorm((2, 4))
        self.bare = nn.Parameter(torch.randn(3, 4))


@pytest.fixture
def everything() -> Everything:
    torch.manual_seed(0)
    return Everything()


def test_every_matrix_of_every_layer_is_bounded_as_svd_says(everything: Everything) -> None:
    rows = by_name(specopt.certify(everything))
    expected: dict[str, Tensor] = {
        "embedding.weight": everything.embedding.weight,
        "linear.weight": everything.linear.weight,
        "attention.out_proj.weight": everything.attention.out_proj.weight,
        "uneven.q_proj_weight": everything.uneven.q_proj_weight,
        "uneven.k_proj_weight": everything.uneven.k_proj_weight,
        "uneven.v_proj_weight": everything.uneven.v_proj_weight,
        "uneven.out_proj.weight": everything.uneven.out_proj.weight,
        "rnn.weight_ih_l0": everything.rnn.weight_ih_l0,
        "rnn.weight_hh_l0": everything.rnn.weight_hh_l0,
        "bilinear.weight": everything.bilinear.weight.flatten(1),
    }
    assert everything.attention.in_proj_weight is not None
    packed = {"attention.in_proj_weight": (everything.attention.in_proj_weight, 3)}
    packed |= {f"gru.{name}": (getattr(everything.gru, name), 3) for name in ("weight_ih", "weight_hh")}
    for layer in ("l0", "l0_reverse", "l1", "l1_reverse"):
        expected[f"lstm.weight_hr_{layer}"] = getattr(everything.lstm, f"weight_hr_{layer}")
        packed |= {
            f"lstm.weight_{kind}_{layer}": (getattr(everything.lstm, f"weight_{kind}_{layer}"), 4)
            for kind in ("ih", "hh")
        }
    for name, (weight, count) in packed.items():
        expected |= {f"{name}[{i}]": part for i, part in enumerate(weight.chunk(count))}
    assert set(rows) == {*expected, "conv.weight", "transposed.weight", "bare"}
    for name, weight in expected.items():
        row, exact = rows[name], norm(weight)
        assert exact * (1 - 1e-12) <= row.bound <= exact * 1.001, name
        assert row.matrix_bound == row.bound and row.shape == tuple(weight.shape)
        assert row.tracked == pytest.approx(exact, rel=1e-3) and row.tracked_by == "measured"
        assert row.ratio == pytest.approx(1, abs=2e-3)
    assert rows["bare"].bound is None and "nothing tells" in rows["bare"].how


def test_matrix_bounds_of_grouped_convolutions_are_those_of_their_largest_group(everything: Everything) -> None:
    rows = by_name(specopt.certify(everything))
    groups = everything.conv.weight.chunk(4)
    transposed = [part.transpose(0, 1) for part in everything.transposed.weight.chunk(2)]
    for name, parts in (("conv.weight", groups), ("transposed.weight", transposed)):
        exact = max(map(norm, parts))
        assert exact * (1 - 1e-12) <= rows[name].matrix_bound <= exact * 1.001
        assert rows[name].tracked == pytest.approx(exact, rel=1e-3)
        assert rows[name].bound >= rows[name].matrix_bound * (1 - 2e-3)
    assert rows["conv.weight"].shape == (12, 2, 3) and rows["transposed.weight"].shape == (4, 3, 3, 3)


@pytest.mark.parametrize("make", [specopt.SNRSGD, specopt.NormScaleAdamW])
def test_tracked_values_are_the_trackers_once_it_has_stepped(make: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.Flatten(), nn.Linear(40, 80), nn.Tanh(), nn.Linear(80, 70))
    optimizer = make(model, lr=1e-3)
    before = specopt.certify(model, optimizer=optimizer)
    assert {row.tracked_by for row in before.rows} == {"measured"}
    for _ in range(3):
        model(torch.randn(8, 3, 3, 3)).square().mean().backward()
        optimizer.step()
    rows = specopt.certify(model, optimizer=optimizer).rows
    assert {row.tracked_by for row in rows} == {"tracker"}
    for row, report in zip(rows, specopt.spectral_report(optimizer), strict=True):
        assert row.name == report.name and row.shape == report.shape
        assert row.tracked == pytest.approx(report.sigma, rel=2e-2)
        assert row.matrix_bound is not None and row.matrix_bound >= report.sigma * (1 - 1e-4)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(4, 2, 3, stride=2)
        self.linear = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.up(self.down(x)))  # type: ignore[no-any-return]


def unrolled_norm(layer: nn.Module, *size: int) -> float:
    columns = [layer(e[None]).flatten() - layer(torch.zeros(1, *size)).flatten() for e in unit_inputs(*size)]
    return norm(torch.stack(columns, dim=1))


def unit_inputs(*size: int) -> Tensor:
    entries = math.prod(size)
    return torch.eye(entries).view(entries, *size)


@pytest.mark.parametrize("options", [{"mode": "cap", "target": 0.5}, {"mode": "rescale", "target": 2.0}])
def test_convolutions_under_operator_control_have_their_operators_norm_as_tracked(options: Any) -> None:
    torch.manual_seed(0)
    model, inputs = Convolutions(), torch.randn(8, 2, 6, 6)
    groups = specopt.param_groups(model, conv="operator", shapes=specopt.record_shapes(model, inputs))
    optimizer = specopt.wrap(torch.optim.SGD(groups, lr=1e-3), specopt.NormScale(**options))
    before = specopt.certify(model, inputs, optimizer).rows
    assert {(row.tracked_by, row.tracked_of) for row in before} == {("measured", "matrix")}
    for _ in range(3):
        model(inputs).square().mean().backward()
        optimizer.step()
    rows = by_name(specopt.certify(model, inputs, optimizer))
    for name, layer, size, of in (
        ("down.weight", model.down, (2, 6, 6), "operator on 6x6"),
        ("up.weight", model.up, (4, 3, 3), "operator on 3x3"),
    ):
        row, exact = rows[name], unrolled_norm(layer, *size)
        assert row.tracked == pytest.approx(exact, rel=1e-2)
        assert row.tracked_by == "tracker" and row.tracked_of == of
        assert row.bound >= exact * (1 - 1e-5) and row.ratio == row.bound / row.tracked == pytest.approx(1, rel=1e-2)
    assert rows["linear.weight"].tracked_by == "tracker" and rows["linear.weight"].tracked_of == "matrix"
    assert "operator on 6x6" in str(specopt.certify(model, inputs, optimizer))


def test_a_tied_kernel_has_the_tracked_norm_of_its_own_convolution_alone() -> None:
    model, inputs = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, stride=2)), torch.randn(1, 3, 8, 8)
    groups = specopt.param_groups(model, conv="operator", inputs=inputs)
    optimizer = specopt.wrap(torch.optim.SGD(groups, lr=1e-3), specopt.NormScale(mode="cap", target=0.5))
    model(inputs).sum().backward()
    optimizer.step()
    model[1].weight = model[0].weight
    rows = by_name(specopt.certify(model, inputs, optimizer))
    assert (rows["0.weight"].tracked_by, rows["1.weight"].tracked_by) == ("tracker", "measured")


@pytest.mark.parametrize("tracked", [True, False])
def test_the_ratio_of_a_convolution_read_as_a_matrix_is_of_the_matrix(tracked: bool) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 40, 3, padding=1)
    optimizer = specopt.NormScaleAdamW(model, lr=1e-3)
    for _ in range(3):
        model(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    (row,) = specopt.certify(model, optimizer=optimizer if tracked else None).rows
    assert row.tracked_of == "matrix" and row.tracked_by == ("tracker" if tracked else "measured")
    assert row.ratio == pytest.approx(1, rel=1e-2)
    assert row.bound is not None and row.tracked is not None and row.bound > 1.3 * row.tracked


def test_a_stale_tracker_shows_in_the_ratio() -> None:
    model = nn.Linear(60, 60)
    optimizer = specopt.NormScaleAdamW(model, lr=1e-3)
    model(torch.randn(8, 60)).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        model.weight.mul_(5)
    (row,) = specopt.certify(model, optimizer=optimizer).rows
    assert row.ratio == pytest.approx(5, rel=0.1)


def test_other_views_of_a_weight_than_the_layers_are_not_compared() -> None:
    model = nn.ConvTranspose2d(4, 6, 3)
    optimizer = specopt.NormScaleAdamW(model.parameters(), lr=1e-3)  # bare: read as (in, out·k·k)
    model(torch.randn(1, 4, 3, 3)).sum().backward()
    optimizer.step()
    (row,) = specopt.certify(model, optimizer=optimizer).rows
    assert row.tracked_by == "measured"
    assert row.tracked == pytest.approx(norm(model.weight.transpose(0, 1)), rel=1e-3)


def test_frobenius_scaling_tracks_no_sigma_and_is_measured() -> None:
    model = nn.Linear(40, 30)
    optimizer = specopt.NormScaleAdamW(model, lr=1e-3, norm="frobenius")
    model(torch.randn(4, 40)).sum().backward()
    optimizer.step()
    (row,) = specopt.certify(model, optimizer=optimizer).rows
    assert row.tracked_by == "measured" and row.tracked == pytest.approx(norm(model.weight), rel=1e-3)


def old_weight_norm(layer: nn.Linear) -> nn.Module:
    return nn.utils.weight_norm(layer)  # type: ignore[no-any-return]


PARAMETRIZED = {
    "spectral_norm": lambda layer: parametrizations.spectral_norm(layer),
    "weight_norm": lambda layer: parametrizations.weight_norm(layer),
    "orthogonal": lambda layer: parametrizations.orthogonal(layer),
    "old weight_norm": old_weight_norm,
    "old spectral_norm": lambda layer: nn.utils.spectral_norm(layer),
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.4),
}


@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_parametrized_weights_are_bounded_as_they_act(kind: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 10)
    PARAMETRIZED[kind](layer)
    sources = [param for name, param in layer.named_parameters() if name != "bias"]
    with torch.no_grad():
        for param in sources:
            param.mul_(3).add_(0.1)
    model = nn.Sequential(layer, nn.ReLU()).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    certificate = specopt.certify(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.eval()
    acting = model[0](torch.eye(12)) - layer.bias
    (row,) = certificate.rows
    assert row.name == "0.weight"
    assert norm(acting) * (1 - 1e-5) <= row.bound <= norm(acting) * 1.002
    assert certificate.lipschitz == pytest.approx(row.bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_bounds_hold_in_every_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.Conv1d(2, 3, 3)).to(dtype)
    linear, conv = specopt.certify(model).rows
    exact = norm(model[0].weight)  # type: ignore[arg-type]
    assert linear.bound is not None and exact * (1 - 1e-12) <= linear.bound <= exact * 1.001
    assert conv.bound is not None and conv.bound >= norm(model[1].weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_weights_have_infinite_bounds_and_say_so(value: float) -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.Conv1d(2, 2, 3))
    with torch.no_grad():
        model[0].weight[1, 2] = value  # type: ignore[index, operator]
        model[1].weight[0, 0, 0] = value  # type: ignore[index, operator]
    certificate = specopt.certify(model)
    assert [row.bound for row in certificate.rows] == [math.inf, math.inf]
    assert all(row.how == "non-finite entries" for row in certificate.rows)
    assert certificate.lipschitz == math.inf


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_zero_and_empty_weights_have_bound_zero() -> None:
    zero, empty = nn.Linear(40, 40), nn.Linear(0, 5)
    nn.init.zeros_(zero.weight)
    for layer in (zero, empty):
        (row,) = specopt.certify(layer).rows
        assert row.bound == 0 and row.tracked == 0 and row.ratio == 1
    certificate = specopt.certify(nn.Sequential(zero, nn.ReLU()))
    assert certificate.lipschitz == 0


def test_a_shared_layer_has_one_row_for_all_sizes_that_it_sees() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(nn.functional.avg_pool2d(self.conv(x), 2))

    model = Twice()
    large, small = (specopt.certify(model.conv, torch.randn(2, n, n)).rows[0].bound for n in (8, 4))
    certificate = specopt.certify(model, torch.randn(2, 8, 8))
    (row,) = certificate.rows
    assert large is not None and small is not None and row.bound == max(large, small)
    assert certificate.lipschitz == pytest.approx(large * small * 0.5, rel=1e-6)


class Moody(nn.Module):
    """Changes itself and draws random numbers in every forward, whatever its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(()))
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        self.last = self.linear(x) + torch.rand(4)
        return nn.functional.batch_norm(self.last, self.norm.running_mean, self.norm.running_var, training=True)


def test_nothing_of_the_model_changes() -> None:
    torch.manual_seed(0)
    model, inputs = Moody().train(), torch.randn(3, 4)
    model.norm.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    given = inputs.clone()
    certificate = specopt.certify(model, inputs)
    assert certificate.lipschitz is None and "batch_norm" in certificate.unknown[0]
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and torch.equal(inputs, given)
    assert model.last is None and not model.linear._forward_hooks
    assert all(param.grad is None and param.requires_grad for param in model.parameters())


class Counting(nn.Module):
    """The first call halves its input, the next divides it by 3, the next by 4: with all its state in one place."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.number = kind, 1
        self.register_buffer("buffer", torch.ones(()))
        self.tensor = torch.ones(())

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "buffer":
            self.buffer += 1
        elif self.kind == "tensor":
            self.tensor += 1
        else:
            self.number += 1
        count = {"buffer": self.buffer, "tensor": self.tensor, "number": self.number}[self.kind]
        return x * (1 / count)


@pytest.mark.parametrize("kind", ["buffer", "tensor", "number"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("sized", [True, False])
def test_the_bound_is_that_of_the_next_call(kind: str, nested: bool, sized: bool) -> None:
    counting = Counting(kind).eval()
    model = nn.Sequential(nn.Sequential(counting)) if nested else counting
    for _ in range(2):
        bound = specopt.certify(model, torch.ones(1, 1) if sized else None).lipschitz
        assert counting.number == 1 and float(counting.buffer) == 1 and float(counting.tensor) == 1
        assert bound == pytest.approx(0.5, rel=1e-6)
    assert float(model(torch.ones(1, 1))) == 0.5


def test_table_and_dict_tell_what_the_rows_say() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.GLU(1))
    certificate = specopt.certify(model, torch.randn(1, 3, 6, 6))
    printed = str(certificate)
    assert "0.weight" in printed and "unrolled on 6x6" in printed and "2 (GLU)" in printed
    kept = json.loads(json.dumps(certificate.to_dict()))
    assert kept["rows"][0]["bound"] == certificate.rows[0].bound
    assert kept["rows"][0]["ratio"] == certificate.rows[0].ratio
    assert kept["lipschitz"] is None and len(kept["unknown"]) == 1 and kept["inputs"] == [[1, 3, 6, 6]]
    known = specopt.certify(model[:2])
    assert f"{known.lipschitz:.6g}" in str(known) and "any sizes" in str(known)


def test_model_without_layers_is_certified() -> None:
    certificate = specopt.certify(nn.Sequential(nn.ReLU(), nn.Sigmoid()))
    assert certificate.rows == () and certificate.lipschitz == 0.25
    assert "0.25" in str(certificate)
    assert specopt.certify(nn.Sequential()).lipschitz == 1


def test_tolerance_is_kept_and_checked() -> None:
    layer = nn.Linear(50, 50)
    exact = norm(layer.weight)
    for tolerance in (0.2, 1e-6):
        bound = specopt.certify(layer, tolerance=tolerance).rows[0].bound
        assert bound is not None and exact * (1 - 1e-12) <= bound <= exact * (1 + tolerance)
    for bad in (0, -1.0, 2.0, math.nan, "small", True):
        with pytest.raises(ValueError, match="tolerance must be"):
            specopt.certify(layer, tolerance=bad)  # type: ignore[arg-type]


def test_bad_input_is_refused_by_name() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got Tensor"):
        specopt.certify(torch.eye(3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer must be one of specopt"):
        specopt.certify(model, optimizer=torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match=r"inputs do not run through the model, got \[\(2, 5\)\]"):
        specopt.certify(model, torch.randn(2, 5))
    with pytest.raises(ValueError, match="weight is not initialized yet"):
        specopt.certify(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="weight is on the meta device"):
        specopt.certify(nn.Linear(3, 3, device="meta"))
    assert model.training


def test_layers_read_otherwise_than_dense_real_ones_are_named() -> None:
    layer = nn.Linear(3, 3, dtype=torch.complex64)
    certificate = specopt.certify(layer)
    assert certificate.rows[0].bound is None and certificate.lipschitz is None
    assert "complex64" in certificate.unknown[0]


def test_a_matrix_that_a_layer_has_beside_its_weight_is_named() -> None:
    layer = nn.Linear(3, 4)
    layer.register_parameter("adapter", nn.Parameter(torch.randn(4, 3)))
    rows = by_name(specopt.certify(layer))
    assert rows["weight"].bound is not None and rows["adapter"].bound is None


def test_modes_of_autograd_and_autocast_around_it_change_nothing() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Conv1d(2, 40, 3), nn.ReLU(inplace=True), nn.Linear(6, 6)), torch.randn(1, 2, 8)
    expected = specopt.certify(model, inputs)
    with torch.inference_mode():
        assert specopt.certify(model, torch.randn(1, 2, 8)) == expected
    with torch.autocast("cpu", torch.bfloat16):
        assert specopt.certify(model, inputs) == expected


def test_compiled_models_are_what_was_compiled_and_scripted_ones_are_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    expected = specopt.certify(model)
    assert specopt.certify(torch.compile(model)) == expected  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model must be of Python modules, but 0 is a RecursiveScriptModule"):
        specopt.certify(nn.Sequential(torch.jit.script(model)))


def test_class_that_computes_its_weight_is_bounded_by_what_it_computes() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    layer = nn.Conv2d(2, 3, 3)
    before = specopt.certify(layer).lipschitz
    parametrize.register_parametrization(layer, "weight", Doubled())
    after = specopt.certify(layer)
    assert before is not None and after.lipschitz == pytest.approx(2 * before)
    assert [row.name for row in after.rows] == ["weight"]
