"""What every penalty computes, against Jacobians that are written out and closed forms, in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from specopt.penalties import confidence_penalty, cross_entropy, double_backprop, frob_reg, jac_reg, spect_reg
from tests.specopt.penalties.cases import (
    CLASSES,
    assert_same,
    frobenius,
    gradients,
    images,
    jacobians,
    labels,
    lenet,
    smooth_net,
)

pytestmark = pytest.mark.usefixtures("on_device")

NETS = {
    "smooth": (smooth_net, (4, 1, 4, 4), CLASSES),
    "lenet": (lambda: lenet().double(), (4, 1, 12, 12), 10),
    "one sample": (smooth_net, (1, 1, 4, 4), CLASSES),
    "two classes": (lambda: smooth_net(2), (3, 1, 4, 4), 2),
    "one class": (lambda: smooth_net(1), (3, 1, 4, 4), 1),
    "vectors": (lambda: nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 4)).double(), (3, 5), 4),
    "numbers": (lambda: nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 3), nn.Tanh()).double(), (5,), 3),
    "identity": (lambda: nn.Sequential(nn.Identity()), (3, 4), 4),
    "layer norm": (
        lambda: nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 4)).double(),
        (3, 5),
        4,
    ),
    "attention": (lambda: Sequences(nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)), (2, 3, 6), 4),
    "recurrent": (lambda: Sequences(nn.GRU(6, 6, batch_first=True)), (2, 3, 6), 4),
    "eval-mode norm": (lambda: lenet(norm=True).double().eval(), (3, 1, 12, 12), 10),
}


class Sequences(nn.Module):
    """Logits of the mean over positions; attention and recurrence by the kernels that have second derivatives."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body.double(), nn.Linear(6, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
            found = self.body(x)
        states: Tensor = found[0] if isinstance(found, tuple) else found
        logits: Tensor = self.head(states.mean(1))
        return logits


def probabilities(net: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = net(x).softmax(1)
    return found


@pytest.fixture(params=NETS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Tensor]:
    make, shape, classes = NETS[request.param]
    return make(), images(*shape), labels(shape[0], classes)


def test_frob_reg_and_its_gradient_equal_those_of_explicit_jacobians(case: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, _ = case
    assert_same(frob_reg(net, x), frobenius(net, x), net)


def test_jac_reg_and_its_gradient_equal_those_of_explicit_jacobians(case: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, _ = case
    assert_same(jac_reg(net, x), frobenius(lambda s: probabilities(net, s), x), net)


def test_double_backprop_and_its_gradient_equal_those_of_a_gradient_a_sample(
    case: tuple[nn.Module, Tensor, Tensor],
) -> None:
    net, x, targets = case
    terms = []
    for sample, target in zip(x, targets, strict=True):
        point = sample[None].clone().requires_grad_()
        loss = F.cross_entropy(net(point), target[None])
        terms.append(torch.autograd.grad(loss, point, create_graph=True)[0].square().sum())
    assert_same(double_backprop(net, x, targets), torch.stack(terms).mean(), net)


@pytest.mark.parametrize("kind", ["one", "per sample", "several"])
@pytest.mark.parametrize("normalized", [False, True])
def test_spect_reg_of_given_projections_equals_that_of_explicit_jacobians(kind: str, normalized: bool) -> None:
    net, x = smooth_net(), images(4, 1, 4, 4)
    z = images(*{"one": (CLASSES,), "per sample": (4, CLASSES), "several": (5, 4, CLASSES)}[kind], seed=2)
    unit = z / z.norm(dim=-1, keepdim=True) if normalized else z
    each = unit.expand(unit.shape if unit.dim() == 3 else (1, 4, CLASSES))
    found = [(z_k[i] @ jacobian).square().sum() for z_k in each for i, jacobian in enumerate(jacobians(net, x))]
    assert_same(spect_reg(net, x, z=z, normalized=normalized), torch.stack(found).mean(), net)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_normalized_projections_have_length_one_whatever_their_scale(scale: float) -> None:
    linear, x, z = nn.Linear(5, 4), images(6, 5, dtype=torch.float32), images(4, seed=3, dtype=torch.float32)
    expected = (z / z.norm() @ linear.weight).square().sum()
    assert_same(spect_reg(linear, x, z=scale * z, normalized=True), expected, linear)


def test_double_backprop_of_a_linear_model_is_its_closed_form() -> None:
    """The gradient of the cross entropy by the input is W^T (p − e_y)."""
    linear, x, targets = nn.Linear(5, 4).double(), images(6, 5), labels(6, 4)
    error = linear(x).softmax(1) - F.one_hot(targets, 4)
    assert_same(double_backprop(linear, x, targets), (error @ linear.weight).square().sum(1).mean(), linear)


def test_norms_of_a_linear_model_are_their_closed_forms() -> None:
    linear, x = nn.Linear(5, 4).double(), images(6, 5)
    z = images(4, seed=3)
    p = linear(x).softmax(1)
    of_softmax = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    assert_same(frob_reg(linear, x), linear.weight.square().sum(), linear)
    assert_same(spect_reg(linear, x, z=z), (z @ linear.weight).square().sum(), linear)
    assert_same(jac_reg(linear, x), (of_softmax @ linear.weight).square().sum((1, 2)).mean(), linear)


def almost_certain(gap: float) -> tuple[nn.Linear, Tensor, Tensor]:
    """A network whose class 0 is that far above the others, in float32, inputs, and targets of class 0."""
    linear = nn.Linear(6, 4)
    with torch.no_grad():
        linear.bias.copy_(torch.tensor([gap, 0.0, 0.5, -0.3]))
    return linear, images(8, 6, dtype=torch.float32), torch.zeros(8, dtype=torch.int64)


@pytest.mark.parametrize("gap", [5, 10, 17, 30])
@pytest.mark.parametrize("name", ["jac_reg", "double_backprop"])
def test_penalties_of_an_almost_certain_prediction_keep_their_digits_in_float32(name: str, gap: float) -> None:
    """Whose 1 − p, from a gap of 17 on, is less than the rounding of p."""
    linear, x, targets = almost_certain(gap)
    penalty = jac_reg if name == "jac_reg" else lambda net, x: double_backprop(net, x, targets)
    precise = copy.deepcopy(linear).double()
    value, exact = penalty(linear, x), penalty(precise, x.double())
    assert value.item() == pytest.approx(exact.item(), rel=1e-5, abs=0)
    found, expected = gradients(value, linear)[0].double(), gradients(exact, precise)[0]
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("gap", [5, 10, 17, 30])
def test_cross_entropy_of_an_almost_certain_prediction_keeps_its_digits_in_float32(gap: float) -> None:
    linear, x, targets = almost_certain(gap)
    logits = linear(x).detach()
    odds = logits[:, 1:].double().logsumexp(1) - logits[:, 0]
    torch.testing.assert_close(cross_entropy(logits, targets).double(), F.softplus(odds), rtol=1e-5, atol=0)


def test_cross_entropy_and_its_derivatives_are_torchs_for_logits_of_any_size() -> None:
    scales = torch.logspace(-2, 3, 500, dtype=torch.float64)[:, None]
    logits = torch.cat([images(500, 5) * scales, torch.tensor([[0, -torch.inf, 1, 1, 1], [2, *4 * [-torch.inf]]])])
    logits, targets = logits.requires_grad_(), torch.cat([labels(500, 5), torch.tensor([1, 0])])
    found = []
    for loss in (cross_entropy(logits, targets), F.cross_entropy(logits, targets, reduction="none")):
        (first,) = torch.autograd.grad(loss.sum(), logits, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), logits)
        found.append((loss, first, second))
    torch.testing.assert_close(*found)
    for wrong in (torch.nan, torch.inf):
        assert cross_entropy(torch.tensor([[wrong, 0.0]]), torch.tensor([0])).isnan()


def test_another_loss_is_that_of_each_sample() -> None:
    net, x = smooth_net(), images(4, 1, 4, 4)
    targets = images(4, CLASSES, seed=3)

    def squared_error(logits: Tensor, wanted: Tensor) -> Tensor:
        return (logits - wanted).square().sum(1)

    terms = [
        (2 * (net(x[i : i + 1])[0] - targets[i]) @ jacobian).square().sum()
        for i, jacobian in enumerate(jacobians(net, x))
    ]
    assert_same(double_backprop(net, x, targets, loss=squared_error), torch.stack(terms).mean(), net)


def test_a_loss_scaled_by_s_gives_s_squared_times_the_penalty() -> None:
    net, x, targets = smooth_net(), images(4, 1, 4, 4), labels(4)
    scaled = double_backprop(net, x, targets, loss=lambda logits, wanted: 8 * cross_entropy(logits, wanted))
    torch.testing.assert_close(scaled, 64 * double_backprop(net, x, targets))


def test_confidence_penalty_is_minus_the_mean_entropy() -> None:
    logits = images(6, 5).requires_grad_()
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(confidence_penalty(logits), -entropy.mean())
    torch.testing.assert_close(confidence_penalty(logits, reduction="sum"), -entropy.sum())


def test_confidence_penalty_with_the_published_options_is_the_published_formula() -> None:
    logits = images(6, 5) * 20
    p = logits.softmax(1)
    published = (p * (p + 1e-6).log()).sum()
    torch.testing.assert_close(confidence_penalty(logits, reduction="sum", eps=1e-6), published)
    assert 0 < float(published - confidence_penalty(logits, reduction="sum")) < 6 * 5 * 1e-6


def test_confidence_penalty_is_exact_for_uniform_and_for_certain_predictions() -> None:
    uniform, certain = torch.zeros(2, 7), torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    assert confidence_penalty(uniform).item() == pytest.approx(-math.log(7))
    found = confidence_penalty(certain)
    (gradient,) = torch.autograd.grad(found, certain)
    assert found.item() == 0 and gradient.count_nonzero() == 0


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_a_masked_class_leaves_the_confidence_penalty_and_its_derivatives_of_the_others(eps: float) -> None:
    """The others' alone, as the mask adds 0 to the sum and nothing to a gradient of the first or second order."""

    def derivatives(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value = confidence_penalty(logits, eps=eps)
        (first,) = torch.autograd.grad(value, logits, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), logits)
        return value, first, second

    others = images(3, 4).requires_grad_()
    masked = torch.cat([others.detach(), torch.full((3, 1), -torch.inf, dtype=torch.float64)], dim=1).requires_grad_()
    value, first, second = derivatives(masked)
    torch.testing.assert_close((value, first[:, :4], second[:, :4]), derivatives(others))
    assert not first[:, 4].any() and not second[:, 4].any()


def test_an_eps_below_the_numbers_of_the_precision_is_none() -> None:
    logits = torch.tensor([[0.0, 1.0, -200.0]], requires_grad=True)
    found, expected = confidence_penalty(logits, eps=1e-50), confidence_penalty(logits)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits))


def test_the_confidence_penalty_of_logits_that_are_no_distribution_is_nan() -> None:
    for wrong in ([0.0, torch.nan], [0.0, torch.inf], [-torch.inf, -torch.inf]):
        assert confidence_penalty(torch.tensor([[1.0, 2.0], wrong])).isnan()


@pytest.mark.parametrize("penalty", [frob_reg, jac_reg, spect_reg, confidence_penalty])
def test_logits_and_model_give_the_same(penalty: object) -> None:
    assert callable(penalty)
    net, x = smooth_net(), images(4, 1, 4, 4)
    torch.manual_seed(5)
    of_model = penalty(net, x)
    inputs = x.clone().requires_grad_()
    torch.manual_seed(5)
    assert_same(of_model, penalty(net(inputs), inputs), net)
    assert not x.requires_grad and x.grad is None


@pytest.mark.parametrize("penalty", [frob_reg, jac_reg, spect_reg, confidence_penalty])
@pytest.mark.parametrize("given", ["model", "logits"])
def test_targets_are_taken_and_not_looked_at_where_none_are_needed(penalty: Callable[..., Tensor], given: str) -> None:
    net, x = smooth_net(), images(4, 1, 4, 4).requires_grad_()
    output = net if given == "model" else net(x)
    options = {"generator": torch.Generator().manual_seed(0)} if penalty is spect_reg else {}
    values = []
    for targets in ((), (labels(4),), (labels(4) - 100,), (None,)):
        for generator in options.values():
            generator.manual_seed(0)
        values.append(penalty(output, x, *targets, **options))
    assert len({value.item() for value in values}) == 1


def test_logits_and_model_give_the_same_double_backprop() -> None:
    net, x, targets = smooth_net(), images(4, 1, 4, 4), labels(4)
    inputs = x.clone().requires_grad_()
    assert_same(double_backprop(net, x, targets), double_backprop(net(inputs), inputs, targets), net)


def test_inputs_may_be_computed_from_others_and_pass_the_gradient_on() -> None:
    net, x = smooth_net(), images(4, 1, 4, 4).requires_grad_()
    inputs = torch.tanh(x)
    (found,) = torch.autograd.grad(frob_reg(net(inputs), inputs), x)
    (expected,) = torch.autograd.grad(frobenius(net, torch.tanh(x)), x)
    torch.testing.assert_close(found, expected)


def test_logits_of_another_output_of_the_node_that_made_the_inputs_do_not_depend_on_them() -> None:
    net, pair = smooth_net(), images(2, 4, 1, 4, 4).requires_grad_()
    inputs, others = (2 * pair).unbind()
    assert inputs.grad_fn is others.grad_fn
    torch.testing.assert_close(frob_reg(net(inputs), inputs), frobenius(net, 2 * pair[0]))
    with pytest.raises(ValueError, match="output does not depend on inputs"):
        frob_reg(net(others), inputs)
