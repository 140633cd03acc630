"""What the penalties refuse, by name, and before the model runs wherever that can be known.

On the CPU: what is refused is the same elsewhere, except that the values of targets and projections are looked at here
alone, and that a class out of range stops a CUDA device for good."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from specopt.penalties import (
    adversarial,
    confidence_penalty,
    cross_entropy,
    double_backprop,
    fgm_step,
    frob_reg,
    jac_reg,
    spect_reg,
)

X = torch.ones(4, 6)
TARGETS = torch.tensor([0, 1, 2, 0])
BY_INPUTS: dict[str, Callable[[Any, Any], Tensor]] = {
    "double_backprop": lambda output, x: double_backprop(output, x, TARGETS),
    "spect_reg": spect_reg,
    "frob_reg": frob_reg,
    "jac_reg": jac_reg,
    "adversarial": lambda output, x: adversarial(output, x, TARGETS, epsilon=1.0),
}
FROM_LOGITS = {name: penalty for name, penalty in BY_INPUTS.items() if name != "adversarial"}


def net() -> nn.Module:
    return nn.Linear(6, 3)


def not_called(_: Tensor) -> Tensor:
    raise AssertionError("the model must not run")


def logits_of_inputs() -> tuple[Tensor, Tensor]:
    x = X.clone().requires_grad_()
    return net()(x), x


# --- modes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BY_INPUTS)
def test_no_grad_and_inference_mode_around_the_call_are_refused(name: str) -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"cannot be called under torch\.no_grad\(\)"):
        BY_INPUTS[name](not_called, X)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"cannot be called under torch\.inference_mode\(\)"):
        BY_INPUTS[name](not_called, X)


def test_confidence_penalty_is_a_number_under_no_grad_and_inference_mode() -> None:
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert not confidence_penalty(net(), X).requires_grad


@pytest.mark.parametrize("name", BY_INPUTS)
def test_inputs_from_inference_mode_are_refused(name: str) -> None:
    with torch.inference_mode():
        x = X.clone()
    with pytest.raises(ValueError, match=r"inputs must not come from torch\.inference_mode\(\): clone them outside"):
        BY_INPUTS[name](not_called, x)


@pytest.mark.parametrize("hold", [lambda x: x, lambda x: {"x": x}, lambda x: [X, (x, 1)]])
def test_inputs_from_inference_mode_are_refused_by_the_confidence_penalty_too_unless_it_is_a_number(
    hold: Callable[[Tensor], Any],
) -> None:
    with torch.inference_mode():
        x = X.clone()
    with pytest.raises(ValueError, match=r"inputs must not come from torch\.inference_mode\(\): clone them outside"):
        confidence_penalty(not_called, hold(x))
    with torch.no_grad():
        assert not confidence_penalty(lambda _: net()(x), hold(x)).requires_grad


@pytest.mark.parametrize("penalty", [double_backprop, functools.partial(adversarial, epsilon=1.0)])
def test_targets_from_inference_mode_are_refused_before_the_model_runs(penalty: Callable[..., Tensor]) -> None:
    with torch.inference_mode():
        targets, soft = TARGETS.clone(), torch.ones(4, 3)
    message = r"targets must not come from torch\.inference_mode\(\): clone them outside of it"
    with pytest.raises(ValueError, match=message):
        penalty(not_called, X, targets)
    with pytest.raises(ValueError, match=message):
        penalty(not_called, X, soft, loss=lambda logits, wanted: (logits * wanted).sum(1))


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "grad": lambda value: torch.func.grad(value)(torch.ones(3, 6)),
    "vmap": lambda value: torch.func.vmap(value)(torch.ones(2, 3, 6)),
    "jvp": lambda value: torch.func.jvp(value, (torch.ones(3, 6),), (torch.ones(3, 6),)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", BY_INPUTS)
def test_a_call_inside_a_transform_of_torch_func_is_refused(name: str, transform: str) -> None:
    x = X.clone().requires_grad_()
    outputs: list[Callable[[Tensor], Any]] = [lambda weight: not_called]
    if name in FROM_LOGITS:
        outputs.append(lambda weight: x @ weight.t())
    for output in outputs:
        with pytest.raises(RuntimeError, match=r"cannot be called inside torch\.func\.grad, vmap or another"):
            TRANSFORMS[transform](lambda weight, output=output: BY_INPUTS[name](output(weight), x))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_confidence_penalty_may_be_called_inside_a_transform_of_torch_func(transform: str) -> None:
    TRANSFORMS[transform](lambda weight: confidence_penalty(X @ weight.t()))


# --- inputs and logits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BY_INPUTS)
@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (X.long(), TypeError, r"inputs must be a tensor of floating point numbers, got torch\.int64"),
        (X.to(torch.complex64), TypeError, r"inputs must be a tensor of floating point numbers, got torch\.complex64"),
        ([1.0, 2.0], TypeError, "inputs must be a tensor of floating point numbers, got list"),
        (X[:0], ValueError, r"inputs must be \(B, \.\.\.\) with at least one sample, got \(0, 6\)"),
        (torch.tensor(1.0), ValueError, r"inputs must be \(B, \.\.\.\) with at least one sample, got \(\)"),
    ],
)
def test_inputs_without_a_gradient_or_a_sample_are_refused(
    name: str, inputs: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        BY_INPUTS[name](not_called, inputs)


@pytest.mark.parametrize("name", FROM_LOGITS)
def test_given_logits_need_inputs_that_require_grad(name: str) -> None:
    with pytest.raises(ValueError, match=r"inputs must require grad where output is logits: .* inputs\.requires_grad_"):
        FROM_LOGITS[name](net()(X), X)


@pytest.mark.parametrize("name", FROM_LOGITS)
def test_logits_that_do_not_depend_on_the_inputs_are_refused(name: str) -> None:
    logits, x = logits_of_inputs()
    others = {
        "detached": logits.detach(),
        "of another tensor": net()(X.clone().requires_grad_()),
        "before requires_grad_": net()(X),
        "under no_grad": torch.no_grad()(net())(x),
        "under inference_mode": torch.inference_mode()(net())(x),
    }
    for other in others.values():
        with pytest.raises(ValueError, match="output does not depend on inputs by operations with a gradient"):
            FROM_LOGITS[name](other, x)


@pytest.mark.parametrize("name", BY_INPUTS)
def test_a_model_that_cuts_the_gradient_is_refused(name: str) -> None:
    linear = net()
    for model in (lambda x: linear(x.detach()), torch.no_grad()(linear), torch.inference_mode()(linear)):
        with pytest.raises(ValueError, match="output does not depend on inputs by operations with a gradient"):
            BY_INPUTS[name](model, X)


@pytest.mark.parametrize("name", [*BY_INPUTS, "confidence_penalty"])
@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda x: (x, x), TypeError, r"one tensor of floating point logits \(B, C\), got tuple"),
        (lambda x: x.sum(1), ValueError, r"logits \(B, C\) with at least one sample and one class, got \(4,\)"),
        (lambda x: x[:, :, None], ValueError, r"logits \(B, C\) .* got \(4, 6, 1\)"),
        (lambda x: x[:, :0], ValueError, r"logits \(B, C\) .* got \(4, 0\)"),
        (lambda x: x[:3], ValueError, r"output has 3 samples, but inputs are \(4, 6\)"),
        (lambda x: x.argmax(1, keepdim=True), TypeError, r"floating point logits \(B, C\), got torch\.int64"),
    ],
)
def test_what_are_no_logits_are_refused(name: str, model: Any, error: type[Exception], message: str) -> None:
    penalty = BY_INPUTS.get(name, confidence_penalty)
    with pytest.raises(error, match=message):
        penalty(model, X)


@pytest.mark.parametrize("name", [*BY_INPUTS, "confidence_penalty"])
def test_what_is_neither_logits_nor_a_callable_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=r"(output|model) must be .*callable.*, got str"):
        BY_INPUTS.get(name, confidence_penalty)("logits", X)


def test_adversarial_takes_no_logits() -> None:
    with pytest.raises(TypeError, match="model must be a callable that computes logits, got Tensor"):
        adversarial(X, X, TARGETS, epsilon=1.0)  # type: ignore[arg-type]


def test_confidence_penalty_of_a_model_needs_inputs_of_any_type_the_model_takes() -> None:
    with pytest.raises(ValueError, match="inputs must be given where output is a callable"):
        confidence_penalty(net())
    assert confidence_penalty(nn.Embedding(7, 3), torch.tensor([1, 2])).requires_grad
    linear = net()
    for inputs in ({"x": X}, (X, X), [X]):
        found = confidence_penalty(lambda given: linear(given["x"] if isinstance(given, dict) else given[0]), inputs)
        torch.testing.assert_close(found, confidence_penalty(linear, X))


# --- targets and losses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [double_backprop, lambda *given: adversarial(*given, epsilon=1.0)])
@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ([0, 1, 2, 0], TypeError, "targets must be a tensor, got list"),
        (TARGETS[:3], ValueError, r"targets must be as many as inputs, 4, got \(3,\)"),
        (torch.tensor(1), ValueError, r"targets must be as many as inputs, 4, got \(\)"),
        (TARGETS.float(), TypeError, r"targets must be class indices of torch\.int64, or loss= be given, got torch\.f"),
        (TARGETS.int(), TypeError, r"targets must be class indices of torch\.int64, or loss= be given, got torch\.int"),
        (TARGETS[:, None], ValueError, r"targets must be \(B,\) class indices, or loss= be given, got \(4, 1\)"),
    ],
)
def test_targets_that_are_no_class_indices_are_refused_before_the_model_runs(
    penalty: Callable[..., Tensor], targets: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        penalty(not_called, X, targets)


@pytest.mark.parametrize("penalty", [double_backprop, lambda *given: adversarial(*given, epsilon=1.0)])
@pytest.mark.parametrize("wrong", [-1, 3, -100])
def test_targets_out_of_range_are_refused(penalty: Callable[..., Tensor], wrong: int) -> None:
    targets = TARGETS.clone()
    targets[2] = wrong
    with pytest.raises(ValueError, match=f"targets must be class indices from 0 to 2, got {wrong}"):
        penalty(net(), X, targets)


@pytest.mark.parametrize("wrong", [-1, 3, -100])
def test_cross_entropy_itself_ignores_no_target(wrong: int) -> None:
    """What refuses it on a device, where the penalties do not look at targets."""
    targets = TARGETS.clone()
    targets[2] = wrong
    with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
        cross_entropy(net()(X), targets)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda g, t: cross_entropy(g, t).mean(), r"loss must return a loss a sample, shape \(4,\), got \(\)"),
        (lambda g, t: g, r"loss must return a loss a sample, shape \(4,\), got \(4, 3\)"),
        (lambda g, t: 0.5, r"loss must return a loss a sample, shape \(4,\), got float"),
        (lambda g, t: cross_entropy(g.detach(), t), "loss must return what depends on the logits"),
    ],
)
def test_a_loss_that_is_not_one_number_a_sample_is_refused(loss: Any, message: str) -> None:
    for penalty in (double_backprop, lambda *given, **named: adversarial(*given, epsilon=1.0, **named)):
        with pytest.raises(ValueError, match=message):
            penalty(net(), X, TARGETS, loss=loss)


# --- options --------------------------------------------------------------------------------------------------------

COUNT = "must be an integer of at least 1, got"


@pytest.mark.parametrize("wrong", [0, -1, 2.0, True, "4"])
def test_counts_below_one_are_refused_before_the_model_runs(wrong: Any) -> None:
    for penalty in (frob_reg, jac_reg):
        for name in ("chunk", "max_bytes"):
            with pytest.raises(ValueError, match=f"{name} {COUNT} {wrong!r}"):
                penalty(not_called, X, **{name: wrong})
    with pytest.raises(ValueError, match=f"projections {COUNT} {wrong!r}"):
        spect_reg(not_called, X, projections=wrong)


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf"), "1", True, None])
def test_epsilon_and_eps_that_are_no_finite_numbers_of_at_least_zero_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="epsilon must be a finite number of at least 0, got"):
        adversarial(not_called, X, TARGETS, epsilon=wrong)
    with pytest.raises(ValueError, match="epsilon must be a finite number of at least 0, got"):
        fgm_step(X, wrong)
    with pytest.raises(ValueError, match="eps must be a finite number of at least 0, got"):
        confidence_penalty(not_called, X, eps=wrong)


def test_numbers_of_numpy_are_numbers() -> None:
    model = net()
    torch.testing.assert_close(
        adversarial(model, X, TARGETS, epsilon=np.float32(0.5)), adversarial(model, X, TARGETS, epsilon=0.5)
    )
    torch.testing.assert_close(frob_reg(model, X, chunk=np.int64(2)), frob_reg(model, X, chunk=2))


@pytest.mark.parametrize("wrong", [-0.1, 1.5, float("nan"), "1"])
def test_alpha_out_of_range_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="alpha must be a finite number from 0 to 1, got"):
        adversarial(not_called, X, TARGETS, epsilon=1.0, alpha=wrong)


def test_another_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', got 'none'"):
        confidence_penalty(not_called, X, reduction="none")  # type: ignore[arg-type]


@pytest.mark.parametrize("gradient", [X.long(), [1.0]])
def test_fgm_step_of_what_is_no_gradient_is_refused(gradient: Any) -> None:
    with pytest.raises(TypeError, match="gradient must be a tensor of floating point numbers, got"):
        fgm_step(gradient, 1.0)


@pytest.mark.parametrize("shape", [(), (0, 3), (3, 0)])
def test_fgm_step_of_no_numbers_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"gradient must be \(B, \.\.\.\) with at least one number"):
        fgm_step(torch.zeros(shape), 1.0)


@pytest.mark.parametrize("shape", [(), (4,), (3, 4), (3, 3), (1, 3), (2, 3, 3), (0, 4, 3), (1, 2, 4, 3)])
def test_projections_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"z must be \(3,\), \(4, 3\) or \(n, 4, 3\) for logits \(4, 3\), got"):
        spect_reg(net(), X, z=torch.ones(shape))


@pytest.mark.parametrize(
    ("name", "option"),
    [("per_sample", True), ("projections", 2), ("generator", torch.Generator())],
)
def test_given_projections_beside_an_option_of_the_draw_are_refused(name: str, option: Any) -> None:
    with pytest.raises(ValueError, match=f"z takes the place of what is drawn, so that {name} cannot be given"):
        spect_reg(not_called, X, z=torch.ones(3), **{name: option})


@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 4, 3)])
def test_a_given_projection_of_zeros_cannot_be_normalized(shape: tuple[int, ...]) -> None:
    z = torch.ones(shape)
    z[(*(-1 for _ in shape[1:]),)] = 0
    with pytest.raises(ValueError, match=r"z must have a length other than 0 in each projection .* got zeros"):
        spect_reg(net(), X, z=z, normalized=True)
    assert spect_reg(net(), X, z=z).isfinite()


def test_projections_or_a_generator_of_another_type_are_refused() -> None:
    with pytest.raises(TypeError, match=r"z must be a tensor of floating point numbers, got torch\.int64"):
        spect_reg(not_called, X, z=torch.ones(3).long())
    with pytest.raises(TypeError, match="z must be a tensor of floating point numbers, got list"):
        spect_reg(not_called, X, z=[1.0, 2.0, 3.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator, got int"):
        spect_reg(not_called, X, generator=0)  # type: ignore[arg-type]
    with torch.inference_mode():
        z = torch.ones(3)
    with pytest.raises(ValueError, match=r"z must not come from torch\.inference_mode\(\)"):
        spect_reg(not_called, X, z=z)


def test_logits_whose_graph_is_used_up_are_refused_by_torch() -> None:
    x = X.clone().requires_grad_()
    logits = nn.Sequential(net(), nn.Tanh())(x)
    logits.sum().backward()
    with pytest.raises(RuntimeError, match="a second time"):
        frob_reg(logits, x)
