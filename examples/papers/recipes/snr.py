"""The rows of the SNR paper (arXiv 1705.10941), and the questions that it leaves open.

The paper's: SGD, batches of 64 (lr 0.01) and of 4096 (lr 0.1, and 1.0 for NIN and for DenseNet on STL-10), weight decay
1e-4, adversarial training with epsilon 1 and equal weights, lambda 0.01. Its text, as we have it, leaves the rest open.
One choice for every method of a row:

- momentum 0.9, random crops and flips, images normalized by the training set's mean and deviation;
- 200 epochs, and the learning rate times 0.1 after a half and after three quarters of them. A batch of 4096 is most of
  STL-10's 5,000 training images: 1,000 epochs there, of one step each;
- VGG-16 with batch norm and one linear layer at the end, NIN with batch norm (a learning rate of 1.0 is hard to use
  without) and dropout 0.5, DenseNet of depth 40 and growth 12; weights as the models draw them.

Open questions: a batch of 512, which lies halfway from 64 to 4096 in powers of two, with the geometric mean of the two
learning rates; and 20 % of the training labels replaced, at batch 64.

Ours: SNR on AdamW with lr 1e-3 at batch 64, twice that at 512 and four times at 4096; SGD with the first eight singular
values of each matrix capped at ``sqrt(out/in)``; and AdamW with them capped at Norm Scaling's targets in every third
step, the last layer and shortcuts left alone in both. The last was chosen on a validation split, for VGG at batch 4096
and scale ``cpu`` (docs/results.md); nothing else was tuned. AdamW alone, which the paper has not, tells what of it is
the base's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from .. import published
from ..methods import Method
from ..recipe import Recipe

METHODS = (
    Method("vanilla"),
    Method("weight-decay", weight_decay=1e-4),
    Method("adversarial", adversarial=1.0),
    Method("snr", snr_lambda=0.01, spared=()),
    Method("adamw", base="adamw"),
    Method("snr-adamw", base="adamw", snr_lambda=0.01, spared=()),
    Method("cap", norm_scale={"mode": "cap", "rank": 8}, target="channels", spared=("*downsample*", "head*")),
    Method(
        "ours",
        base="adamw",
        norm_scale={"mode": "cap", "rank": 8, "every": 3},
        spared=("*downsample*", "head*"),
    ),
)

EPOCHS = 200
EPOCHS_OF_ONE_STEP = 1000
LARGE_LR = {"vgg-cifar10": 0.1, "nin-cifar100": 1.0, "densenet-cifar100": 0.1, "densenet-stl10": 1.0}
"""SGD's at batch 4096, by network and data."""
MODELS = {"vgg": ("vgg16", {}), "nin": ("nin", {"batch_norm": True}), "densenet": ("densenet40", {})}
ADAMW_LR = {64: 1e-3, 512: 2e-3, 4096: 4e-3}
NOISE = 0.2


def recipes() -> Iterator[Recipe]:
    """The paper's rows first, each network at both batch sizes."""
    for network in LARGE_LR:
        yield from row(network, 64)
        yield from row(network, 4096)
    for network in LARGE_LR:
        yield from row(network, 512)
    for network in LARGE_LR:
        yield from row(network, 64, label_noise=NOISE)


def row(network: str, batch: int, label_noise: float = 0.0) -> Iterator[Recipe]:
    """Every method on ``network``, such as ``vgg-cifar10``."""
    kind, data = network.split("-")
    model, options = MODELS[kind]
    name = f"snr/{network}-b{batch}" + (f"-noise{round(100 * label_noise)}" if label_noise else "")
    for method in METHODS:
        yield Recipe(
            name=f"{name}/{method.name}",
            data=data,
            model=model,
            model_options=options,
            method=method,
            batch=batch,
            epochs=EPOCHS_OF_ONE_STEP if (data, batch) == ("stl10", 4096) else EPOCHS,
            lr=learning_rate(network, batch) if method.base == "sgd" else ADAMW_LR[batch],
            label_noise=label_noise,
            threshold=published.THRESHOLDS.get(name),
        )


def learning_rate(network: str, batch: int) -> float:
    """SGD's: the paper's at 64 and 4096, at 512 their geometric mean."""
    small, large = 0.01, LARGE_LR[network]
    return {64: small, 512: math.sqrt(small * large), 4096: large}[batch]
