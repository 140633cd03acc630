"""The papers' networks: their sizes, the shapes they take, and what control needs of them."""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from papers.models import NAMES, build
from torch import Tensor, nn

import specopt

MNIST, CIFAR, STL = (1, 28, 28), (3, 32, 32), (3, 96, 96)
DIGITS = (1, 8, 8)
SMALL: dict[str, dict[str, Any]] = {
    name: {"width": 16} if name == "mlp" else {"scale": 0.125, **({"depth": 10} if name == "densenet40" else {})}
    for name in NAMES
}


def small(name: str, shape: tuple[int, int, int] = CIFAR, classes: int = 5, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return build(name, shape, classes, **{**SMALL[name], **options})


def parameters(name: str, shape: tuple[int, int, int], classes: int, **options: Any) -> int:
    with torch.device("meta"):
        return sum(param.numel() for param in build(name, shape, classes, **options).parameters())


def conv(inputs: int, outputs: int, kernel: int, *, bias: bool = False, norm: bool = True) -> int:
    """Parameters of a convolution, of its bias, and of a batch norm on its output."""
    return inputs * outputs * kernel**2 + outputs * (bias + 2 * norm)


def dense(*sizes: int) -> int:
    return sum((a + 1) * b for a, b in pairwise(sizes))


def vgg16(inputs: int, classes: int) -> int:
    channels = [inputs, 64, 64, 128, 128, *[256] * 3, *[512] * 6]
    return sum(conv(a, b, 3) for a, b in pairwise(channels)) + dense(512, classes)


def nin(inputs: int, classes: int, *, norm: bool) -> int:
    layers = (inputs, 192, 5), (192, 160, 1), (160, 96, 1), (96, 192, 5), (192, 192, 1), (192, 192, 1)
    layers += (192, 192, 3), (192, 192, 1)
    return sum(conv(*layer, bias=not norm, norm=norm) for layer in layers) + dense(192, classes)


def densenet(inputs: int, classes: int, layers: int, growth: int) -> int:
    channels, total = 16, conv(inputs, 16, 3, norm=False)
    for block in range(3):
        for _ in range(layers):
            total += 2 * channels + conv(channels, growth, 3, norm=False)
            channels += growth
        if block < 2:
            total += 2 * channels + conv(channels, channels, 1, norm=False)
    return total + 2 * channels + dense(channels, classes)


SIDES = {"lenet5": 28, "lenet": 16}
"""The smallest images that leave a position."""

# Of 1000 and of 100 classes, as counted elsewhere: torchvision's resnet50, and the usual networks for CIFAR-100. VGG's
# usual count has biases on the 4224 channels before a batch norm.
PUBLISHED = [
    ("resnet34", CIFAR, 100, 21_328_292),
    ("resnet50-cifar", CIFAR, 100, 23_705_252),
    ("resnet50", (3, 224, 224), 1000, 25_557_032),
    ("lenet5", MNIST, 10, 61_706),
    ("lenet", MNIST, 10, 431_080),
    ("vgg16", CIFAR, 10, 14_728_266 - 4224),
    ("densenet40", CIFAR, 10, 1_019_722),
]


@pytest.mark.parametrize(("name", "shape", "classes", "published"), PUBLISHED)
def test_parameter_count_is_the_published_one(
    name: str, shape: tuple[int, int, int], classes: int, published: int
) -> None:
    assert parameters(name, shape, classes) == published


@pytest.mark.parametrize("classes", [7, 100])
@pytest.mark.parametrize("shape", [MNIST, CIFAR, STL])
def test_parameter_count_follows_from_the_layers(shape: tuple[int, int, int], classes: int) -> None:
    inputs, side = shape[0], shape[1]
    positions = (((side - 4) // 2 - 4) // 2) ** 2
    lenet = conv(inputs, 20, 5, bias=True, norm=False) + conv(20, 50, 5, bias=True, norm=False)
    lenet += dense(50 * positions, 500, classes)
    assert parameters("lenet", shape, classes) == lenet
    assert parameters("lenet", shape, classes, batch_norm=True, dropout=0.5) == lenet + 2 * (20 + 50 + 500)
    positions = ((side // 2 - 4) // 2 - 4) ** 2
    lenet5 = sum(conv(*sizes, 5, bias=True, norm=False) for sizes in pairwise((inputs, 6, 16, 120)))
    lenet5 += dense(120 * positions, 84, classes)
    assert parameters("lenet5", shape, classes) == lenet5
    assert parameters("lenet5", shape, classes, batch_norm=True, dropout=0.5) == lenet5 + 2 * 84
    assert parameters("vgg16", shape, classes) == vgg16(inputs, classes)
    assert parameters("nin", shape, classes) == nin(inputs, classes, norm=False)
    assert parameters("nin", shape, classes, batch_norm=True) == nin(inputs, classes, norm=True)
    assert parameters("densenet40", shape, classes) == densenet(inputs, classes, 12, 12)
    assert parameters("densenet40", shape, classes, depth=22, growth=9) == densenet(inputs, classes, 6, 9)
    sizes = (inputs * side * side, 2000, 2000, 2000, 2000, classes)
    assert parameters("mlp", shape, classes) == dense(*sizes)


def test_depth_counts_every_linear_layer_of_an_mlp() -> None:
    for depth in (1, 2, 7):
        model = build("mlp", CIFAR, 100, depth=depth, width=11)
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
        sizes = [3072, *[11] * (depth - 1), 100]
        assert [(layer.in_features, layer.out_features) for layer in layers] == list(pairwise(sizes))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [DIGITS, MNIST, CIFAR, STL, (2, 33, 47)])
def test_network_gives_a_logit_for_each_class(name: str, shape: tuple[int, int, int]) -> None:
    if name in SIDES and shape == DIGITS:
        side = SIDES[name]
        with pytest.raises(ValueError, match=f"{name} takes images of {side} x {side} pixels and more, got 8 x 8"):
            small(name, shape)
        return
    with torch.device("meta"):
        model = small(name, shape, classes=7)
        assert model(torch.empty(3, *shape)).shape == (3, 7)


@pytest.mark.parametrize(("name", "side"), SIDES.items())
def test_lenets_take_so_many_pixels_and_no_less(name: str, side: int) -> None:
    assert build(name, (1, side, side), 10)(torch.zeros(1, 1, side, side)).shape == (1, 10)
    with pytest.raises(ValueError, match=f"got {side} x {side - 1}"):
        build(name, (1, side, side - 1), 10)


def test_lenet5_halves_twice_and_ends_in_one_position() -> None:
    model, found = build("lenet5", MNIST, 10), []
    for name in ("conv1", "conv2", "conv3"):
        model.get_submodule(name).register_forward_hook(lambda _module, _inputs, output: found.append(output.shape[1:]))
    model(torch.zeros(1, *MNIST))
    assert found == [(6, 28, 28), (16, 10, 10), (120, 1, 1)]


def test_lenet5_norms_what_the_hidden_layer_gives_after_its_relu_and_before_dropout() -> None:
    model, seen = build("lenet5", MNIST, 10, batch_norm=True, dropout=0.5).train(), {}
    for name in ("norm", "dropout"):
        model.get_submodule(name).register_forward_hook(
            lambda _module, inputs, output, name=name: seen.update({name: (inputs[0], output)})
        )
    model(torch.randn(50, *MNIST))
    assert (seen["norm"][0] >= 0).all() and seen["norm"][0].shape == (50, 84)
    assert torch.equal(seen["norm"][1], seen["dropout"][0]) and (seen["norm"][1] < 0).any()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter(name: str) -> None:
    model = small(name).train()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, *CIFAR, generator=generator)
    nn.functional.cross_entropy(model(images), torch.arange(8) % 5).backward()
    for param_name, param in model.named_parameters():
        assert param.grad is not None, param_name
        assert param.grad.count_nonzero() > 0, param_name


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_gives_the_same_weights_and_another_seed_others(name: str) -> None:
    first, again = small(name).state_dict(), small(name).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    torch.manual_seed(1)
    other = build(name, CIFAR, 5, **SMALL[name]).state_dict()
    assert not torch.equal(first["head.weight"], other["head.weight"])


@pytest.mark.parametrize("name", NAMES)
def test_param_groups_control_every_linear_and_conv_weight(name: str) -> None:
    model = small(name)
    wanted = {f"{at}.weight" for at, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = specopt.param_groups(model)
    assert {decision.name for decision in groups.decisions if decision.matrices} == wanted
    assert all(decision.matrices[0] == 1 for decision in groups.decisions if decision.matrices)


@pytest.mark.parametrize("name", NAMES)
def test_head_is_the_only_layer_that_gives_the_classes(name: str) -> None:
    model = small(name, classes=13)
    last = {at for at, layer in model.named_modules() if getattr(layer, "weight", torch.empty(0, 0)).shape[0] == 13}
    assert last == {"head"}
    groups = specopt.param_groups(model, overrides={"head*": {"spectral": False}})
    assert [d.name for d in groups.decisions if d.name.startswith("head")] == ["head.weight", "head.bias"]
    assert all(d.matrices is None for d in groups.decisions if d.name.startswith("head"))


@pytest.mark.parametrize(("name", "shortcuts"), [("resnet34", 3), ("resnet50", 4), ("resnet50-cifar", 4)])
def test_pattern_downsample_takes_the_convolutions_of_all_shortcuts(name: str, shortcuts: int) -> None:
    model = small(name)
    groups = specopt.param_groups(model, overrides={"*downsample*": {"spectral": False}})
    off = [d for d in groups.decisions if len(d.shape) == 4 and d.matrices is None]
    assert len(off) == shortcuts
    assert all(d.shape[2:] == (1, 1) and "downsample" in d.name for d in off)
    one_by_one = [d for d in groups.decisions if len(d.shape) == 4 and d.shape[2:] == (1, 1)]
    assert len(one_by_one) - shortcuts == (0 if name == "resnet34" else 2 * 16)


@pytest.mark.parametrize(("name", "sizes"), [("resnet34", [32, 16, 8, 4]), ("resnet50", [8, 4, 2, 1])])
def test_resnet_stages_halve_the_size_after_the_stem(name: str, sizes: list[int]) -> None:
    model, found = small(name).eval(), []
    for stage in model.get_submodule("stages").children():
        stage.register_forward_hook(lambda _module, _inputs, output: found.append(output.shape[-1]))
    model(torch.zeros(1, *CIFAR))
    assert found == sizes


@pytest.mark.parametrize(
    ("name", "relus", "max_pools", "mean_pools", "dropouts"),
    [
        ("mlp", 4, 0, 0, 0),
        ("lenet5", 4, 2, 0, 1),
        ("lenet", 3, 2, 0, 1),
        ("vgg16", 13, 5, 0, 0),
        ("nin", 8, 1, 1, 2),
        ("densenet40", 39, 0, 2, 38),
        ("resnet34", 1 + 2 * 16, 0, 0, 0),
        ("resnet50", 1 + 3 * 16, 1, 0, 0),
        ("resnet50-cifar", 1 + 3 * 16, 0, 0, 0),
    ],
)
def test_forward_passes_every_nonlinearity_pool_and_dropout(
    name: str, relus: int, max_pools: int, mean_pools: int, dropouts: int
) -> None:
    calls: Counter[type[nn.Module]] = Counter()
    with torch.device("meta"):
        model = build(name, CIFAR, 10)
        for module in model.modules():
            module.register_forward_hook(lambda module, *_: calls.update([type(module)]))
        model(torch.empty(2, *CIFAR))
    assert [calls[kind] for kind in (nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.Dropout)] == [
        relus, max_pools, mean_pools, dropouts,
    ]  # fmt: skip
    used = {type(module) for module in model.modules() if not list(module.children())}
    assert used <= set(calls)


@pytest.mark.parametrize(("name", "at"), [("vgg16", "stages.4"), ("nin", "features"), ("densenet40", "blocks.4")])
@pytest.mark.parametrize(("shape", "whole"), [(MNIST, 28), (CIFAR, 32), (STL, 96)])
def test_pools_halve_and_round_up(name: str, at: str, shape: tuple[int, int, int], whole: int) -> None:
    model, sizes = small(name, shape).eval(), []
    model.get_submodule(at).register_forward_hook(lambda _module, _inputs, output: sizes.append(output.shape[2:]))
    model(torch.zeros(1, *shape))
    side = math.ceil(whole / (32 if name == "vgg16" else 4))
    assert sizes == [(side, side)]


def test_residual_block_without_a_branch_is_the_relu_of_its_input() -> None:
    block = small("resnet34").eval().get_submodule("stages.0.1")
    for layer in block.get_submodule("branch").modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.zeros_(layer.weight)
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(block(x), x.relu())


@pytest.mark.parametrize("name", ["resnet50", "resnet50-cifar"])
def test_bottleneck_strides_in_its_3_by_3_convolution(name: str) -> None:
    model = small(name)
    strided = {
        at: layer.kernel_size
        for at, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2) and not at.startswith("stem")
    }
    assert len(strided) == 6
    assert all(kernel == ((1, 1) if "downsample" in at else (3, 3)) for at, kernel in strided.items())


def test_dense_layer_keeps_its_input_before_what_it_adds() -> None:
    model = small("densenet40", growth=24).eval()
    block = model.get_submodule("blocks.0")
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(block(x)[:, :8], x)
    assert block(x).shape[1] == 8 + 2 * 8


def widths(name: str, scale: float) -> list[int]:
    """Outputs of every convolution and Linear layer but the head."""
    with torch.device("meta"):
        model = build(name, CIFAR, 5, scale=scale)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    return [layer.weight.shape[0] for layer in layers if layer is not model.get_submodule("head")]


@pytest.mark.parametrize("name", ["lenet5", "lenet", "vgg16", "nin", "resnet34"])
@pytest.mark.parametrize("scale", [0.03, 0.25, 0.7, 1.5])
def test_scale_multiplies_channels_and_rounds_to_multiples_of_8(name: str, scale: float) -> None:
    nearest = [8 * int(scale * width / 8 + 0.5) for width in widths(name, 1.0)]
    assert widths(name, scale) == [max(8, width) for width in nearest]


@pytest.mark.parametrize("name", ["resnet50", "resnet50-cifar"])
def test_scaled_bottleneck_gives_four_times_its_scaled_channels(name: str) -> None:
    assert widths(name, 0.25) == [width // 4 for width in widths(name, 1.0)]
    assert set(widths(name, 0.01)) == {8, 32}


def test_scale_multiplies_stem_and_growth_of_a_densenet() -> None:
    for scale, stem, growth in ((1.0, 16, 12), (0.5, 8, 8), (2.0, 32, 24)):
        first, second = stem + 12 * growth, stem + 24 * growth
        expected = [stem, *[growth] * 12, first, *[growth] * 12, second, *[growth] * 12]
        assert widths("densenet40", scale) == expected


@pytest.mark.parametrize("name", ["mlp", "lenet5", "lenet", "vgg16", "nin", "densenet40", "resnet34"])
def test_compiled_network_is_one_graph_and_agrees(name: str) -> None:
    model, images = small(name).eval(), torch.randn(2, *CIFAR)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))


@pytest.mark.parametrize("name", ["resnet50", "resnet50-cifar"])
def test_compiled_stem_and_bottleneck_are_one_graph_and_agree(name: str) -> None:
    """The sixteen blocks of a whole network take seconds to trace."""
    model, images = small(name).eval(), torch.randn(2, *CIFAR)
    part = nn.Sequential(model.get_submodule("stem"), model.get_submodule("stages.0.0"))
    torch._dynamo.reset()
    compiled = torch.compile(part, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), part(images))


@pytest.mark.parametrize("name", NAMES)
def test_network_trains_channels_last_as_it_does_contiguous(name: str) -> None:
    model = small(name, **({"dropout": 0.0} if name == "nin" else {})).double()
    images, labels = torch.randn(4, *CIFAR, dtype=torch.float64), torch.arange(4)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    for each, x in ((model, images), (other, images.contiguous(memory_format=torch.channels_last))):
        nn.functional.cross_entropy(each(x), labels).backward()
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad)


@pytest.mark.parametrize("name", NAMES)
def test_network_trains_under_bfloat16_autocast(name: str) -> None:
    model = small(name)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(4, *CIFAR))
    nn.functional.cross_entropy(logits.float(), torch.arange(4)).backward()
    assert all(param.grad is not None and param.grad.isfinite().all() for param in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_functional_gradient_is_that_of_backward(name: str) -> None:
    model = small(name).eval()
    images, labels = torch.randn(2, *CIFAR), torch.arange(2)
    weights = {key: param.detach() for key, param in model.named_parameters()}

    def loss(params: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(model, params, (images,)), labels)

    found = torch.func.grad(loss)(weights)
    nn.functional.cross_entropy(model(images), labels).backward()
    for key, param in model.named_parameters():
        torch.testing.assert_close(found[key], param.grad)


@pytest.mark.parametrize("name", NAMES)
def test_forward_leaves_its_input_alone(name: str) -> None:
    images = torch.randn(2, *CIFAR)
    kept = images.clone()
    small(name).train()(images)
    assert torch.equal(images, kept)


def test_initial_weights_have_the_variance_of_he_and_a_head_half_of_it() -> None:
    torch.manual_seed(0)
    model = build("nin", CIFAR, 100)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            fan_in = layer.in_channels * layer.kernel_size[0] ** 2
            gain = 1 if name == "head" else 2
            assert layer.weight.std().item() == pytest.approx((gain / fan_in) ** 0.5, rel=0.04)
            assert layer.bias is not None
            assert layer.bias.count_nonzero() == 0


@pytest.mark.parametrize("name", ["lenet5", "lenet", "nin", "densenet40"])
def test_dropout_acts_in_training_alone(name: str) -> None:
    images = torch.randn(4, *CIFAR)
    model = small(name, dropout=0.5)
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 0.0
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_unknown_name_lists_the_near_ones() -> None:
    with pytest.raises(ValueError, match=r"name must be one of mlp, .*, got 'resnet43' \(near: resnet34"):
        build("resnet43", CIFAR, 10)
    with pytest.raises(ValueError, match=r"got 'zzz'$"):
        build("zzz", CIFAR, 10)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("mlp", {"dept": 3}, r"mlp takes the options depth, width, got 'dept' \(near: depth\)"),
        ("mlp", {"scale": 0.5}, "mlp takes the options depth, width, got 'scale'"),
        ("vgg16", {"dropout": 0.5}, "vgg16 takes the options scale, got 'dropout'"),
        ("resnet34", {"stem": None}, "resnet34 takes the options scale, got 'stem'"),
        ("mlp", {"depth": 0}, "depth must be a whole number from 1 up, got 0"),
        ("mlp", {"width": 2.5}, "width must be a whole number from 1 up, got 2.5"),
        ("densenet40", {"depth": 41}, "depth must be 3 times a number of layers and 4 more.*got 41"),
        ("densenet40", {"depth": 4}, "depth must be a whole number from 7 up, got 4"),
        ("densenet40", {"growth": True}, "growth must be a whole number from 1 up, got True"),
        ("nin", {"dropout": 1.0}, r"dropout must be a number in \[0, 1\), got 1.0"),
        ("lenet5", {"dropout": -0.1}, r"dropout must be a number in \[0, 1\), got -0.1"),
        ("lenet5", {"batch_norm": 1}, "batch_norm must be True or False, got 1"),
        ("nin", {"batch_norm": "yes"}, "batch_norm must be True or False, got 'yes'"),
        ("resnet50", {"scale": 0.0}, "scale must be a finite number above 0, got 0.0"),
        ("vgg16", {"scale": float("nan")}, "scale must be a finite number above 0, got nan"),
    ],
)
def test_wrong_option_is_told_with_what_it_may_be(name: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        build(name, CIFAR, 10, **options)


@pytest.mark.parametrize("shape", [(3, 32), (3, 32, 0), (32, 32, 3.0), 32, "abc"])
def test_wrong_shape_is_told(shape: Any) -> None:
    with pytest.raises(ValueError, match=r"shape must be \(C, H, W\), three whole numbers from 1 up"):
        build("vgg16", shape, 10)


@pytest.mark.parametrize("classes", [0, 1, 10.0, True])
def test_wrong_number_of_classes_is_told(classes: Any) -> None:
    with pytest.raises(ValueError, match="classes must be a whole number from 2 up"):
        build("vgg16", CIFAR, classes)
