"""Where torch.func.vmap fails on a backward pass: norm layers under autocast, and operations that have no rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from specopt.penalties import frob_reg, jac_reg, spect_reg
from tests.specopt.helpers import DEVICE
from tests.specopt.penalties.cases import assert_same, gradients, images, smooth_net

pytestmark = pytest.mark.usefixtures("on_device")

EXACT = [frob_reg, jac_reg]
CLASSES = 5
BODIES: dict[str, Callable[[], list[nn.Module]]] = {
    "batch norm of vectors": lambda: [nn.Flatten(), nn.Linear(16, 16), nn.BatchNorm1d(16)],
    "batch norm of images": lambda: [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.AvgPool2d(2), nn.Flatten()],
    "instance norm": lambda: [
        nn.Conv2d(1, 4, 3, padding=1),
        nn.InstanceNorm2d(4, affine=True),
        nn.AvgPool2d(2),
        nn.Flatten(),
    ],
    "layer norm": lambda: [nn.Flatten(), nn.Linear(16, 16), nn.LayerNorm(16)],
    "group norm": lambda: [nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.AvgPool2d(2), nn.Flatten()],
}


def normed(name: str, *, training: bool) -> nn.Sequential:
    """For (B, 1, 4, 4), with weights and running statistics that are not those of a new network."""
    torch.manual_seed(0)
    with torch.device("cpu"):
        net = nn.Sequential(*BODIES[name](), nn.Tanh(), nn.Linear(16, CLASSES))
    for tensor in (*net[:-1].parameters(), *net.buffers()):
        if tensor.is_floating_point():
            tensor.data.mul_(0.5 + torch.rand_like(tensor))
    return net.to(DEVICE).train(training)


def relative_error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Of all numbers together, in the l2 norm."""
    one, other = (torch.cat([tensor.flatten() for tensor in each]) for each in (found, exact))
    return float((one - other).norm() / other.norm())


def assert_near(penalty: Callable[[nn.Module, Tensor], Tensor], net: nn.Module, dtype: torch.dtype) -> None:
    """Value and gradients under autocast of the dtype, to eight of its roundings, to those in float32."""
    x = images(6, 1, 4, 4, dtype=torch.float32)
    exact = penalty(net, x)
    with torch.autocast(DEVICE.type, dtype):
        found = penalty(net, x)
    allowed = 8 * torch.finfo(dtype).eps
    assert found.dtype == torch.float32
    assert 0 < abs(found.item() - exact.item()) < allowed * exact.item()
    assert relative_error(gradients(found, net), gradients(exact, net)) < allowed


@pytest.mark.parametrize("penalty", EXACT)
@pytest.mark.parametrize(
    ("dtype", "chunk"),
    [(torch.bfloat16, None), (torch.bfloat16, 2), (torch.bfloat16, 1), (torch.float16, None)],
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BODIES)
def test_exact_penalties_of_norm_layers_under_autocast_are_near_those_in_float32(
    name: str, training: bool, dtype: torch.dtype, chunk: int | None, penalty: Callable[..., Tensor]
) -> None:
    assert_near(lambda net, x: penalty(net, x, chunk=chunk), normed(name, training=training), dtype)


@pytest.mark.parametrize("name", BODIES)
def test_several_projections_of_norm_layers_under_autocast_are_near_those_in_float32(name: str) -> None:
    z = images(3, 6, CLASSES, seed=2)
    assert_near(lambda net, x: spect_reg(net, x, z=z), normed(name, training=True), torch.bfloat16)


class Looking(torch.autograd.Function):
    """The identity, whose backward pass decides by the gradient's numbers, which vmap refuses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient if gradient.isfinite().all() else torch.full_like(gradient, torch.nan)


@pytest.mark.parametrize("penalty", EXACT)
@pytest.mark.parametrize("chunk", [None, 2])
def test_an_operation_that_vmap_refuses_is_differentiated_class_by_class(
    penalty: Callable[..., Tensor], chunk: int | None
) -> None:
    net, x = smooth_net(), images(4, 1, 4, 4)
    looking = nn.Sequential(net[:3], nn.Module(), net[3])
    looking[1].forward = Looking.apply
    assert_same(penalty(looking, x, chunk=chunk), penalty(net, x), net)


def failing(error: Exception) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """A model whose backward pass raises this, and the gradients that reached it until then."""
    net, reached = smooth_net(), []

    def fail(gradient: Tensor) -> None:
        reached.append(gradient)
        raise error

    def model(x: Tensor) -> Tensor:
        logits: Tensor = net(x)
        logits.register_hook(fail)
        return logits

    return model, reached


def test_an_error_that_is_not_that_of_vmap_reaches_the_caller() -> None:
    model, reached = failing(RuntimeError("of its own"))
    with pytest.raises(RuntimeError, match="of its own"):
        frob_reg(model, images(4, 1, 4, 4))
    assert len(reached) == 2


def test_memory_that_there_is_not_is_asked_for_once() -> None:
    model, reached = failing(torch.OutOfMemoryError("no more"))
    with pytest.raises(torch.OutOfMemoryError, match="no more"):
        frob_reg(model, images(4, 1, 4, 4))
    assert len(reached) == 1
