"""record_shapes: what layers take and give in one forward, and a model that is afterwards what it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm as hooked_spectral_norm

import specopt
from specopt import LayerShapes
from specopt.recording import record_call


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4)
        self.up = nn.ConvTranspose2d(12, 4, 2, stride=2)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(F.relu(self.grouped(self.norm(self.first(x)))))
        return self.head(self.drop(x.mean((-2, -1))))  # type: ignore[no-any-return]


IMAGES = torch.randn(2, 3, 16, 20, generator=torch.Generator().manual_seed(0))
EXPECTED = {
    "first.weight": LayerShapes((3, 16, 20), (8, 8, 10)),
    "grouped.weight": LayerShapes((8, 8, 10), (12, 6, 8)),
    "up.weight": LayerShapes((12, 6, 8), (4, 12, 16)),
    "head.weight": LayerShapes((4,), (5,)),
}


def test_convolutions_have_channels_and_positions_and_linears_features() -> None:
    assert specopt.record_shapes(ConvNet(), IMAGES) == EXPECTED
    assert list(specopt.record_shapes(ConvNet(), IMAGES)) == list(EXPECTED)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("batch", [(), (2,)], ids=["unbatched", "batched"])
def test_batch_is_no_part_of_the_shapes(dims: int, batch: tuple[int, ...]) -> None:
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    shapes = specopt.record_shapes(kind(3, 4, 2, stride=2), torch.randn(*batch, 3, *(8, 6, 4)[:dims]))
    assert shapes["weight"] == LayerShapes((3, *(8, 6, 4)[:dims]), (4, *(4, 3, 2)[:dims]))


@pytest.mark.parametrize("tokens", [(), (2,), (2, 7), (2, 7, 3)])
def test_dimensions_of_tokens_are_no_part_of_the_shapes(tokens: tuple[int, ...]) -> None:
    assert specopt.record_shapes(nn.Linear(5, 6), torch.randn(*tokens, 5)) == {"weight": LayerShapes((5,), (6,))}


def test_positions_are_those_of_the_output_over_those_of_the_input() -> None:
    assert LayerShapes((3, 16, 20), (8, 8, 10)).positions == 0.25
    assert LayerShapes((12, 6, 8), (4, 12, 16)).positions == 4
    assert LayerShapes((5,), (6,)).positions == 1


def state_of(model: nn.Module) -> list[tuple[Any, ...]]:
    """Objects, values and versions of all that a forward might touch."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    kept: list[tuple[Any, ...]] = [(name, id(t), t._version, t.detach().clone()) for name, t in tensors]
    for name, module in model.named_modules():
        hooks = (*module._forward_hooks, *module._forward_pre_hooks, *module._forward_hooks_with_kwargs)
        kept.append((name, module.training, set(vars(module)), hooks))
    return kept


def same(before: list[tuple[Any, ...]], after: list[tuple[Any, ...]]) -> bool:
    pairs = ((a, b) for one, other in zip(before, after, strict=True) for a, b in zip(one, other, strict=True))
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


class Counting(nn.Module):
    """Keeps statistics in each way there is: in place, by a new buffer, by a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.mean: Tensor = nn.Buffer(torch.zeros(4))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = x.mean(0)
        self.register_buffer(f"of_call_{self.calls}", x.mean(0))
        return self.layer(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (ConvNet, IMAGES),
        (lambda: hooked_spectral_norm(nn.Conv2d(3, 4, 3)), IMAGES),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(20, 6)), IMAGES),
        (lambda: nn.TransformerEncoderLayer(20, 2, 16, batch_first=True), IMAGES[0]),
        (Counting, torch.randn(3, 4)),
    ],
    ids=["batch norm", "spectral_norm by hook", "spectral_norm parametrization", "transformer", "statistics"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_model_and_random_state_are_afterwards_what_they_were(
    build: Callable[[], nn.Module], inputs: Tensor, training: bool
) -> None:
    model = build().train(training)
    before, random = state_of(model), torch.random.get_rng_state()
    specopt.record_shapes(model, inputs)
    assert same(before, state_of(model)) and torch.equal(random, torch.random.get_rng_state())
    assert getattr(model, "calls", 0) == 0


def test_forward_runs_in_the_mode_that_the_model_is_in_without_gradients() -> None:
    seen: list[tuple[bool, bool]] = []
    model = ConvNet()
    model.head.register_forward_pre_hook(lambda module, _: seen.append((module.training, torch.is_grad_enabled())))
    for training in (True, False):
        specopt.record_shapes(model.train(training), IMAGES)
    assert seen == [(True, False), (False, False)]


class Failing(ConvNet):
    def forward(self, x: Tensor) -> Tensor:
        torch.randn(())
        self.norm(self.first(x))
        raise ArithmeticError("half way")


def test_forward_that_raises_leaves_everything_as_it_was_too() -> None:
    model = Failing()
    before, random = state_of(model), torch.random.get_rng_state()
    with pytest.raises(ArithmeticError, match="half way"):
        specopt.record_shapes(model, IMAGES)
    assert same(before, state_of(model)) and torch.equal(random, torch.random.get_rng_state())
    assert torch.is_grad_enabled()


def test_buffer_that_modules_share_stays_shared_during_the_forward() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.layer = nn.Module(), nn.Module(), nn.Linear(4, 4)
            self.a.register_buffer("count", torch.zeros(()))
            self.b.count = nn.Buffer(torch.zeros(()))
            self.b._buffers["count"] = self.a.get_buffer("count")

        def forward(self, x: Tensor) -> Tensor:
            self.a.get_buffer("count").add_(1)
            assert self.b.get_buffer("count") == 1
            return self.layer(x)  # type: ignore[no-any-return]

    model = Shared()
    specopt.record_shapes(model, torch.randn(2, 4))
    assert model.a.get_buffer("count") == 0


class Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.unused = nn.Conv2d(3, 3, 3, stride=2), nn.Conv2d(3, 3, 3)

    def forward(self, *levels: Tensor) -> list[Tensor]:
        return [self.shared(level) for level in levels]


def test_module_called_several_times_has_the_call_of_most_positions_and_one_not_called_is_absent() -> None:
    levels = [torch.randn(1, 3, *size) for size in ((5, 7), (16, 8), (8, 16), (9, 9))]
    assert specopt.record_shapes(Pyramid(), *levels) == {"shared.weight": LayerShapes((3, 16, 8), (3, 7, 3))}


def test_tied_weight_stands_under_its_first_name_wherever_it_is_called() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(3, 3, 3, stride=2))
    model[2].weight = model[0].weight
    assert specopt.record_shapes(model, IMAGES) == {"0.weight": LayerShapes((3, 16, 20), (3, 16, 20))}
    model = nn.Sequential(nn.Conv2d(3, 3, 3, stride=2), nn.Upsample(scale_factor=8), nn.Conv2d(3, 3, 3, padding=1))
    model[2].weight = model[0].weight
    assert specopt.record_shapes(model, IMAGES)["0.weight"].input == (3, 56, 72)


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(10, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.lstm = nn.LSTM(8, 6, batch_first=True, proj_size=4)
        self.bilinear = nn.Bilinear(4, 4, 7)

    def forward(self, tokens: Tensor, *, scale: float) -> Tensor:
        x, _ = self.lstm(self.encoder(scale * self.tokens(tokens)))
        return self.bilinear(x, x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("training", [True, False])
def test_every_module_type_with_matrices_is_seen_also_where_torch_would_take_its_fast_path(training: bool) -> None:
    model = Everything().train(training)
    shapes = specopt.record_shapes(model, torch.zeros(2, 5, dtype=torch.long), scale=2.0)
    sizes = {name: (found.input, found.output) for name, found in shapes.items()}
    assert sizes == {
        "encoder.self_attn.in_proj_weight": ((8,), (8,)),
        "encoder.self_attn.out_proj.weight": ((8,), (8,)),
        "encoder.linear1.weight": ((8,), (16,)),
        "encoder.linear2.weight": ((16,), (8,)),
        "lstm.weight_ih_l0": ((8,), (6,)),
        "lstm.weight_hh_l0": ((4,), (6,)),
        "lstm.weight_hr_l0": ((6,), (4,)),
        "bilinear.weight": ((16,), (7,)),
    }


def test_compiled_model_is_recorded_without_being_compiled_again() -> None:
    compiled = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph

    model: Any = torch.compile(nn.Sequential(nn.Conv2d(3, 4, 3)), backend=backend)
    for _ in range(2):
        model(IMAGES)
        assert specopt.record_shapes(model, IMAGES) == {"_orig_mod.0.weight": LayerShapes((3, 16, 20), (4, 14, 18))}
    assert len(compiled) == 1


def test_inputs_may_be_one_several_or_by_keyword() -> None:
    model, image = nn.Conv2d(3, 4, 3), IMAGES
    expected = {"weight": LayerShapes((3, 16, 20), (4, 14, 18))}
    for inputs in (image, (image,), [image], {"input": image}):
        assert record_call(model, inputs) == expected


def test_what_is_no_module_and_what_is_not_initialized_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model must be .* got list"):
        specopt.record_shapes([], IMAGES)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight is not initialized"):
        specopt.record_shapes(nn.LazyConv2d(3, 3), IMAGES)
