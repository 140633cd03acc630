"""The rows of gradient regularization on MNIST, as the replication report of Varga, Csiszárik and Zombori has them:
experiments C2, C4 and C6.

The report's: LeNet-5 with max-pooling and ReLU, with dropout 0.5 after the hidden layer (C4, C6, C2's Dropout net),
with batch norm (C2's Batchnorm net), or with neither (C2's Baseline); Adam, with 0.1 of its lr after a half and 0.01
after three quarters of 10,000 batches of 50; weight decay 5e-4; each run trains on another random subset, of C2 and C6
with 200 images of each class, and is tested on all 10,000 test images. Every penalty has the lambda that the report
found best for it.

The authors' code's: LeNet-5 of 6-16-120-84, with batch norm after the hidden layer's ReLU alone; lr 1e-3 (the report
prints 0.1, 0.01 and 0.001); weight decay coupled, and of convolutions alone (the newest version of that code decays
dense weights too); the subsets of C4 drawn without regard to classes; images with mean 0 and deviation 1. The last
decides what a lambda means: pixels in [0, 1] have deviation 0.308, and a network of the same function on them has
derivatives ``1/std`` times as large, and so at the same lambda the penalties of squared derivatives (DoubleBack,
SpectReg, FrobReg, JacReg) ``1/std^2 = 10.5`` times as large.

Chosen here, where our documents say nothing: He's initial weights; no crops; the nearest whole number of epochs to
10,000 batches.

The rows ``wide-*`` are the same on a wider network, LeNet of 20-50-500 with batch norm before each ReLU.

Ours, with nothing tuned: SNR on Adam with lambda 0.01; Norm Scaling, and a cap of the first eight singular values, each
at ``sqrt(out/in)``, the last layer left alone, on Adam with the same settings. Norm Scaling starts from the same
weights as all others, whose norms it scales from the first step on. C6 has C2's Dropout net, images and seeds, so that
ours are run there alone; its training without a penalty, over which its times are told, is run again.

The first method of a row is the one over which times are told.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .. import published
from ..methods import Method
from ..published.gradreg import SIZES, WIDE, WIDE_SIZES
from ..recipe import Recipe

BATCHES, BATCH = 10_000, 50
POINTS = 10
PER_CLASS = 200
DECAY = 5e-4
NETS: dict[str, dict[str, Any]] = {"baseline": {}, "batchnorm": {"batch_norm": True}, "dropout": {"dropout": 0.5}}
OURS = (
    Method("snr-adam", base="adam", snr_lambda=0.01),
    Method("spectral", base="adam", norm_scale={"mode": "set"}, target="channels", spared=("head*",)),
    Method("cap", base="adam", norm_scale={"mode": "cap", "rank": 8}, target="channels", spared=("head*",)),
)


def recipes() -> Iterator[Recipe]:
    for model, prefix, sizes in (("lenet5", "", SIZES), ("lenet", WIDE, WIDE_SIZES)):
        for net, options in NETS.items():
            yield from row(f"gradreg/{prefix}c2-{net}", model, 10 * PER_CLASS, options, balanced=True)
        yield from row(f"gradreg/{prefix}c6", model, 10 * PER_CLASS, NETS["dropout"], balanced=True, ours=())
        for size in sizes:
            yield from row(f"gradreg/{prefix}c4-{size}", model, size, NETS["dropout"])


def row(
    name: str, model: str, train: int, net: dict[str, Any], *, balanced: bool = False, ours: tuple[Method, ...] = OURS
) -> Iterator[Recipe]:
    """No regularization, the report's penalties, and ours."""
    penalized = [
        Method(each, base="adam", penalty=each, penalty_weight=value) for each, value in published.LAMBDAS[name].items()
    ]
    for method in (Method("none", base="adam"), *penalized, *ours):
        yield Recipe(
            name=f"{name}/{method.name}",
            data="mnist",
            model=model,
            model_options=net,
            method=replace(method, weight_decay=DECAY, decayed="convolutions"),
            batch=BATCH,
            epochs=round(BATCHES / (train // BATCH)),
            lr=1e-3,
            augment=False,
            train=train,
            balanced=balanced,
            points=POINTS,
        )
