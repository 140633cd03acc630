"""Measures of a network against loops over samples and against float64 singular value decompositions."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from papers.models import NAMES, build
from papers.runs import measures
from papers.runs.measures import EXACT_SIDE, evaluate, generalization_gap, input_gradient_norms, norms, spectra
from torch import Tensor, nn

import specopt

CLASSES = 4


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """With batch norm whose statistics are not those of a batch, and dropout."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(150, CLASSES),
    )  # fmt: skip
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2.0)
    return model.to(dtype)


def samples(count: int = 11, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 2, 5, 5, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.randint(CLASSES, (count,), generator=generator)


def batches(images: Tensor, labels: Tensor, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(size), labels.split(size), strict=True))


def with_spectrum(values: Tensor, rows: int, columns: int) -> Tensor:
    """A float64 matrix with given singular values."""
    generator = torch.Generator().manual_seed(2)
    left, right = (
        torch.linalg.qr(torch.randn(side, len(values), generator=generator, dtype=torch.float64))[0]
        for side in (rows, columns)
    )
    return (left * values) @ right.T


def layer(weight: Tensor) -> nn.Sequential:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight)
    return nn.Sequential(linear)


# --- predictions ------------------------------------------------------------------------------------------------------


def test_evaluate_is_the_mean_over_samples_one_by_one() -> None:
    model, (images, labels) = network(), samples()
    found = evaluate(model, batches(images, labels))
    model.eval()
    hits, losses = [], []
    for image, label in zip(images, labels, strict=True):
        probabilities = model(image[None]).softmax(1)[0]
        hits.append(int(probabilities.argmax()) == int(label))
        losses.append(-math.log(probabilities[label].item()))
    assert 0 < found.accuracy < 1
    assert found.accuracy == pytest.approx(sum(hits) / 11, rel=1e-12)
    assert found.loss == pytest.approx(sum(losses) / 11, rel=1e-6)


def test_evaluate_does_not_depend_on_how_samples_are_batched() -> None:
    model, (images, labels) = network(torch.float32), samples(dtype=torch.float32)
    whole = evaluate(model, batches(images, labels, 11))
    for size in (1, 2, 10):
        found = evaluate(model, batches(images, labels, size))
        assert found.accuracy == whole.accuracy
        assert found.loss == pytest.approx(whole.loss, rel=1e-6)


def test_evaluate_adds_up_many_losses_without_losing_small_ones() -> None:
    class Logits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    big = torch.tensor([[0.0, 1e7]]), torch.tensor([0])
    small = torch.zeros(1000, 2), torch.zeros(1000, dtype=torch.int64)
    assert evaluate(Logits(), [big, small]).loss == pytest.approx((1e7 + 1000 * math.log(2)) / 1001, rel=1e-9)


def test_evaluate_makes_no_graph() -> None:
    model, seen = network(), []
    model[-1].register_forward_hook(lambda _module, _inputs, output: seen.append(output.requires_grad))
    evaluate(model, batches(*samples()))
    assert seen == [False] * 3


def test_input_gradient_norms_are_those_of_samples_one_by_one() -> None:
    model, (images, labels) = network(), samples()
    found = input_gradient_norms(model, batches(images, labels))
    assert found.shape == (11,)
    model.eval()
    for image, label, norm in zip(images, labels, found, strict=True):
        x = image[None].clone().requires_grad_()
        nn.functional.cross_entropy(model(x), label[None]).backward()
        assert x.grad is not None
        assert norm.item() == pytest.approx(x.grad.norm().item(), rel=1e-6)


def test_input_gradient_norm_agrees_with_finite_differences() -> None:
    model, (images, labels) = network(), samples(1)
    norm = input_gradient_norms(model, [(images, labels)]).item()
    model.eval()
    x = images.clone().requires_grad_()
    nn.functional.cross_entropy(model(x), labels).backward()
    assert x.grad is not None
    step = 1e-5 * x.grad / x.grad.norm()
    with torch.no_grad():
        ahead, behind = (nn.functional.cross_entropy(model(images + sign * step), labels) for sign in (1, -1))
    assert norm == pytest.approx((ahead - behind).item() / 2e-5, rel=1e-5)


def test_input_gradient_norm_of_a_sure_prediction_is_not_rounded_to_zero() -> None:
    """Of two classes with logits 60 and x·w: the gradient is ``exp(−60)·w``, whose square float32 does not hold."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 2))
    with torch.no_grad():
        model[1].weight[0] = 0.0
        model[1].bias.copy_(torch.tensor([60.0, 0.0]))
    norm = input_gradient_norms(model, [(torch.zeros(1, 2, 2, 2), torch.tensor([0]))])
    assert norm.item() == pytest.approx(math.exp(-60) * model[1].weight[1].norm().item(), rel=1e-5)


def test_input_gradient_norm_is_zero_where_the_input_does_not_matter() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 2))
    nn.init.zeros_(model[1].weight)
    assert input_gradient_norms(model, [(torch.ones(3, 2, 2, 2), torch.tensor([0, 1, 0]))]).tolist() == [0.0] * 3


def test_input_gradient_norms_leave_no_gradient_on_weights_and_images() -> None:
    model, (images, labels) = network(), samples()
    kept = torch.full_like(model[-1].weight, 3.0)
    model[-1].weight.grad = kept.clone()
    with torch.no_grad():
        input_gradient_norms(model, batches(images, labels))
    assert torch.equal(model[-1].weight.grad, kept)
    assert all(param.grad is None for param in model[:-1].parameters())
    assert images.grad is None
    assert not images.requires_grad


@pytest.mark.parametrize("measure", [evaluate, input_gradient_norms])
def test_measuring_restores_the_mode_of_each_module_and_changes_no_buffer(measure: Callable[..., object]) -> None:
    model = network().train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    measure(model, batches(*samples()))
    assert [module.training for module in model.modules()] == [True, True, False, True, True, True, True]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("measure", [evaluate, input_gradient_norms])
def test_measuring_restores_the_mode_after_an_error(measure: Callable[..., object]) -> None:
    model = network().train()
    with pytest.raises(RuntimeError):
        measure(model, [(torch.zeros(1, 3, 5, 5, dtype=torch.float64), torch.tensor([0]))])
    assert model.training
    assert model[1].training


@pytest.mark.parametrize("measure", [evaluate, input_gradient_norms])
def test_measuring_no_samples_is_an_error(measure: Callable[..., object]) -> None:
    empty: Iterator[tuple[Tensor, Tensor]] = iter(())
    with pytest.raises(ValueError, match="batches must hold a sample or more, got none"):
        measure(network(), empty)


def test_generalization_gap_is_the_least_over_epochs_above_the_threshold() -> None:
    train, test = [0.50, 0.90, 0.95, 0.99], [0.49, 0.85, 0.80, 0.86]
    assert generalization_gap(train, test, 0.8) == pytest.approx(0.05)
    assert generalization_gap(train, test, 0.85) == pytest.approx(0.13)
    assert generalization_gap(train, test, 0.1) == pytest.approx(0.01)
    assert generalization_gap([0.8], [0.9], 0.5) == pytest.approx(-0.1)


def test_generalization_gap_is_none_where_no_epoch_is_above_the_threshold() -> None:
    assert generalization_gap([0.9, 0.9], [0.7, math.nan], 0.7) is None
    assert generalization_gap([], [], 0.7) is None


def test_generalization_gap_takes_an_entry_for_each_epoch() -> None:
    with pytest.raises(ValueError, match="an entry for each epoch, got 2 and 1"):
        generalization_gap([0.9, 0.9], [0.7], 0.5)


# --- spectra ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_spectra_are_of_every_weight_that_can_be_controlled(name: str) -> None:
    options = {"width": 16, "depth": 3} if name == "mlp" else {"scale": 0.125}
    model = build(name, (3, 32, 32), 5, **options)
    controlled = [decision.name for decision in specopt.param_groups(model).decisions if decision.matrices]
    assert list(norms(model)) == controlled


def test_spectra_are_those_of_float64_svd_of_flattened_weights() -> None:
    torch.manual_seed(0)
    model = build("lenet5", (1, 28, 28), 10)
    found, cheap, report = spectra(model), norms(model), specopt.spectral_report(specopt.SNRSGD(model, lr=0.0))
    assert found.keys() == cheap.keys() == {row.name for row in report}
    for row in report:
        matrix = model.get_parameter(row.name).detach().double().flatten(1)
        values = torch.linalg.svdvals(matrix)
        spectrum = found[row.name]
        torch.testing.assert_close(spectrum.values, values, rtol=1e-7, atol=3e-8 * values[0].item())
        assert spectrum.sigma == pytest.approx(values[0].item(), rel=1e-9)
        assert spectrum.frobenius == pytest.approx(matrix.norm().item(), rel=1e-12)
        assert spectrum.stable_rank == pytest.approx((values.square().sum() / values[0] ** 2).item(), rel=1e-8)
        assert spectrum.rank == np.linalg.matrix_rank(matrix.float().numpy())
        assert cheap[row.name].sigma == pytest.approx(values[0].item(), rel=1e-5)
        assert cheap[row.name].frobenius == spectrum.frobenius
        assert row.sigma == pytest.approx(cheap[row.name].sigma, rel=1e-4)


ABOVE = EXACT_SIDE + 44
SPECTRA = {
    "smooth": torch.linspace(1, 0.04, ABOVE, dtype=torch.float64).pow(1.5),
    "all equal": torch.ones(ABOVE, dtype=torch.float64),
    "many equal to the first": torch.cat([torch.ones(100), torch.linspace(0.99, 0.1, ABOVE - 100)]).double(),
    "first two 1e-4 apart": torch.cat([torch.tensor([1.0, 0.9999]), torch.linspace(0.9, 0, ABOVE - 2)]).double(),
    "falling": torch.logspace(0, -20, ABOVE, dtype=torch.float64),
    "one": torch.tensor([3.0], dtype=torch.float64),
    "one far above": torch.cat([torch.tensor([1e4]), torch.rand(ABOVE - 1)]).double(),
    "tiny": 1e-25 * torch.linspace(1, 0.5, ABOVE, dtype=torch.float64),
    "huge": 1e25 * torch.linspace(1, 0.5, ABOVE, dtype=torch.float64),
}


@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("turned", [False, True])
def test_sigma_of_norms_is_within_1e_5_of_float64_svd_above_the_exact_side(values: Tensor, turned: bool) -> None:
    matrix = with_spectrum(values, ABOVE, ABOVE + 100).float()
    model = layer(matrix.T.contiguous() if turned else matrix)
    sigma = torch.linalg.svdvals(matrix.double())[0].item()
    assert norms(model)["0.weight"].sigma == pytest.approx(sigma, rel=1e-5)
    assert spectra(model)["0.weight"].sigma == pytest.approx(sigma, rel=1e-9)


def planted(*entries: tuple[int, int]) -> Tensor:
    matrix = torch.zeros(ABOVE, ABOVE)
    for entry in entries:
        matrix[entry] = 1.0
    return matrix


def orthogonal_corner(side: int) -> Tensor:
    """Beside zeros."""
    matrix = torch.zeros(ABOVE, ABOVE)
    matrix[:side, :side] = with_spectrum(torch.ones(side), side, side)
    return matrix


@pytest.mark.parametrize(
    ("matrix", "sigma"),
    [
        (planted((0, 0)), 1.0),
        (planted((ABOVE - 1, 3)), 1.0),
        (planted((0, 0), (0, 1), (1, 0), (1, 1)), 2.0),
        (planted(*((i, 0) for i in range(ABOVE))), ABOVE**0.5),
        (planted(*((0, i) for i in range(ABOVE))), ABOVE**0.5),
        (torch.ones(ABOVE, ABOVE), float(ABOVE)),
        (torch.eye(ABOVE), 1.0),
        (torch.eye(ABOVE).roll(7, 0), 1.0),
        *((torch.eye(ABOVE) + above * planted((5, 5)), 1.0 + above) for above in (1.0, 1e-2, 1e-3, 1e-4, 1e-5)),
        (torch.diag(torch.arange(ABOVE) % 2.0), 1.0),
        *(
            (nn.functional.pad(with_spectrum(torch.ones(few), few, few), [0, ABOVE - few] * 2), 1.0)
            for few in (2, 15, 80)
        ),
    ],
)
def test_sigma_of_norms_is_right_where_few_vectors_span_all(matrix: Tensor, sigma: float) -> None:
    """So that the method's next vector would be rounding error alone."""
    assert norms(layer(matrix))["0.weight"].sigma == pytest.approx(sigma, rel=1e-5)


def test_sigma_of_norms_is_right_where_the_vectors_fill_the_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of matrices too small for the method, nearly orthogonal: rounding errors decide when it ends."""
    monkeypatch.setattr(measures, "EXACT_SIDE", 1)
    generator = torch.Generator().manual_seed(0)
    for trial in range(600):
        rows, columns = 2 + trial % 19, 40 + trial % 53
        matrix = nn.init.orthogonal_(torch.empty(rows, columns), generator=generator)
        matrix[0] *= 1 + 10 ** (-5 * torch.rand((), generator=generator))
        sigma = torch.linalg.svdvals(matrix.double())[0].item()
        assert norms(layer(matrix))["0.weight"].sigma == pytest.approx(sigma, rel=1e-5), trial


def test_norms_draw_no_random_number_and_repeat_themselves() -> None:
    model = layer(torch.randn(ABOVE, ABOVE))
    state = torch.get_rng_state()
    assert norms(model) == norms(model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(7, 7), (40, 60), (60, 40), (300, 500)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_is_that_of_numpy(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Of spectra that fall through the threshold, and of products of two matrices."""
    least = torch.finfo(dtype).eps * max(shape)
    side = min(shape)
    for kept in (1, side // 2, side):
        falling = torch.cat([torch.linspace(1, 3 * least, kept), least / 3 * torch.rand(side - kept)]).double()
        product = torch.randn(shape[0], kept, dtype=dtype) @ torch.randn(kept, shape[1], dtype=dtype)
        for matrix in (with_spectrum(falling, *shape).to(dtype), product):
            assert spectra(layer(matrix))["0.weight"].rank == np.linalg.matrix_rank(matrix.numpy()) == kept


@pytest.mark.parametrize("side", [5, ABOVE])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weight_that_is_not_finite_gives_nan_and_leaves_the_others(side: int, bad: float) -> None:
    model = nn.Sequential(nn.Linear(side, side), nn.Linear(side, side))
    with torch.no_grad():
        model[0].weight[1, 2] = bad
    for found in (norms(model), spectra(model)):
        broken, whole = found["0.weight"], found["1.weight"]
        assert math.isnan(broken.sigma) and math.isnan(broken.frobenius) and math.isnan(broken.stable_rank)
        assert math.isfinite(whole.sigma) and math.isfinite(whole.frobenius) and whole.stable_rank > 1
    spectrum = spectra(model)["0.weight"]
    assert math.isnan(spectrum.rank)
    assert spectrum.values.shape == (side,) and spectrum.values.isnan().all()


@pytest.mark.parametrize("side", [5, ABOVE])
def test_zero_weight_has_norms_and_rank_of_zero_and_no_stable_rank(side: int) -> None:
    model = layer(torch.zeros(side, side + 1))
    spectrum = spectra(model)["0.weight"]
    assert (spectrum.sigma, spectrum.frobenius, spectrum.rank) == (0, 0, 0)
    assert math.isnan(spectrum.stable_rank)
    assert (norms(model)["0.weight"].sigma, norms(model)["0.weight"].frobenius) == (0, 0)


def test_weight_of_16_bits_is_read_as_float32() -> None:
    matrix = torch.randn(12, 20).bfloat16()
    found, exact = spectra(layer(matrix))["0.weight"], torch.linalg.svdvals(matrix.double())
    assert found.sigma == pytest.approx(exact[0].item(), rel=1e-9)
    assert found.rank == 12


def test_compiled_model_has_the_names_of_the_one_it_was_made_from() -> None:
    model = network(torch.float32)
    assert list(norms(torch.compile(model, backend="eager"))) == ["0.weight", "5.weight"]
    assert list(norms(nn.Linear(3, 2))) == ["weight"]
