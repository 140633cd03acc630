"""The guide's rules, its two networks, and their training side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from guide_data import Data
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from tqdm import tqdm

import specopt
from specopt import Compose, NormScale, SpectralDecay, SpectralPenalty

BATCH, ADAMW_LR, SGD_LR, MOMENTUM = 128, 1e-3, 0.05, 0.9
CHANNELS = 80
COLD = 20
"""First steps of a weight, in which the tracker makes more products: they are not timed."""

Rule = SpectralPenalty | SpectralDecay | NormScale | Compose


class Control(NamedTuple):
    """A line of the table: one network's training under one rule."""

    name: str
    rule: Rule | None
    base: str = "AdamW"
    network: str = "mlp"
    target: str | None = None
    """What of the spectrum the target is of: ``"sigma"``, or ``"rms"``, the root mean square."""
    figure: str = ""
    """The file's name; without one it is drawn in those of the others."""
    conv: str = "matrix"

    @property
    def plain(self) -> str:
        """The control to compare with: its network and base without a rule."""
        return next(c.name for c in CONTROLS if c.rule is None and (c.base, c.network) == (self.base, self.network))


PENALTY_AND_CAP = Compose(SpectralPenalty(1.0), NormScale(mode="cap"))
CONTROLS = (
    Control("AdamW", None, figure="none"),
    Control("SGD", None, "SGD"),
    Control("penalty, λ = 0.1", SpectralPenalty(0.1), "SGD", figure="penalty"),
    Control("decay, λ = 10", SpectralDecay(10.0), figure="decay"),
    Control("set, rank 1", NormScale(), target="sigma", figure="set"),
    Control("rescale", NormScale(mode="rescale"), target="sigma", figure="rescale"),
    Control("Frobenius", NormScale(norm="frobenius"), target="rms", figure="frobenius"),
    Control("cap, rank 1", NormScale(mode="cap"), target="sigma", figure="cap-1"),
    Control("cap, rank 16", NormScale(mode="cap", rank=16), target="sigma", figure="cap-16"),
    Control('cap, rank "full"', NormScale(mode="cap", rank="full"), target="sigma", figure="cap-full"),
    Control("penalty and cap", PENALTY_AND_CAP, target="sigma", figure="penalty-and-cap"),
    Control("AdamW (conv)", None, network="conv"),
    Control("cap of the matrix", NormScale(mode="cap"), "AdamW", "conv", "sigma", "conv-matrix"),
    Control("cap of the operator", NormScale(mode="cap"), "AdamW", "conv", "sigma", "conv-operator", "operator"),
)


@dataclass
class Trained:
    """What is kept of a control. Spectra are of the network's chosen layer, largest first, in float64; a convolution's
    are those of the map that it makes, whatever is controlled."""

    control: Control
    before: Tensor
    after: Tensor
    accuracy: float
    """On the images to test on."""
    step_ms: list[float] = field(default_factory=list)
    over_base: float = 1.0


def mlp(data: Data, width: int) -> nn.Sequential:
    sizes = data.side**2, width, width, 10
    inner = [nn.Linear(sizes[0], width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *inner, nn.Linear(width, 10))


def conv(data: Data) -> nn.Sequential:
    """Patches on a grid of 7 x 7 (of UCI digits 8 x 8), a circular 3 x 3 convolution, pooling and a linear layer."""
    patch = data.side // 7
    stem = [nn.Conv2d(1, CHANNELS, patch, stride=patch), nn.ReLU()]
    body = [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, padding_mode="circular"), nn.ReLU()]
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * CHANNELS, 10))


def chosen(network: nn.Sequential) -> nn.Linear | nn.Conv2d:
    """The layer whose spectrum is shown: the second that has weights."""
    return [layer for layer in network if isinstance(layer, nn.Linear | nn.Conv2d)][1]


@torch.no_grad()
def spectrum(layer: nn.Linear | nn.Conv2d, side: int) -> Tensor:
    """All singular values, largest first; of a circular convolution those of its map of ``side x side`` images.

    The Fourier transform takes that map apart into an ``(out, in)`` matrix for each frequency (Sedghi, Gupta and Long,
    The singular values of convolutional layers, arXiv 1805.10408).
    """
    weight = layer.weight.double()
    if weight.ndim == 4:
        weight = torch.fft.fft2(weight, (side, side)).permute(2, 3, 0, 1)
    return torch.linalg.svdvals(weight).flatten().sort(descending=True).values


class Run:
    """One control's training."""

    def __init__(self, control: Control, data: Data, width: int) -> None:
        self.control, self.data = control, data
        self.network = mlp(data, width) if control.network == "mlp" else conv(data)
        for layer in self.network:
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.zeros_(layer.bias)
        specopt.init.scaled_orthogonal_(self.network, seed=0)
        self.optimizer = self._optimizer()
        self.before = self._spectrum()
        self.step_ms: list[float] = []

    def _optimizer(self) -> Optimizer:
        """Of all layers but the last, whose target would bound the logits."""
        last = f"{len(self.network) - 1}.*"
        options: dict[str, Any] = {"conv": "operator"} if self.control.conv == "operator" else {}
        groups = specopt.param_groups(
            self.network, overrides={last: {"spectral": False}}, inputs=self.data.train_x[:1], **options
        )
        optimizer: Optimizer
        if self.control.base == "SGD":
            optimizer = SGD(groups, lr=SGD_LR, momentum=MOMENTUM)
        else:
            optimizer = AdamW(groups, lr=ADAMW_LR)
        return optimizer if self.control.rule is None else specopt.wrap(optimizer, self.control.rule)

    def step(self, images: Tensor, labels: Tensor) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.network(images), labels).backward()
        self.optimizer.step()
        self.step_ms.append(1e3 * (time.perf_counter() - start))

    @torch.no_grad()
    def finish(self) -> Trained:
        after = self._spectrum()
        predicted = torch.cat([self.network(images).argmax(1) for images in self.data.test_x.split(1000)])
        accuracy = (predicted == self.data.test_y).float().mean().item()
        return Trained(self.control, self.before, after, accuracy, self.step_ms[COLD:] or self.step_ms)

    def _spectrum(self) -> Tensor:
        return spectrum(chosen(self.network), self.data.side // (self.data.side // 7))


def train(data: Data, width: int, steps: int, bar: tqdm[Any]) -> list[Trained]:
    """All controls side by side, a step of each in turn on the same batch, so that the times compare."""
    runs = [Run(control, data, width) for control in CONTROLS]
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(len(data.train_x), (BATCH,), generator=generator)
        images, labels = data.train_x[batch], data.train_y[batch]
        for run in runs:
            run.step(images, labels)
            bar.update()
    return with_ratios([run.finish() for run in runs])


def with_ratios(found: Sequence[Trained]) -> list[Trained]:
    """The median over steps of a step's time, over that of the base's step in the same turn."""
    times = {trained.control.name: torch.tensor(trained.step_ms) for trained in found}
    for trained in found:
        trained.over_base = (times[trained.control.name] / times[trained.control.plain]).median().item()
    return list(found)
