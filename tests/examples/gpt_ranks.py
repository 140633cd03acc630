"""What ranks do in the tests of examples/train_distributed.py, whose rooms are put on the path for them."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

EXAMPLES = str(Path(__file__).resolve().parents[2] / "examples")
if EXAMPLES not in sys.path:
    sys.path.append(EXAMPLES)

from gpt import checkpoints, parallel  # noqa: E402, F401
from gpt.model import Shape, largest_sigma  # noqa: E402
from gpt.parallel import WAYS, mean_of_shares  # noqa: E402
from gpt.starting import meet  # noqa: E402, F401
from gpt.text import Text, time_zones, windows  # noqa: E402
from gpt.training import Recipe, Training  # noqa: E402
from train_distributed import arguments, main  # noqa: E402, F401

from tests.specopt.sharding.ranks import digest, state_tensors  # noqa: E402
from tests.specopt.sharding.twins import wholes  # noqa: E402

RECIPE = Recipe(shape=Shape(width=68, layers=1, heads=4, context=16), batch=12, lr=3e-3, warm_up=2, cap=1.05)
"""Of matrices that are tracked, of which two ranks cut one across; with caps that act at once."""


def training_of(way: str, recipe: Recipe = RECIPE, text: Text | None = None) -> Training:
    warnings.filterwarnings("ignore", "the first step moves")
    return Training(recipe, text or time_zones(recipe.shape.context), way, torch.device("cpu"))


def weights(training: Training) -> list[Tensor]:
    return [weight.clone() for weight in wholes(list(training.model.parameters()))]


def losses_of(training: Training, steps: int) -> list[float]:
    return [mean_of_shares(training.advance()) for _ in range(steps)]


class Found(NamedTuple):
    """Of a training."""

    losses: list[float]
    held_out: float
    sigma: float
    """As the table has it."""
    exact: float
    half: list[Tensor]
    """Weights half-way, where a checkpoint was."""
    few: list[float]
    """Held-out losses where the first window is all there is, or the second, or both."""


HALF = 3
"""Steps before the checkpoint, and behind it."""


def trained(way: str, folder: Path) -> Found:
    """A training from its start, that saves half-way."""
    training = training_of(way)
    losses = losses_of(training, HALF)
    training.save(folder)
    half = weights(training)
    losses += losses_of(training, HALF)
    ends = [weight.double() for weight in weights(training) if weight.shape in ((68, 68), (204, 68))]
    exact = max(float(torch.linalg.matrix_norm(matrix, 2)) for end in ends for matrix in end.split(68))
    held_out = training.held_out_loss()
    few = [held_out_loss_of(training, chosen) for chosen in (slice(0, 1), slice(1, 2), slice(0, 2))]
    return Found(losses, held_out, largest_sigma(training.optimizer), exact, half, few)


def held_out_loss_of(training: Training, chosen: slice) -> float:
    text = training.text
    training.text = text._replace(held_out=text.held_out[chosen])
    loss = training.held_out_loss()
    training.text = text
    return loss


def resumed(folder: Path, way: str) -> Found:
    """A training from that half on."""
    training = training_of(way)
    assert training.resume(folder) and training.step == HALF
    half = weights(training)
    return Found(losses_of(training, HALF), training.held_out_loss(), 0, 0, half, [])


def on_two_ranks(folder: Path, of_four: Path) -> dict[str, Found]:
    found = {way: trained(way, folder / way) for way in WAYS}
    return {**found, "resumed": resumed(of_four, "fsdp2")}


def step_taken_up(folder: Path) -> int:
    training = training_of("fsdp2")
    assert training.resume(folder)
    return training.step


def saved_three_times(folder: Path) -> None:
    training = training_of("fsdp2")
    for _ in range(3):
        training.advance()
        training.save(folder)


def resumed_beside_damage(folder: Path) -> tuple[int, list[str], list[str]]:
    """The step that is taken up, what is warned of, and the checkpoints that are there after the next is written."""
    training = training_of("fsdp2")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert training.resume(folder)
    step, warned = training.step, [str(one.message) for one in told if "damaged" in str(one.message)]
    training.save(folder)
    return step, warned, sorted(path.name for path in folder.iterdir())


def refused(folder: Path) -> tuple[str, bool]:
    """The error of a resume in the middle of a training, and whether weights and state are the same bits after it."""
    training = training_of("fsdp2")
    losses_of(training, 2)
    training.optimizer.state_dict()  # takes up what is on its way
    before = digest(state_tensors(training.optimizer))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            training.resume(folder)
    except ValueError as error:
        return str(error), digest(state_tensors(training.optimizer)) == before and training.step == 2
    return "", False


def read_failing_half_way(folder: Path) -> tuple[str, bool]:
    """The error where a file vanishes after it was looked at, and whether what is trained stays the same bits."""
    training = training_of("fsdp2")
    losses_of(training, 2)
    training.optimizer.state_dict()
    before = digest(state_tensors(training.optimizer))
    _, path = checkpoints.newest(folder, training.identity()) or (0, folder)
    dist.barrier()
    if dist.get_rank() == 0:
        (path / "__1_0.distcp").unlink()
    dist.barrier()
    try:
        checkpoints.read(path, training.states())
    except ValueError as error:
        return str(error), digest(state_tensors(training.optimizer)) == before
    return "", False


def refused_for_another_recipe(folder: Path) -> str:
    return error_of(lambda: training_of("fsdp2", replace(RECIPE, batch=6)).resume(folder))


def refused_for_another_text(folder: Path) -> tuple[str, int, int]:
    """Of the same characters: the error, and the sums of both texts."""
    text = time_zones(RECIPE.shape.context)
    other = windows(text.characters * 9, RECIPE.shape.context)
    return error_of(lambda: training_of("fsdp2", text=other).resume(folder)), text.check, other.check


def refused_by_the_optimizer(folder: Path) -> tuple[str, bool]:
    """As :func:`refused`, of a checkpoint with an option that no optimizer takes."""
    training = training_of("fsdp2")
    losses_of(training, 1)
    for group in training.optimizer.param_groups:
        group["block"] = -1
    training.save(folder)
    return refused(folder)


def error_of(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return ""


def failing_saves(folder: Path) -> tuple[dict[str, str], list[str]]:
    """The errors of saves that fail on one rank, and the whole checkpoints that are left."""
    training, is_first = training_of("fsdp2"), dist.get_rank() == 0
    for _ in range(2):
        training.advance()
        training.save(folder)
    a_file, elsewhere = folder.with_name("file"), folder.with_name("elsewhere")
    a_file.write_text("")
    errors = {}
    for step in (3, 4):
        training.step = step
        errors[f"disk of its own, {step}"] = error_of(lambda: training.save(folder if is_first else elsewhere))
    errors["no folder"] = error_of(lambda: training.save(folder if is_first else a_file / "below"))
    training.step = 5
    taken = folder / "step-00000005"
    taken.write_text("")  # a folder cannot take its name
    errors["no name"] = error_of(lambda: training.save(folder))
    dist.barrier()
    return errors, sorted(path.name for path in folder.glob("step-????????") if path != taken)


class Damages(NamedTuple):
    """What was found where checkpoints are damaged: by what was done to them."""

    beside: dict[str, tuple[int, list[str], list[str]]]
    """Where the one before is whole."""
    refused: dict[str, tuple[str, bool]]
    vanished: tuple[str, bool]
    other_recipe: str
    other_text: tuple[str, int, int]
    by_the_optimizer: tuple[str, bool]
    saves: tuple[dict[str, str], list[str]]


def damages(
    newest: dict[str, Path], all_of_them: dict[str, Path], vanishing: Path, whole: Path, fresh: Path
) -> Damages:
    return Damages(
        {told: resumed_beside_damage(folder) for told, folder in newest.items()},
        {told: refused(folder) for told, folder in all_of_them.items()},
        read_failing_half_way(vanishing),
        refused_for_another_recipe(whole),
        refused_for_another_text(whole),
        refused_by_the_optimizer(fresh / "options"),
        failing_saves(fresh / "saves"),
    )


def recipe_of(about: dict[str, Any]) -> Recipe:
    """From what a checkpoint says of it."""
    plain = {name: value for name, value in about.items() if name != "text"}
    return Recipe(**{**plain, "shape": Shape(**about["shape"])})


def undisturbed(folder: Path, recipe: Recipe, steps: int) -> list[float]:
    """The losses of a training to its end, saved there."""
    training = training_of("fsdp2", recipe)
    losses = losses_of(training, steps)
    training.save(folder)
    return losses


def killed_in_a_save(folder: Path, rank: int, sync: int) -> str:
    """Two checkpoints, in the second of which a rank dies: where it would wait for the disk so many times before. The
    error of the others."""
    training = training_of("fsdp2")
    losses_of(training, 2)
    training.save(folder)
    losses_of(training, 2)
    original, syncs = os.fsync, 0

    def fsync(handle: Any) -> None:
        nonlocal syncs
        if syncs == sync and dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        syncs += 1
        original(handle)

    os.fsync = fsync
    try:
        training.save(folder)
    except Exception as error:
        return str(error)
    return ""
