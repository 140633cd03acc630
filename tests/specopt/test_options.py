"""Wrong arguments fail in the constructor, by name, value and what they may be; and what is controlled at all."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import specopt
from specopt.options import OF_RULES, SHARED
from specopt.targets import target_frobenius, target_sigma
from specopt.views import is_controlled, matrix_view


def weight() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(5, 4))]


WRONG: list[tuple[type, str, Any]] = [
    (specopt.SNRSGD, "snr_lambda", -0.1),
    (specopt.SNRSGD, "snr_lambda", math.nan),
    (specopt.SNRSGD, "snr_lambda", math.inf),
    (specopt.SNRSGD, "snr_lambda", "strong"),
    (specopt.NormScaleAdamW, "norm", "nuclear"),
    (specopt.NormScaleAdamW, "mode", "clip"),
    (specopt.NormScaleAdamW, "target", 0.0),
    (specopt.NormScaleAdamW, "target", -1.0),
    (specopt.NormScaleAdamW, "target", math.nan),
    (specopt.NormScaleAdamW, "target", math.inf),
    (specopt.NormScaleAdamW, "target", 10**400),
    (specopt.NormScaleAdamW, "target", 1j),
    (specopt.NormScaleAdamW, "target", b"fan"),
    (specopt.NormScaleAdamW, "target", {"weight": 1.0}),
    (specopt.NormScaleAdamW, "target", "chanels"),
    (specopt.NormScaleAdamW, "target", True),
    (specopt.NormScaleAdamW, "target", None),
    (specopt.NormScaleAdamW, "rank", 0),
    (specopt.NormScaleAdamW, "rank", 17),
    (specopt.NormScaleAdamW, "rank", "all"),
    (specopt.NormScaleAdamW, "rank", 2.0),
    (specopt.NormScaleAdamW, "rank", -1),
    (specopt.NormScaleAdamW, "every", 0),
    (specopt.NormScaleAdamW, "raise_small", 1),
]
for _cls in (specopt.SNRSGD, specopt.NormScaleAdamW):
    WRONG += [
        (_cls, "block", 0),
        (_cls, "block", 65),
        (_cls, "block", 8.0),
        (_cls, "tolerance", 0),
        (_cls, "tolerance", -1e-3),
        (_cls, "max_passes", 0),
        (_cls, "max_passes", 2.5),
        (_cls, "view", "rows"),
        (_cls, "spectral", None),
        (_cls, "differentiable", True),
        (_cls, "lr", -1.0),
    ]


@pytest.mark.parametrize(("cls", "name", "value"), WRONG, ids=lambda v: getattr(v, "__name__", str(v)))
def test_wrong_argument_raises_naming_it_and_its_value(cls: type, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=str(value)) as error:
        cls(weight(), **{name: value})
    assert name in str(error.value) or name == "lr"


OURS = [case for case in WRONG if case[1] != "lr"]  # torch checks lr in the constructor alone


@pytest.mark.parametrize(("cls", "name", "value"), OURS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_wrong_option_set_during_training_raises_before_anything_changes(cls: type, name: str, value: Any) -> None:
    (param,) = params = weight()
    optimizer = cls(params)
    param.grad = torch.ones_like(param)
    before = param.detach().clone()
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=name):
        optimizer.step()
    assert torch.equal(param.detach(), before)


@pytest.mark.parametrize(("cls", "name", "value"), OURS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_wrong_group_option_raises_and_adds_no_group(cls: type, name: str, value: Any) -> None:
    optimizer = cls(weight())
    with pytest.raises(ValueError, match=name):
        optimizer.add_param_group({"params": weight(), name: value})
    assert len(optimizer.param_groups) == 1


def test_frobenius_refuses_what_only_the_spectral_norm_has() -> None:
    with pytest.raises(ValueError, match=r"mode.*frobenius.*'set', 'cap'.*'rescale'"):
        specopt.NormScaleAdamW(weight(), norm="frobenius", mode="rescale")
    with pytest.raises(ValueError, match="rank must be 1"):
        specopt.NormScaleAdamW(weight(), norm="frobenius", rank=2)


@pytest.mark.parametrize("cls", [specopt.SNRSGD, specopt.NormScaleAdamW])
def test_empty_parameter_list_raises(cls: type) -> None:
    with pytest.raises(ValueError, match="empty"):
        cls([])


def test_report_refuses_a_plain_optimizer() -> None:
    with pytest.raises(TypeError, match="SGD"):
        specopt.spectral_report(torch.optim.SGD(weight()))


AUTO = {"spectral": True, "view": "auto"}
CONTROLLED = [(4, 3), (1, 5), (5, 1), (8, 4, 3, 3), (8, 4, 3, 3, 3), (2, 2, 1, 1)]
LEFT_ALONE = [(), (7,), (8, 4, 3), (8, 1, 3, 3), (1, 8, 3, 3), (1, 196, 64), (1, 4, 4, 4, 4), (2,) * 6, (0, 4)]


@pytest.mark.parametrize("shape", CONTROLLED, ids=str)
def test_bare_tensors_that_are_controlled(shape: tuple[int, ...]) -> None:
    assert is_controlled(torch.zeros(shape), AUTO)
    assert not is_controlled(torch.zeros(shape), {**AUTO, "spectral": False})


@pytest.mark.parametrize("shape", LEFT_ALONE, ids=str)
def test_bare_tensors_that_are_left_alone(shape: tuple[int, ...]) -> None:
    assert not is_controlled(torch.zeros(shape), AUTO)
    flattened = is_controlled(torch.zeros(shape), {**AUTO, "view": "flatten"})
    assert flattened == (len(shape) >= 2 and math.prod(shape) > 0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_other_dtypes_are_left_alone(dtype: torch.dtype) -> None:
    assert not is_controlled(torch.zeros(4, 3, dtype=dtype), AUTO)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_conv_view_shares_memory_and_has_the_singular_values_of_the_flattened_kernel(
    memory_format: torch.memory_format,
) -> None:
    kernel = torch.randn(6, 5, 3, 2).contiguous(memory_format=memory_format)
    view = matrix_view(kernel)
    assert view.shape == (6, 30) and view.data_ptr() == kernel.data_ptr()
    expected = torch.linalg.svdvals(kernel.contiguous().flatten(1))
    assert torch.allclose(torch.linalg.svdvals(view), expected, atol=1e-5)
    view.zero_()
    assert not kernel.any()


def test_kernel_with_gaps_in_memory_is_refused_in_the_constructor() -> None:
    kernel = torch.randn(6, 5, 6, 6)[:, :, ::2, ::2].detach().requires_grad_()
    with pytest.raises(ValueError, match=r"\(6, 5, 3, 3\).*contiguous"):
        specopt.SNRSGD([kernel])
    specopt.SNRSGD([{"params": [kernel], "spectral": False}])


def test_targets_follow_their_formulas() -> None:
    kernel = (64, 16, 3, 3)
    assert target_sigma(kernel, "channels") == 2.0
    assert target_sigma(kernel, "fan") == pytest.approx(math.sqrt(64 / 144))
    assert target_sigma(kernel, "size", positions=1 / 4) == 1.0
    assert target_sigma(kernel, 0.5) == 0.5
    assert math.isnan(target_sigma(kernel, "initial"))
    assert target_frobenius(kernel, "channels") == pytest.approx(8 * 2.0)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(20, 30),
        nn.Linear(30, 20),
        nn.Conv2d(6, 8, 3),
        nn.Conv1d(4, 16, 5),
        nn.Conv3d(3, 4, 2),
        nn.Conv2d(8, 12, 3, groups=4),
        nn.ConvTranspose2d(8, 6, 3),
        nn.ConvTranspose2d(8, 4, 2, groups=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("gain", [1.0, 0.5])
def test_scaled_orthogonal_makes_all_singular_values_the_target(layer: Any, gain: float) -> None:
    specopt.init.scaled_orthogonal_(layer, gain=gain)
    groups = getattr(layer, "groups", 1)
    for part in layer.weight.detach().double().chunk(groups):
        part = part.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else part
        expected = gain * math.sqrt(part.shape[0] / part.shape[1])
        values = torch.linalg.svdvals(part.flatten(1))
        assert torch.allclose(values, torch.full_like(values, expected), rtol=1e-5)


def test_scaled_orthogonal_refuses_a_weight_that_is_computed_from_others() -> None:
    with pytest.raises(ValueError, match="parametrized"):
        specopt.init.scaled_orthogonal_(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scaled_orthogonal_fills_any_dtype(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        layer = nn.Linear(20, 30)
        specopt.init.scaled_orthogonal_(layer)
    finally:
        torch.set_default_dtype(torch.float32)
    values = torch.linalg.svdvals(layer.weight.detach().double())
    assert torch.allclose(values, torch.full_like(values, 1.5**0.5), rtol=1e-12 if dtype == torch.float64 else 2e-2)


COMMON = {"block": np.int64(8), "tolerance": np.float32(0.02), "max_passes": np.int32(3)}
LAMBDA = {**COMMON, "snr_lambda": np.float32(0.25)}
SCALE = {**COMMON, "target": np.float64(0.75), "rank": np.int64(4), "every": np.int16(1), "mode": "cap"}


def wrapped(groups: Any, rule: Any) -> Any:
    return specopt.wrap(torch.optim.AdamW(groups), rule)


@pytest.mark.parametrize(
    "make",
    [
        lambda: specopt.SNRSGD(weight(), **LAMBDA),
        lambda: specopt.SNRSGD([{"params": weight(), **LAMBDA}]),
        lambda: specopt.NormScaleAdamW(weight(), **SCALE),
        lambda: specopt.NormScaleAdamW([{"params": weight(), **SCALE}]),
        lambda: specopt.NormScaleAdamW(specopt.param_groups(nn.Linear(4, 5), **SCALE)),
        lambda: specopt.NormScaleAdamW([{"params": weight(), "target": [np.float64(0.75)]}]),
        lambda: wrapped(weight(), specopt.SpectralPenalty(np.float32(0.25), **COMMON)),
        lambda: wrapped(weight(), specopt.SpectralDecay(np.float32(0.25), **COMMON)),
        lambda: wrapped(weight(), specopt.NormScale(**SCALE)),
        lambda: wrapped([{"params": weight(), **SCALE}], specopt.NormScale()),
        lambda: wrapped(
            weight(), specopt.Compose(specopt.SpectralPenalty(np.float32(0.25)), specopt.NormScale(**SCALE))
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:the first step moves")
def test_numpy_numbers_are_numbers_and_become_pythons_own_that_a_weights_only_file_holds(
    make: Callable[[], Any],
) -> None:
    optimizer = make()
    more: Any = [("more", *weight())] if "param_names" in optimizer.param_groups[0] else weight()
    optimizer.add_param_group({"params": more, "block": np.int64(16)})
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones_like(group["params"][0])
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for found, group in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        options = {name: group[name] for name in optimizer.rule.names}
        assert {name: found[name] for name in options} == options
        assert not any(isinstance(value, np.generic) for value in options.values())
    assert saved["param_groups"][-1]["block"] == 16
    for name in {"snr_lambda", "decay_lambda"} & set(optimizer.rule.names):
        assert type(optimizer.param_groups[0][name]) is float and optimizer.param_groups[0][name] == 0.25
    if "target" in optimizer.rule.names:
        assert optimizer.param_groups[0]["target"] in (0.75, [0.75])


def test_rules_of_numpy_numbers_equal_those_of_pythons_own() -> None:
    rule = specopt.NormScale(mode="cap", target=np.float64(0.75), rank=np.int64(4), block=np.int64(16))
    assert repr(rule) == "NormScale(block=16, mode='cap', target=0.75, rank=4)"
    assert rule == specopt.NormScale(mode="cap", target=0.75, rank=4, block=16)


def test_scaled_orthogonal_leaves_other_modules_alone_and_follows_its_generator() -> None:
    def build(seed: int) -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 7), nn.LayerNorm(7))
        specopt.init.scaled_orthogonal_(model, generator=torch.Generator().manual_seed(seed))
        return model

    model = build(1)
    torch.manual_seed(0)
    assert torch.equal(model[0].weight, nn.Embedding(5, 6).weight)
    assert torch.equal(build(1)[1].weight, build(1)[1].weight)
    assert not torch.equal(build(1)[1].weight, build(2)[1].weight)
    with pytest.raises(ValueError, match="gain"):
        specopt.init.scaled_orthogonal_(nn.Linear(2, 2), gain=0.0)


def test_options_of_the_rules_are_all_listed() -> None:
    rules = [specopt.SpectralPenalty(0.1), specopt.SpectralDecay(0.1), specopt.NormScale()]
    assert {name for rule in rules for name in rule.names} == {*OF_RULES, *SHARED}


def idle(record: pytest.WarningsRecorder) -> list[str]:
    return [str(warning.message) for warning in record if "no such option" in str(warning.message)]


def test_option_of_another_rule_in_a_group_is_told_of(recwarn: pytest.WarningsRecorder) -> None:
    optimizer = specopt.SNRSGD([{"params": weight(), "every": 3, "target": 2.0}, {"params": weight()}])
    assert idle(recwarn) == ["every, target in a group: SNRSGD has no such option, and goes on without."]
    assert recwarn.list[-1].filename == __file__
    recwarn.clear()
    optimizer.add_param_group({"params": weight(), "snr_lambda": 0.3})
    assert not idle(recwarn)
    optimizer.add_param_group({"params": weight(), "mode": "cap"})
    assert len(idle(recwarn)) == 1
    recwarn.clear()
    specopt.NormScaleAdamW([{"params": weight(), "snr_lambda": 0.3, "every": 2}])
    assert [text.split(" in ")[0] for text in idle(recwarn)] == ["snr_lambda"]


def test_options_that_a_wrapped_optimizer_may_have_itself_are_its_own(recwarn: pytest.WarningsRecorder) -> None:
    rule = specopt.SpectralPenalty(0.1)
    specopt.wrap(torch.optim.RMSprop([{"params": weight(), "rank": 8}]), rule)  # as GaLore's groups have
    assert not idle(recwarn)
    specopt.wrap(torch.optim.SGD([{"params": weight(), "rank": 8}]), rule)
    assert len(idle(recwarn)) == 1
    recwarn.clear()
    both = specopt.Compose(rule, specopt.NormScale())
    specopt.wrap(torch.optim.SGD([{"params": weight(), "rank": 8, "snr_lambda": 1.0}]), both)
    assert not idle(recwarn)


def test_options_that_a_base_has_under_the_same_name_change_nothing_of_a_rule() -> None:
    """``rank`` is no width of the block, and ``mode`` needs no ``norm``."""
    rule = specopt.SpectralDecay(0.1)
    shapes = []
    for more in ({}, {"rank": 128}, {"rank": None}, {"mode": "max", "every": 3}):
        optimizer = specopt.wrap(torch.optim.RMSprop([{"params": [nn.Parameter(torch.randn(90, 80))], **more}]), rule)
        for _ in range(2):
            param = optimizer.param_groups[0]["params"][0]
            param.grad = torch.ones_like(param)
            optimizer.step()
        state = optimizer.state[param]
        shapes.append({key: tuple(value.shape) for key, value in state.items() if isinstance(value, torch.Tensor)})
    assert all(found == shapes[0] for found in shapes)


def test_a_group_of_operators_may_have_a_mode_that_its_rule_does_not_know() -> None:
    model, images = nn.Sequential(nn.Conv2d(2, 3, 3)), torch.randn(1, 2, 8, 8)
    groups = specopt.param_groups(model, conv="operator", inputs=images, mode="cap", every=3)
    with pytest.warns(UserWarning, match="every, mode in a group"):
        optimizer = specopt.SNRSGD(groups, lr=0.0, snr_lambda=1.0)
    seen = []
    for _ in range(3):
        optimizer.zero_grad()
        model(images).sum().backward()
        optimizer.step()
        seen.append(optimizer.state[model[0].weight]["spectral_step"])
    assert seen == [1, 2, 3]


@pytest.mark.parametrize("key", ["snr_lambda", "target"])
def test_a_schedule_of_numpys_numbers_makes_a_state_that_loads_as_weights_only(key: str) -> None:
    params = weight()
    optimizer: Any = specopt.SNRSGD(params) if key == "snr_lambda" else specopt.NormScaleAdamW(params, mode="cap")
    values: list[Any] = [np.float64(0.5), np.float32(0.25)]
    for value in values + ([[np.float64(0.5)]] if key == "target" else []):
        optimizer.param_groups[0][key] = value
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        assert torch.load(file, weights_only=True)["param_groups"][0][key] == value
