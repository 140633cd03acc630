"""First and second derivatives of the penalties, by finite differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from specopt.penalties import adversarial, confidence_penalty, double_backprop, fgm, frob_reg, jac_reg, spect_reg
from tests.specopt.penalties.cases import CLASSES, images, labels, smooth_net

pytestmark = pytest.mark.usefixtures("on_device")

SAMPLES = 2
ORDER = 1e-10
"""By which a backward pass may differ from itself: kernels of a GPU add in any order."""
ONE, SEVERAL = images(CLASSES, seed=2), images(2, SAMPLES, CLASSES, seed=3)
PENALTIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "double_backprop": lambda logits, x: double_backprop(logits, x, labels(SAMPLES)),
    "spect_reg": lambda logits, x: spect_reg(logits, x, z=ONE),
    "spect_reg, several normalized": lambda logits, x: spect_reg(logits, x, z=SEVERAL, normalized=True),
    "frob_reg": frob_reg,
    "frob_reg in chunks": lambda logits, x: frob_reg(logits, x, chunk=2),
    "jac_reg": jac_reg,
    "jac_reg in chunks": lambda logits, x: jac_reg(logits, x, chunk=1),
    "confidence_penalty": confidence_penalty,
    "confidence_penalty, published": lambda logits, _: confidence_penalty(logits, reduction="sum", eps=1e-6),
}


LONG = ("frob_reg in chunks", "jac_reg in chunks")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if name in LONG else ()) for name in PENALTIES]
)
def test_first_and_second_derivatives_by_inputs_and_weights_equal_finite_differences(name: str) -> None:
    net = smooth_net()
    names, weights = zip(*net.named_parameters(), strict=True)
    x = images(SAMPLES, 1, 4, 4).requires_grad_()

    def penalty(x: Tensor, *values: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        return PENALTIES[name](functional_call(net, dict(zip(names, values, strict=True)), (x,)), x)

    copies = [weight.detach().clone().requires_grad_() for weight in weights]
    assert gradcheck(penalty, (x, *copies), nondet_tol=ORDER)
    assert gradgradcheck(penalty, (x, *copies), nondet_tol=ORDER)


@pytest.mark.parametrize(("alpha", "fixed"), [(None, True), (0.5, True), (1.0, False)])
def test_derivatives_of_adversarial_by_weights_equal_finite_differences_at_a_fixed_step(
    alpha: float | None, fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is a constant of the weights; finite differences would move it. With alpha = 1 it does not count."""
    net = smooth_net()
    names, weights = zip(*net.named_parameters(), strict=True)
    x = images(SAMPLES, 1, 4, 4)
    if fixed:
        step = images(SAMPLES, 1, 4, 4, seed=5)
        monkeypatch.setattr(fgm, "fgm_step", lambda gradient, epsilon: epsilon * step)

    def penalty(*values: Tensor) -> Tensor:
        def model(x: Tensor) -> Tensor:
            found: Tensor = functional_call(net, dict(zip(names, values, strict=True)), (x,))
            return found

        return adversarial(model, x, labels(SAMPLES), epsilon=0.5, alpha=alpha)

    copies = [weight.detach().clone().requires_grad_() for weight in weights]
    assert gradcheck(penalty, copies, nondet_tol=ORDER)
    assert gradgradcheck(penalty, copies, nondet_tol=ORDER)
