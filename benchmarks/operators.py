"""What ``conv="operator"`` costs: training steps of a small convolutional network under three kinds of control.

python -m benchmarks.run operators --batch 128
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import specopt

from . import reporting
from .timing import Stopwatch

SIZE, CHANNELS, CLASSES = 32, (3, 32, 64, 64), 10


def network() -> nn.Sequential:
    """Three 3 x 3 convolutions, the second and third of stride 2."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(CHANNELS)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=1 if i == 0 else 2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(CHANNELS[-1] * (SIZE // 4) ** 2, CLASSES))


def kinds() -> dict[str, Callable[[], tuple[nn.Module, Optimizer]]]:
    def plain() -> tuple[nn.Module, Optimizer]:
        model = network()
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

    def controlled(**options: Any) -> tuple[nn.Module, Optimizer]:
        model = network()
        return model, specopt.NormScaleAdamW(
            specopt.param_groups(model, inputs=torch.zeros(1, CHANNELS[0], SIZE, SIZE), **options), mode="cap"
        )

    return {
        "AdamW": plain,
        "cap, conv=matrix": controlled,
        "cap, conv=operator": lambda: controlled(conv="operator"),
    }


def compare(batch: int, warm_up: int, repeats: int) -> dict[str, float]:
    """The median of a training step's time over that of AdamW's, in turns."""
    watch = Stopwatch(torch.device("cpu"))
    images, labels = torch.randn(batch, 3, SIZE, SIZE), torch.randint(CLASSES, (batch,))
    pairs = {name: build() for name, build in kinds().items()}
    times: dict[str, list[float]] = {name: [] for name in pairs}
    for turn in range(warm_up + repeats):
        for name, (model, optimizer) in pairs.items():

            def step(model: nn.Module = model, optimizer: Optimizer = optimizer) -> None:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images), labels).backward()
                optimizer.step()

            taken = watch.wall(step)
            if turn >= warm_up:
                times[name].append(taken)
    base = statistics.median(times["AdamW"])
    return {name: statistics.median(values) / base for name, values in times.items()}


def main(arguments: argparse.Namespace) -> None:
    found = compare(arguments.batch, arguments.warm_up, arguments.repeats)
    print(f"training step over AdamW's, batch {arguments.batch}, {torch.get_num_threads()} thread(s), CPU")
    for name, ratio in found.items():
        print(f"{name:20} {ratio:.2f}")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("operators", help=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=reporting.whole(1), default=128)
    parser.add_argument("--warm-up", type=reporting.whole(0), default=22, help="steps first: 20 make more pairs")
    parser.add_argument("--repeats", type=reporting.whole(1), default=20)
    parser.set_defaults(main=main)
