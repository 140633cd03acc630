"""Who is timed: torch's own optimizers, ours, and what else there is to hold spectral norms while training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import SGD, AdamW, Optimizer

import specopt

from .models import groups, matrices

LAMBDA = 0.01
ITERATIONS = 500
"""Power iterations of published Norm Scaling, from a random start, after every step."""


class Training(NamedTuple):
    optimizer: Optimizer
    before: Callable[[], None] | None = None
    """What is done to the gradients before the step, and is timed with it."""
    after: Callable[[], None] | None = None
    """What is done to the weights after it, likewise."""
    penalty: Callable[[], Tensor] | None = None
    """A term of the loss."""

    def step(self) -> None:
        if self.before:
            self.before()
        self.optimizer.step()
        if self.after:
            self.after()


class Peer(NamedTuple):
    name: str
    family: str
    """Of its base optimizer; ratios are taken within a family."""
    build: Callable[[nn.Module], Training]
    """May change the model (parametrizations)."""
    ours: str = ""
    """ "snr", "spectral" or "frobenius"."""
    in_loss: bool = False
    """Its work lies in the forward and backward pass: its step alone tells nothing."""
    slow: bool = False
    """Seconds a step on a CPU: few rounds."""
    package: str = ""
    """What has to be installed."""


def sgd(model: nn.Module, **options: Any) -> SGD:
    return SGD(groups(model), lr=0.01, momentum=0.9, **options)


def adamw(model: nn.Module, **options: Any) -> AdamW:
    return AdamW(groups(model), lr=1e-4, **options)


def snr_sgd(model: nn.Module) -> Training:
    return Training(specopt.SNRSGD(groups(model), lr=0.01, momentum=0.9, snr_lambda=LAMBDA))


def norm_scale_adamw(model: nn.Module, norm: str = "spectral") -> Training:
    return Training(specopt.NormScaleAdamW(groups(model), lr=1e-4, norm=norm))


def spectral_norm_layers(model: nn.Module) -> Training:
    """``torch.nn.utils.parametrizations.spectral_norm`` on every layer: one power iteration in each forward pass."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            parametrizations.spectral_norm(layer)
    return Training(sgd(model))


def svd_penalty(model: nn.Module) -> Training:
    """``λ/2 Σ σ₁²`` in the loss, through a singular value decomposition."""

    def penalty() -> Tensor:
        norms = [torch.linalg.matrix_norm(weight, 2) for weight in matrices(model)]
        return 0.5 * LAMBDA * torch.stack(norms).square().sum()

    return Training(sgd(model), penalty=penalty)


def power_penalty(model: nn.Module) -> Training:
    """``λ/2 Σ ‖W v‖²`` in the loss, v by five power iterations from ones, as the blog post on SNR has it."""

    def penalty() -> Tensor:
        images = [weight @ _direction(weight) for weight in matrices(model)]
        return 0.5 * LAMBDA * torch.stack([image.square().sum() for image in images]).sum()

    return Training(sgd(model), penalty=penalty)


@torch.no_grad()
def _direction(weight: Tensor, iterations: int = 5) -> Tensor:
    v = torch.ones_like(weight[0])
    for _ in range(iterations):
        v = weight.mT @ (weight @ v)
        v = v / v.norm()
    return v


def published_snr(model: nn.Module) -> Training:
    """``λ σ₁ u₁v₁ᵀ`` added to the gradient, by a power iteration a step on a vector that is kept (Yoshida, Miyato)."""
    weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    directions = [torch.randn_like(weight.detach().flatten(1)[0]) for weight in weights]

    @torch.no_grad()
    def before() -> None:
        for weight, v in zip(weights, directions, strict=True):
            assert weight.grad is not None
            matrix = weight.flatten(1)
            u = torch.nn.functional.normalize(matrix @ v, dim=0)
            image = matrix.mT @ u
            sigma = image.norm()
            v.copy_(image / sigma)
            weight.grad.view(len(weight), -1).addr_(u * sigma, v, alpha=LAMBDA)

    return Training(sgd(model), before=before)


def published_norm_scaling(model: nn.Module, iterations: int = ITERATIONS) -> Training:
    """``W ← W + (σ* − σ₁) u₁v₁ᵀ`` after the step, by 500 power iterations from a random start (Norm Scaling, 2023)."""

    @torch.no_grad()
    def after() -> None:
        for weight in matrices(model):
            v = torch.randn_like(weight[0])
            for _ in range(iterations):
                v = weight.mT @ (weight @ v)
                v = v / v.norm()
            image = weight @ v
            sigma = image.norm()
            target = (weight.shape[0] / weight.shape[1]) ** 0.5
            weight.addr_(image / sigma * (target - sigma), v)

    return Training(adamw(model), after=after)


def scion(model: nn.Module) -> Training:
    """Scion of the package pytorch_optimizer, constrained: weights stay within a ball of the spectral norm."""
    from pytorch_optimizer import SCION

    options = {"lr": 1e-4, "momentum": 0.1, "constraint": True}
    return Training(SCION([p for group in groups(model) for p in group["params"]], **options))


def plain(family: str, make: Callable[..., Optimizer]) -> Iterable[Peer]:
    for name, options in (("for-loop", {"foreach": False}), ("foreach", {"foreach": True}), ("fused", {"fused": True})):
        yield Peer(f"{family} {name}", family, lambda model, o=options: Training(make(model, **o)))


PEERS: tuple[Peer, ...] = (
    *plain("SGD", sgd),
    Peer("SNRSGD", "SGD", snr_sgd, ours="snr"),
    Peer("SGD + SNR, one warm power iteration", "SGD", published_snr),
    Peer("SGD + SNR in the loss, 5 power iterations", "SGD", power_penalty, in_loss=True),
    Peer("SGD + SVD penalty in the loss", "SGD", svd_penalty, in_loss=True, slow=True),
    Peer("SGD + torch spectral_norm on layers", "SGD", spectral_norm_layers, in_loss=True),
    Peer("Scion (pytorch_optimizer)", "SGD", scion, package="pytorch_optimizer"),
    *plain("AdamW", adamw),
    Peer("NormScaleAdamW spectral", "AdamW", norm_scale_adamw, ours="spectral"),
    Peer("NormScaleAdamW frobenius", "AdamW", lambda model: norm_scale_adamw(model, "frobenius"), ours="frobenius"),
    Peer(f"AdamW + {ITERATIONS} power iterations", "AdamW", published_norm_scaling, slow=True),
)


def base_of(family: str, gpu: bool) -> str:
    """What ratios are taken to: torch's default on a CPU, the fused kernel on a GPU."""
    return f"{family} {'fused' if gpu else 'for-loop'}"
