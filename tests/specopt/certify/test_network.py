"""Lipschitz bounds of networks: no pair of inputs is pulled further apart, and what is not known is named."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import specopt

SEED = 0


class Block(nn.Module):
    """A residual block as torchvision's."""

    def __init__(self, width: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Conv2d(width, out, 1, stride) if stride > 1 or width != out else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.shortcut is None else self.shortcut(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.blocks = nn.Sequential(Block(4, 4), Block(4, 6, 2))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = self.blocks(x)
        x = F.adaptive_avg_pool2d(x, 1)
        return self.head(torch.flatten(x, 1))


class Branches(nn.Module):
    """cat, scaling, slices, a module used twice, a mean and functions."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.tensor([0.5, -2.0, 1.0, 0.1, 0.2, 3.0]))
        self.weight = nn.Parameter(torch.eye(6)[:4])

    def forward(self, x: Tensor) -> Tensor:
        first = torch.tanh(self.shared(x)) * self.scale
        second = self.shared(first) / 2.0 - x
        third = F.leaky_relu(x[:, 1:4], 1.5).mean(1, keepdim=True)
        joined = torch.cat([first, second, third.expand(-1, 6)], 1)
        left, right = joined.chunk(2, dim=1)
        return F.linear(right[:, :6], self.weight) + 0.5 * F.gelu(left[:, :4])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"),
        *(nn.BatchNorm2d(4), nn.SiLU(), nn.MaxPool2d(3, 2, padding=1)),
        *(nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.PReLU(6), nn.AvgPool2d(2, 1), nn.Flatten(), nn.LazyLinear(5)),
    )


def decoder() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(2, 3, 3, stride=2), nn.Tanh(), nn.Upsample(scale_factor=2), nn.Conv2d(3, 1, 3)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (1, 6)),
    "cnn": (cnn, (1, 2, 12, 12)),
    "decoder": (decoder, (1, 2, 3, 3)),
    "resnet": (ResNet, (1, 2, 8, 8)),
    "branches": (Branches, (2, 6)),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    """A model with batch norm statistics and biases of a trained one, in eval mode and float64."""
    torch.manual_seed(SEED)
    make, size = MODELS[name]
    model, example = make().double(), torch.randn(size, dtype=torch.float64)
    model.eval()(example)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.2, 2)
            nn.init.uniform_(module.weight, -2, 2)
    return model, example


def widest(model: nn.Module, size: tuple[int, ...]) -> float:
    """The largest ``‖f(x) − f(y)‖ / ‖x − y‖`` found from random pairs by gradient ascent."""
    found = 0.0
    for trial, distance in enumerate((1e-3, 1e-1, 1.0, 10.0) * 3):
        generator = torch.Generator().manual_seed(trial)
        x = torch.randn(size, generator=generator, dtype=torch.float64)
        step = distance * torch.randn(size, generator=generator, dtype=torch.float64)
        pair = [x.requires_grad_(), (x + step).detach().requires_grad_()]
        ascent = torch.optim.Adam(pair, lr=0.05 * min(distance, 1.0), maximize=True)
        for _ in range(40):
            ratio = (model(pair[0]) - model(pair[1])).norm() / (pair[0] - pair[1]).norm()
            found = max(found, float(ratio.detach()))
            ascent.zero_grad()
            ratio.backward()
            ascent.step()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_no_pair_of_inputs_is_pulled_apart_further_than_the_bound(name: str) -> None:
    model, example = made(name)
    certificate = specopt.certify(model, example)
    assert certificate.unknown == ()
    assert certificate.lipschitz is not None and math.isfinite(certificate.lipschitz)
    found = widest(model, tuple(example.shape))
    assert 0.01 * certificate.lipschitz < found <= certificate.lipschitz


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_without_inputs_the_bound_is_no_smaller(name: str) -> None:
    model, example = made(name)
    known, anyhow = specopt.certify(model, example).lipschitz, specopt.certify(model).lipschitz
    assert known is not None and anyhow is not None and known <= anyhow * 1.001


def test_orthogonal_stack_has_bound_one() -> None:
    model = nn.Sequential(*(layer for _ in range(5) for layer in (nn.Linear(20, 20), nn.ReLU())))
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight)
    bound = specopt.certify(model).lipschitz
    assert bound is not None and 1 - 1e-6 <= bound <= 1 + 1e-3


def test_linear_network_of_one_layer_has_the_norm_of_its_weight() -> None:
    layer = nn.Linear(7, 5).double()
    bound = specopt.certify(layer).lipschitz
    assert bound == pytest.approx(float(torch.linalg.matrix_norm(layer.weight.detach(), 2)), rel=1e-3)


class Function(nn.Module):
    """A model of one function, and a linear layer in front where ``width`` says so."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.constant = nn.Parameter(torch.tensor([[2.0, -3.0], [0.5, 0.25]]))
        self.register_buffer("indices", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


FUNCTIONS: list[tuple[Callable[[Any, Tensor], Any], float]] = [
    (lambda m, x: x + x, 2.0),
    (lambda m, x: x - 0.5 * x, 1.5),
    (lambda m, x: torch.add(x, x, alpha=-3), 4.0),
    (lambda m, x: 3 - x / -2, 0.5),
    (lambda m, x: x * m.constant, 3.0),
    (lambda m, x: x / m.constant.exp() * 2, 2 * math.exp(3)),
    (lambda m, x: x[:1] + x, 1 + math.sqrt(2)),
    (lambda m, x: x.sum(0), math.sqrt(2)),
    (lambda m, x: x.mean(), 0.5),
    (lambda m, x: torch.stack([x, 2 * x]), math.sqrt(5)),
    (lambda m, x: (x, {"a": x}), math.sqrt(2)),
    (lambda m, x: x @ m.constant, 3.60623),
    (lambda m, x: m.constant @ x, 3.60623),
    (lambda m, x: x.view(x.size(0), -1).repeat(3, 1), math.sqrt(3)),
    (lambda m, x: x.T + x.mT.to(torch.float64), 2.0),
    (lambda m, x: x[None].expand(5, -1, -1), math.sqrt(5)),
    (lambda m, x: x.clamp(-1, 1).abs().neg(), 1.0),
    (lambda m, x: torch.clamp(x, min=m.constant[None].repeat(5, 1, 1) - 9), math.sqrt(5)),
    (lambda m, x: x[0].clip(None, m.constant + 9), math.sqrt(2)),
    (lambda m, x: F.softmax(x, dim=-1), 0.5),
    (lambda m, x: F.log_softmax(x, 1), math.sqrt(2)),
    (lambda m, x: F.pad(x, (1, 1)), 1.0),
    (lambda m, x: F.pad(x[None], (1, 1), "replicate"), math.sqrt(2)),
    (lambda m, x: F.avg_pool1d(x, 2), math.sqrt(0.5)),
    (lambda m, x: F.interpolate(x[None], scale_factor=2), math.sqrt(2)),
    (lambda m, x: F.dropout(x, 0.5, training=True), 2.0),
    (lambda m, x: m.constant.sum() * torch.ones(3), 0.0),
    (lambda m, x: x.new_zeros(3), 0.0),
    (lambda m, x: torch.split(x, 1)[0] + m.constant[0], 1.0),
]


@pytest.mark.parametrize("index", range(len(FUNCTIONS)))
def test_functions_have_their_constants(index: int) -> None:
    function, expected = FUNCTIONS[index]
    certificate = specopt.certify(Function(function), torch.randn(2, 2))
    assert certificate.unknown == ()
    assert certificate.lipschitz == pytest.approx(expected, rel=1e-3)
    assert certificate.lipschitz is not None and certificate.lipschitz >= expected * (1 - 1e-6)


def branch(module: Any, x: Tensor) -> Tensor:
    return x if x.sum() > 0 else 2 * x


def setitem(module: Any, x: Tensor) -> Tensor:
    y = 2 * x
    y[0] = x[1] * x[0]
    return y


def changed_alias(module: Any, x: Tensor) -> Tensor:
    y = x * 1.0
    view = y[0]
    y.mul_(5.0)
    return view


def unused_result(module: Any, x: Tensor) -> Tensor:
    y = x * 1.0
    y.add_(x)
    return y


def into_constant(module: Any, x: Tensor) -> Tensor:
    kept = module.constant.clone()
    kept.add_(x)
    return kept


UNKNOWN: list[tuple[Callable[[Any, Tensor], Any], str]] = [
    (lambda m, x: x * x, "depends on the inputs"),
    (lambda m, x: 1 / x, "depends on the inputs"),
    (lambda m, x: x @ x.T, ""),
    (lambda m, x: torch.clamp(x, m.constant, x), "several arguments"),
    (lambda m, x: x**2, "pow"),
    (lambda m, x: x.to(torch.int32), "integers"),
    (lambda m, x: x.long().float(), "long"),
    (lambda m, x: x.view(torch.int32), "integers"),
    (lambda m, x: x.view(torch.bfloat16), "bits"),
    (lambda m, x: x.type_as(m.indices).float(), "integers"),
    (lambda m, x: x.to(m.indices).float(), "integers"),
    (lambda m, x: x.to(tensor=m.indices).float(), "integers"),
    (lambda m, x: x.type("torch.LongTensor").float(), "integers"),
    (lambda m, x: x.type(torch.uint8).float(), "integers"),
    (lambda m, x: x.sum(0, dtype=torch.int64), "integers"),
    (lambda m, x: x.to(x.new_zeros(1, dtype=torch.int64)), "integers"),
    (lambda m, x: x[torch.tensor([0, 0])], "several times"),
    (lambda m, x: torch.where(x > 0, x, -x), "gt"),
    (lambda m, x: F.normalize(x), "is no function whose"),
    (lambda m, x: x.sign(), "sign"),
    (branch, "traced"),
    (setitem, "traced"),
    (changed_alias, "in place"),
    (unused_result, "in place"),
    (into_constant, "into a constant"),
    (lambda m, x: torch.add(x, x, out=torch.zeros(2, 2)), "out="),
]


@pytest.mark.parametrize("index", range(len(UNKNOWN)))
@pytest.mark.parametrize("sized", [True, False])
def test_what_has_no_constant_is_named(index: int, sized: bool) -> None:
    function, why = UNKNOWN[index]
    certificate = specopt.certify(Function(function), torch.randn(2, 2) if sized else None)
    assert certificate.lipschitz is None
    assert any(why in reason or (not sized and "give inputs=" in reason) for reason in certificate.unknown)


def test_shapes_taken_from_an_input_need_no_inputs() -> None:
    functions: list[Callable[[Any, Tensor], Tensor]] = [
        lambda m, x: x.view(x.size(0), -1).reshape(x.shape[0] * 2, -1).mean(1),
        lambda m, x: x.mean(x.dim() - 1),
        lambda m, x: x[:, : x.size(1) // 2],
        lambda m, x: x.chunk(x.size(1), dim=x.dim() - 1)[0],
        lambda m, x: x + x.size(0) - x.shape[1] * torch.ones(()),
    ]
    for function in functions[:-1]:
        certificate = specopt.certify(Function(function))
        assert certificate.unknown == () and certificate.lipschitz == 1
    assert specopt.certify(Function(functions[-1])).lipschitz is None


@pytest.mark.parametrize(
    "cast",
    [
        lambda m, x: x.type_as(m.constant),
        lambda m, x: x.to(m.constant).to("cpu"),
        lambda m, x: x.type("torch.DoubleTensor").type(torch.float16),
        lambda m, x: x.to(m.constant.dtype),
        lambda m, x: x.view(x.size(0), -1).float(),
    ],
)
@pytest.mark.parametrize("sized", [True, False])
def test_casts_to_floating_point_have_constant_one(cast: Callable[[Any, Tensor], Tensor], sized: bool) -> None:
    certificate = specopt.certify(Function(cast), torch.randn(2, 2) if sized else None)
    assert certificate.unknown == () and certificate.lipschitz == 1


def test_a_cast_to_the_dtype_of_an_input_depends_on_it() -> None:
    class Alike(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x.to(y.dtype)

    x, y = torch.randn(2), torch.zeros(2)
    assert "give inputs=" in specopt.certify(Alike()).unknown[0]
    assert specopt.certify(Alike(), (x, y)).lipschitz == 1
    assert specopt.certify(Alike(), (x, y.int())).lipschitz is None
    assert specopt.certify(Alike(), (y.int(), x)).lipschitz == 1


def test_sums_of_branches_ask_for_inputs() -> None:
    certificate = specopt.certify(ResNet().eval())
    assert certificate.lipschitz is None
    assert all("give inputs=" in reason for reason in certificate.unknown)


def test_every_unknown_layer_is_listed_once() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.GLU()).train()
    unknown = specopt.certify(model).unknown
    assert [reason.split()[0] for reason in unknown] == ["0", "2", "3"]
    assert specopt.certify(model.eval()).unknown[0].startswith("3 (GLU)")


def test_a_layer_without_constant_by_itself_says_why() -> None:
    for layer, why in (
        (nn.EmbeddingBag(3, 4), "takes indices"),
        (nn.LSTM(3, 4), "recurrent"),
        (nn.GLU(), "multiplies"),
    ):
        (reason,) = specopt.certify(layer).unknown
        assert why in reason
    assert specopt.certify(nn.BatchNorm1d(0).eval()).lipschitz == 0


def test_a_part_that_cannot_be_traced_is_named_and_the_rest_is_followed() -> None:
    model = nn.Sequential(nn.Linear(2, 2), Function(branch), nn.BatchNorm1d(2)).train()
    unknown = specopt.certify(model, torch.randn(4, 2)).unknown
    assert (
        len(unknown) == 2
        and unknown[0].startswith("1 (Function) cannot be traced")
        and unknown[1].startswith("2 (BatchNorm1d)")
    )


def test_hooks_on_the_model_and_on_its_parts_are_not_passed_over() -> None:
    for path in ("", "0", "1"):
        model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
        model.get_submodule(path).register_forward_hook(lambda module, args, result: 3 * result)
        certificate = specopt.certify(model)
        assert certificate.lipschitz is None and any("hook" in reason for reason in certificate.unknown)


def test_hooks_on_all_modules_are_not_passed_over() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, result: 3 * result)
    try:
        certificate = specopt.certify(nn.Sequential(nn.Linear(2, 2)))
    finally:
        handle.remove()
    assert certificate.lipschitz is None and all("hook" in reason for reason in certificate.unknown)


def test_inputs_may_be_several_and_named() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor, scale: float = 2.0) -> Tensor:
            return x + scale * y

    x = torch.randn(3)
    for inputs in ((x, x), {"x": x, "y": x}, {"y": x, "x": x}):
        bound = specopt.certify(Two(), inputs).lipschitz
        assert bound == pytest.approx(3.0) and bound is not None
    assert specopt.certify(Two(), (x, x, 5.0)).lipschitz == pytest.approx(6.0)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_bounds_hold_at_the_ends_of_float64(scale: float) -> None:
    def function(module: Any, x: Tensor) -> Any:
        return torch.cat([scale * x, scale * x]), x + scale * x

    bound = specopt.certify(Function(function), torch.randn(2, 2, dtype=torch.float64)).lipschitz
    assert bound == pytest.approx(math.hypot(math.sqrt(2) * scale, 1 + scale), rel=1e-12)


def test_variable_arguments_and_attention_say_what_they_are() -> None:
    class Variable(nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return inputs[0]

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.attention(x, x, x)[0]
            return result + x

    assert specopt.certify(Variable(), torch.randn(2)).unknown[0].endswith("variable arguments")
    unknown = specopt.certify(Attention(), torch.randn(3, 4)).unknown
    assert len(unknown) == 1 and "dot-product attention" in unknown[0]


def test_training_mode_counts_dropout() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    nn.init.eye_(model[0].weight)  # type: ignore[arg-type]
    assert specopt.certify(model.train()).lipschitz == pytest.approx(2.0, rel=1e-3)
    assert specopt.certify(model.eval()).lipschitz == pytest.approx(1.0, rel=1e-3)
    functional = Function(lambda m, x: F.dropout(x, 0.75, m.training))
    assert specopt.certify(functional.train()).lipschitz == pytest.approx(4.0)
    assert specopt.certify(functional.eval()).lipschitz == 1
