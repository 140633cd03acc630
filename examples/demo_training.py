"""The demo's data, network, methods and training."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

import specopt

TRAIN_IMAGES, BATCH = 200, 20
WIDTHS = (64, 256, 256, 256, 10)
SGD_LR, MOMENTUM, ADAMW_LR = 0.03, 0.9, 1e-3

Params = Iterator[nn.Parameter]


class Method(NamedTuple):
    name: str
    base: str
    build: Callable[[Params], Optimizer]


METHODS = (
    Method("SGD", "SGD", lambda p: SGD(p, lr=SGD_LR, momentum=MOMENTUM)),
    Method("SNRSGD", "SGD", lambda p: specopt.SNRSGD(p, lr=SGD_LR, momentum=MOMENTUM, snr_lambda=0.01)),
    Method("AdamW", "AdamW", lambda p: AdamW(p, lr=ADAMW_LR)),
    Method("NormScaleAdamW spectral", "AdamW", lambda p: specopt.NormScaleAdamW(p, lr=ADAMW_LR)),
    Method("NormScaleAdamW frobenius", "AdamW", lambda p: specopt.NormScaleAdamW(p, lr=ADAMW_LR, norm="frobenius")),
)


class Data(NamedTuple):
    train_x: Tensor  # (200, 64)
    train_y: Tensor
    test_x: Tensor  # (1597, 64)
    test_y: Tensor


@dataclass
class Curve:
    """One method from one seed; the lists start before the first step."""

    train: list[float] = field(default_factory=list)
    test: list[float] = field(default_factory=list)
    sigmas: list[list[float]] = field(default_factory=list)
    """sigma₁ of each layer, by a full singular value decomposition."""
    targets: list[float] | None = None
    """Of each layer: sigma*, or F* under Frobenius scaling."""
    norm_over_target: float | None = None
    """The largest over the layers, of the norm that is steered."""
    step_ms: list[float] = field(default_factory=list)
    """Milliseconds a training step, the mean of each epoch."""


def split_digits(seed: int, device: torch.device) -> Data:
    """Centred by pixel and divided by one standard deviation, both of the training images."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32), torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:TRAIN_IMAGES], order[TRAIN_IMAGES:]
    x = x - x[train].mean(0)
    x = x / x[train].std()
    return Data(*(part.to(device) for part in (x[train], y[train], x[test], y[test])))


def mlp(seed: int, device: torch.device) -> nn.Sequential:
    """ReLU between linear layers, biases zero, weights orthogonal times ``sqrt(out / in)``."""
    layers: list[nn.Module] = []
    for columns, rows in pairwise(WIDTHS):
        linear = nn.Linear(columns, rows)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    network = nn.Sequential(*layers[:-1])
    specopt.init.scaled_orthogonal_(network, generator=torch.Generator().manual_seed(seed))
    return network.to(device)


class Run:
    """One method's training from one seed."""

    def __init__(self, method: Method, start: nn.Sequential, data: Data, epochs: int) -> None:
        self.network, self.data, self.curve = copy.deepcopy(start), data, Curve()
        self.optimizer = method.build(self.network.parameters())
        self.schedule = CosineAnnealingLR(self.optimizer, epochs * (TRAIN_IMAGES // BATCH))
        self.record()

    def epoch(self, batches: Sequence[Tensor]) -> None:
        synchronize(self.data.train_x)
        start = time.perf_counter()
        for batch in batches:
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.network(self.data.train_x[batch]), self.data.train_y[batch]).backward()
            self.optimizer.step()
            self.schedule.step()
        synchronize(self.data.train_x)
        self.curve.step_ms.append(1e3 * (time.perf_counter() - start) / len(batches))
        self.record()

    @torch.no_grad()
    def record(self) -> None:
        data, weights = self.data, [p for p in self.network.parameters() if p.ndim == 2]
        self.curve.train.append(accuracy(self.network(data.train_x), data.train_y))
        self.curve.test.append(accuracy(self.network(data.test_x), data.test_y))
        self.curve.sigmas.append([torch.linalg.svdvals(weight)[0].item() for weight in weights])

    def finish(self) -> Curve:
        if isinstance(self.optimizer, specopt.NormScaleAdamW):
            frobenius = self.optimizer.defaults["norm"] == "frobenius"
            rows = specopt.spectral_report(self.optimizer)
            self.curve.targets = [row.target for row in rows if row.target is not None]
            norms = [row.frobenius if frobenius else row.sigma for row in rows]
            ratios = [norm / target for norm, target in zip(norms, self.curve.targets, strict=True)]
            self.curve.norm_over_target = max(ratios)
        return self.curve


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).float().mean().item()


def synchronize(like: Tensor) -> None:
    if like.is_cuda:
        torch.cuda.synchronize(like.device)


def train_all(seed: int, epochs: int, device: torch.device, bar: tqdm) -> list[Curve]:
    """All methods side by side, an epoch of each in turn, so that the times compare."""
    data, start = split_digits(seed, device), mlp(seed, device)
    runs = [Run(method, start, data, epochs) for method in METHODS]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        batches = torch.randperm(TRAIN_IMAGES, generator=generator).to(device).split(BATCH)
        for run in runs:
            run.epoch(batches)
            bar.update()
    return [run.finish() for run in runs]
