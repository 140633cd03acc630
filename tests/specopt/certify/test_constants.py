"""Lipschitz constants of modules: never below what the module does, and exact where that is claimed."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from specopt.certify.known import Call, NotKnown
from specopt.certify.layers import Norms
from specopt.certify.modules import gain_of


def gain(module: nn.Module, example: Tensor | None = None, *, training: bool = False) -> float:
    module.train(training)
    with torch.no_grad():
        output = module(example) if example is not None else None
    return gain_of(module, Call(Norms(1e-3), training, example, output))


def steepest(module: nn.Module) -> float:
    """The largest slope on a fine grid, in float64."""
    x = torch.linspace(-12, 12, 2_400_001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(module.double()(x).sum(), x)
    return float(slope.abs().max())


def jacobian(module: nn.Module, x: Tensor) -> Tensor:
    """(outputs, inputs) at a point, in float64."""
    x = x.double()
    found = torch.autograd.functional.jacobian(module.double().eval(), x)
    assert isinstance(found, Tensor)
    return found.reshape(-1, x.numel())


def norm_at(module: nn.Module, *points: Tensor) -> float:
    return max(float(torch.linalg.matrix_norm(jacobian(module, x), 2)) for x in points)


ELEMENTWISE = [
    *(nn.ReLU(), nn.ReLU6(), nn.Hardtanh(), nn.Tanh(), nn.Sigmoid(), nn.LogSigmoid(), nn.Softsign(), nn.Tanhshrink()),
    *(nn.Softshrink(), nn.Hardsigmoid(), nn.Hardswish(), nn.SiLU(), nn.Mish(), nn.SELU(), nn.GELU(), nn.CELU(0.7)),
    *(nn.GELU("tanh"), nn.LeakyReLU(0.2), nn.LeakyReLU(-3.0), nn.ELU(2.5), nn.ELU(0.5), nn.Softplus(2.0)),
    *(nn.PReLU(init=-1.7), nn.PReLU(init=0.2), nn.RReLU(), nn.Threshold(0.5, 0.5), nn.Identity()),
]


@pytest.mark.parametrize("module", ELEMENTWISE, ids=repr)
def test_constants_of_activations_are_their_steepest_slopes(module: nn.Module) -> None:
    exact = steepest(module.eval())
    assert exact <= gain(module) * (1 + 1e-7)  # torch's gradients take 1/6 and 1/alpha in float32
    assert gain(module) <= max(exact, 1.0 if isinstance(module, nn.LogSigmoid | nn.Tanhshrink) else 0) * (1 + 1e-4)


@pytest.mark.parametrize("beta", [0.3, 1.0, 7.0])
@pytest.mark.parametrize("threshold", [15.0, 20.0, 40.0])
def test_where_softplus_has_a_constant_its_jump_is_below_the_rounding_of_float32(beta: float, threshold: float) -> None:
    module = nn.Softplus(beta, threshold)
    assert gain(module) == 1
    edge = torch.tensor(threshold / beta)
    jump = math.log1p(math.exp(-threshold)) / beta
    assert 0 < jump < float(torch.nextafter(edge, 2 * edge).double() - edge.double()) / 2


@pytest.mark.parametrize("module", [nn.Softmax(-1), nn.Softmin(-1), nn.LogSoftmax(-1), nn.Softmax2d()], ids=repr)
def test_constants_of_softmax_hold_and_are_approached(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    points = [scale * torch.randn(1, 2, 1, 2, generator=generator) for scale in (0.0, 1.0, 30.0) for _ in range(5)]
    exact = norm_at(module, *points)
    bound = gain(module, points[0])
    assert exact <= bound * (1 + 1e-12)
    assert bound <= exact * 1.001


def linear_cases() -> list[tuple[nn.Module, tuple[int, ...], bool]]:
    """Module, input size, and whether the constant for a known size is exact."""
    return [
        (nn.AvgPool1d(3), (1, 2, 9), True),
        (nn.AvgPool1d(3, 2, padding=1), (1, 2, 11), True),
        (nn.AvgPool2d(3, 2, padding=1, count_include_pad=False), (1, 1, 6, 7), True),
        (nn.AvgPool2d((3, 2), (1, 3), ceil_mode=True, padding=1), (1, 1, 6, 6), True),
        (nn.AvgPool2d(3, 2, ceil_mode=True, padding=1, count_include_pad=False), (1, 1, 6, 8), True),
        (nn.AvgPool2d(2, divisor_override=1), (1, 1, 6, 6), True),
        (nn.AvgPool3d(2, 1), (1, 1, 3, 4, 3), True),
        (nn.AdaptiveAvgPool1d(3), (1, 1, 7), True),
        (nn.AdaptiveAvgPool2d((1, None)), (1, 1, 5, 4), True),
        (nn.AdaptiveAvgPool2d(5), (1, 1, 3, 7), True),
        (nn.AdaptiveAvgPool3d(1), (1, 2, 2, 3, 3), True),
        (nn.ZeroPad2d(2), (1, 1, 3, 4), True),
        (nn.ConstantPad1d((2, -1), 3.0), (1, 1, 5), True),
        (nn.ReflectionPad2d((2, 1, 0, 2)), (1, 1, 4, 5), True),
        (nn.ReplicationPad1d(3), (1, 1, 4), True),
        (nn.CircularPad2d((1, 2, 2, 0)), (1, 1, 3, 4), True),
        (nn.Upsample(scale_factor=3), (1, 1, 4, 3), True),
        (nn.Upsample(size=(5, 7)), (1, 1, 4, 3), True),
        (nn.Upsample(scale_factor=1.7, mode="nearest-exact"), (1, 1, 4, 3), True),
        (nn.Upsample(scale_factor=2, mode="bilinear"), (1, 1, 4, 3), True),
        (nn.Upsample(scale_factor=2.6, mode="linear", align_corners=True), (1, 1, 7), True),
        (nn.Unfold(3, padding=1), (1, 1, 6, 6), True),
        (nn.Unfold(3, dilation=2, stride=2), (1, 1, 9, 9), True),
        (nn.Fold((6, 6), 3, padding=1), (1, 9, 36), True),
        (nn.PixelShuffle(2), (1, 4, 2, 3), True),
        (nn.PixelUnshuffle(2), (1, 1, 4, 6), True),
        (nn.Flatten(), (1, 2, 3), True),
        (nn.Unflatten(1, (2, 3)), (1, 6), True),
        (nn.ChannelShuffle(2), (1, 4, 2, 2), True),
        (nn.Conv2d(2, 3, 3, padding=1), (1, 2, 5, 6), True),
        (nn.ConvTranspose1d(2, 3, 3, stride=2), (1, 2, 5), True),
        (nn.Linear(4, 3), (2, 4), True),
    ]


@pytest.mark.parametrize(("module", "size", "exact"), linear_cases(), ids=lambda value: repr(value)[:60])
def test_constants_of_linear_maps_are_their_norms(module: nn.Module, size: tuple[int, ...], exact: bool) -> None:
    example = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    module = module.double()
    norm = norm_at(module, example)
    assert norm * (1 - 1e-12) <= gain(module, example) <= norm * 1.001
    try:
        for_any_size = gain(module)
    except NotKnown as reason:
        assert "give inputs=" in str(reason)
    else:
        assert norm * (1 - 1e-12) <= for_any_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [41, 47, 55, 61, 82, 94])
def test_nearest_upsampling_counts_copies_as_torch_rounds_their_places(size: int, dtype: torch.dtype) -> None:
    module, example = nn.Upsample(size=size), torch.randn(1, 1, 2, dtype=dtype)
    assert gain(module, example) >= norm_at(module, example) * (1 - 1e-6)


@pytest.mark.parametrize(
    ("module", "size"),
    [
        (nn.MaxPool1d(3), (1, 1, 9)),
        (nn.MaxPool2d(3, 2, padding=1), (1, 1, 8, 8)),
        (nn.MaxPool2d(3, 1, dilation=2), (1, 1, 7, 7)),
        (nn.MaxPool2d(3, 2, ceil_mode=True), (1, 1, 6, 6)),
        (nn.MaxPool3d(2, 1), (1, 1, 3, 3, 3)),
        (nn.AdaptiveMaxPool1d(3), (1, 1, 7)),
        (nn.AdaptiveMaxPool2d((1, 5)), (1, 1, 3, 3)),
        (nn.LPPool2d(2, 3, 1), (1, 1, 6, 6)),
    ],
    ids=lambda value: repr(value),
)
def test_constants_of_max_pooling_hold_where_one_entry_rules_all_its_windows(
    module: nn.Module, size: tuple[int, ...]
) -> None:
    count = math.prod(size)
    points = [torch.zeros(count).index_fill_(0, torch.tensor(i), 5.0).reshape(size) + 1 for i in range(count)]
    norm = norm_at(module, *points)
    bound = gain(module, points[0])
    assert norm <= bound * (1 + 1e-12)
    if isinstance(module, nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d):
        assert norm >= 0.99 * bound
        assert gain(module) >= bound * (1 - 1e-12)


@pytest.mark.parametrize(
    ("module", "size"),
    [
        (nn.LayerNorm(6, eps=1e-3), (1, 6)),
        (nn.LayerNorm((2, 3), eps=1e-3, bias=False), (1, 2, 3)),
        (nn.GroupNorm(2, 4, eps=1e-3), (1, 4, 3)),
        (nn.RMSNorm(6, eps=1e-3), (1, 6)),
        (nn.InstanceNorm1d(2, eps=1e-3), (1, 2, 4)),
        (nn.InstanceNorm1d(2, eps=1e-3, affine=True), (1, 2, 4)),
    ],
    ids=lambda value: repr(value),
)
def test_layer_norm_is_bounded_by_its_eps_and_reaches_it_at_constant_inputs(
    module: nn.Module, size: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    if (weight := getattr(module, "weight", None)) is not None:
        nn.init.uniform_(weight, 1.0, 3.0, generator=generator)
    centre = torch.zeros(size) if isinstance(module, nn.RMSNorm) else torch.ones(size)
    points = [centre, *(scale * torch.randn(size, generator=generator) for scale in (1e-4, 1e-2, 1.0))]
    norm, bound = norm_at(module, *points), gain(module)
    assert norm <= bound * (1 + 1e-12)
    assert bound <= 1.5 * norm


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_in_eval_mode_is_the_largest_of_its_scales(affine: bool) -> None:
    module = nn.BatchNorm1d(5, affine=affine).eval().double()
    generator = torch.Generator().manual_seed(0)
    assert module.running_var is not None
    module.running_var.uniform_(0.1, 2, generator=generator)
    if affine:
        nn.init.normal_(module.weight, generator=generator)
    norm = norm_at(module, torch.zeros(2, 5))
    assert norm * (1 - 1e-12) <= gain(module) <= norm * (1 + 1e-12)


UNKNOWN: list[tuple[Callable[[], nn.Module], bool, str]] = [
    (lambda: nn.BatchNorm2d(3), True, "eval"),
    (lambda: nn.BatchNorm2d(3, track_running_stats=False), False, "batch"),
    (lambda: nn.LayerNorm(3, eps=0.0), False, "eps"),
    (lambda: nn.RMSNorm(3), False, "eps"),
    (lambda: nn.CELU(-1.0), False, "alpha"),
    (lambda: nn.Softplus(1.0, threshold=1.0), False, "threshold"),
    (lambda: nn.Threshold(1.0, 0.0), False, "jumps"),
    (lambda: nn.Hardshrink(), False, "continuous"),
    (lambda: nn.GLU(), False, "multiplies"),
    (lambda: nn.AlphaDropout(), True, "training"),
    (lambda: nn.MaxPool2d(2, return_indices=True), False, "indices"),
    (lambda: nn.LPPool2d(3, 2), False, "norm_type"),
    (lambda: nn.LPPool1d(2, 2, ceil_mode=True), False, "ceil_mode"),
    (lambda: nn.MultiheadAttention(4, 2), False, "Lipschitz"),
    (lambda: nn.LSTM(4, 4), False, "recurrent"),
    (lambda: nn.Embedding(4, 4), False, "indices"),
    (lambda: nn.LocalResponseNorm(2), False, "no type"),
]


@pytest.mark.parametrize(("make", "training", "why"), UNKNOWN)
def test_what_has_no_constant_says_why(make: Callable[[], nn.Module], training: bool, why: str) -> None:
    with pytest.raises(NotKnown, match=why):
        gain(make(), training=training)


def test_subclasses_with_a_forward_of_their_own_and_hooks_are_not_taken_for_their_base() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Standardized(nn.Conv2d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(x, 3 * weight, bias)

    class Renamed(nn.Linear):
        pass

    patched = nn.ReLU()
    patched.forward = lambda x: 3 * x  # type: ignore[method-assign]
    hooked = nn.ReLU()
    hooked.register_forward_hook(lambda module, args, result: 3 * result)
    for module in (Doubled(3, 3), Standardized(1, 1, 1), patched, hooked):
        with pytest.raises(NotKnown):
            gain(module)
    assert gain(Renamed(3, 3)) > 0


@pytest.mark.parametrize("p", [0.0, 0.25, 0.9])
def test_dropout_scales_in_training_mode_only(p: float) -> None:
    for kind in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d):
        assert gain(kind(p)) == 1
        assert gain(kind(p), training=True) == pytest.approx(1 / (1 - p))
    assert gain(nn.AlphaDropout(p)) == 1
