"""A small GPT on many ranks: torchrun --nproc-per-node 2 examples/train_distributed.py --parallel fsdp2

Trains on a public-domain text, with caps on the spectral norms of attention's projections: as replicas (ddp), cut up
over all ranks (fsdp2), or cut up and repeated (hsdp); on GPUs over nccl where there are any, else on CPU processes over
gloo, and without torchrun in this process alone. All of them make the same losses, to rounding.

Every so many steps rank 0 prints a line, and all ranks write a checkpoint together. A training that was stopped, killed
or restarted (torchrun --max-restarts 1) goes on from the newest whole one in --out by itself, on as many ranks as there
are then, in whichever way. A rank that waits for one that has died fails after --timeout.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from gpt import parallel
from gpt.model import Shape, largest_sigma
from gpt.text import time_zones
from gpt.training import Recipe, Training
from papers.runs.checkpoint import reserve
from torch.distributed.elastic.multiprocessing.errors import record

SEEDS = 2**33
"""So many differ in the windows that they draw (:meth:`gpt.text.Text.batch`)."""
COLUMNS = ("step", "loss", "held-out loss", "largest sigma", "cap", "ms a step")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recipe, shape = Recipe(), Shape()
    parser.add_argument("--parallel", choices=parallel.WAYS, default="ddp")
    parser.add_argument("--out", type=Path, default=Path("out/distributed"), help="folder of the checkpoints")
    parser.add_argument("--steps", type=int, default=300, help="until training ends, those before a restart included")
    parser.add_argument("--every", type=int, default=20, help="steps between lines, and between checkpoints")
    parser.add_argument("--batch", type=int, default=recipe.batch, help="windows in a step, of all ranks together")
    parser.add_argument("--width", type=int, default=shape.width, help=f"a multiple of {shape.heads}, the heads")
    parser.add_argument("--layers", type=int, default=shape.layers)
    parser.add_argument("--context", type=int, default=shape.context, help="characters that the model sees")
    parser.add_argument("--lr", type=float, default=recipe.lr)
    parser.add_argument(
        "--cap", type=float, default=recipe.cap, help="what a projection's norm is lowered to, one direction a step"
    )
    parser.add_argument("--seed", type=int, default=recipe.seed)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that a rank waits for another")
    args = parser.parse_args()
    for name in ("steps", "every", "batch", "width", "layers", "context"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be 1 or more, got {getattr(args, name)}")
    if not 0 <= args.seed < SEEDS:
        parser.error(f"--seed must be from 0 to 2**33 - 1, got {args.seed}")
    for name in ("lr", "cap"):
        if not 0 < getattr(args, name) < float("inf"):
            parser.error(f"--{name} must be positive and finite, got {getattr(args, name)}")
    if not 1 <= args.timeout <= 1e6:
        parser.error(f"--timeout must be from 1 to 1e6 seconds, got {args.timeout}")
    if args.width % shape.heads:
        parser.error(f"--width must be a multiple of {shape.heads}, got {args.width}")
    try:
        parallel.check(args.parallel, parallel.world_size(), args.batch)
        args.device = parallel.device_of(args.device)
        args.text = time_zones(args.context)
        reserve(args.out, 2**20)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")
    shape = Shape(args.width, args.layers, shape.heads, args.context)
    args.recipe = Recipe(shape, args.batch, args.lr, recipe.warm_up, args.cap, args.seed)
    return args


def show(*cells: str) -> None:
    """Once, not by every rank."""
    if dist.get_rank() == 0:
        print("  ".join(cell.rjust(len(head)) for cell, head in zip(cells, COLUMNS, strict=False)), flush=True)


@contextmanager
def in_one_line() -> Iterator[None]:
    """What is refused of a folder, without a traceback of every rank."""
    try:
        yield
    except ValueError as error:
        if dist.get_rank() == 0:
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def train(training: Training, steps: int, every: int, folder: Path) -> None:
    """To the last step, from the newest checkpoint in a folder or from the start."""
    with in_one_line():
        is_resumed = training.resume(folder)
    if is_resumed:
        show(f"Goes on from step {training.step}, of {folder}")
    show(*COLUMNS)
    while training.step < steps:
        start, first = time.perf_counter(), training.step
        for _ in range(min(every - first % every, steps - first)):
            loss = training.advance()
        mean = parallel.mean_of_shares(loss)  # waits for the device
        ms = 1e3 * (time.perf_counter() - start) / (training.step - first)
        numbers = (mean, training.held_out_loss(), largest_sigma(training.optimizer), training.recipe.cap)
        show(str(training.step), *(f"{number:.4f}" for number in numbers), f"{ms:.1f}")
        with in_one_line():
            training.save(folder)


@record
def main() -> None:
    args = arguments()
    with parallel.process_group(args.device, args.timeout):
        train(Training(args.recipe, args.text, args.parallel, args.device), args.steps, args.every, args.out)


if __name__ == "__main__":
    main()
