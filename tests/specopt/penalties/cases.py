"""Small networks, and the penalties from Jacobians that are written out sample by sample.

All is drawn on the CPU, so that it is the same everywhere, and then lies on a CUDA device where there is one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.specopt.helpers import DEVICE

CLASSES = 3


def smooth_net(classes: int = CLASSES) -> nn.Sequential:
    """For (B, 1, 4, 4), in float64, with derivatives of all orders."""
    torch.manual_seed(0)
    with torch.device("cpu"):
        net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, classes))
    return net.to(DEVICE).double()


def lenet(
    channels: int = 1, size: int = 12, classes: int = 10, *, norm: bool = False, dropout: float = 0
) -> nn.Sequential:
    """Two convolutions with max-pool and ReLU and a hidden dense layer, for (B, channels, size, size)."""
    torch.manual_seed(0)
    side = ((size - 2) // 2 - 2) // 2
    with torch.device("cpu"):
        net = nn.Sequential(
            nn.Conv2d(channels, 4, 3),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.BatchNorm2d(4) if norm else nn.Identity(),
            nn.Conv2d(4, 6, 3),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(6 * side * side, 16),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(16, classes),
        )
    return net.to(DEVICE)


def images(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(DEVICE, dtype)


def labels(samples: int, classes: int = CLASSES) -> Tensor:
    return torch.arange(samples, device=DEVICE) % classes


def random_state() -> Tensor:
    """Of the generator that draws on the device."""
    return torch.cuda.get_rng_state() if DEVICE.type == "cuda" else torch.get_rng_state()


def jacobians(function: Callable[[Tensor], Tensor], inputs: Tensor) -> list[Tensor]:
    """Of each sample alone: (C, n), differentiable by what the function holds."""
    found = [
        torch.autograd.functional.jacobian(lambda x: function(x[None])[0], sample, create_graph=True)
        for sample in inputs
    ]
    return [jacobian.reshape(len(jacobian), -1) for jacobian in found]


def frobenius(function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """The mean over samples of the Jacobian's squared Frobenius norm."""
    return torch.stack([jacobian.square().sum() for jacobian in jacobians(function, inputs)]).mean()


def gradients(value: Tensor, module: nn.Module) -> list[Tensor]:
    """By every parameter; zeros by those that do not count, and by none of a constant."""
    params = list(module.parameters())
    return list(torch.autograd.grad(value, params, materialize_grads=True)) if params and value.requires_grad else []


def assert_same(value: Tensor, other: Tensor, module: nn.Module) -> None:
    """Two scalars, and their gradients by the module's parameters."""
    torch.testing.assert_close(value, other)
    torch.testing.assert_close(gradients(value, module), gradients(other, module))
