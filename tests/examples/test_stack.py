"""Several seeds in one training step: each network as if it were alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from papers.data import Images
from papers.data.reading import Split
from papers.methods import Method
from papers.models import build
from papers.recipe import Recipe
from papers.runs import checkpoint, folders, running
from papers.runs.machine import Settings
from papers.runs.running import Run
from papers.runs.stack import Stack
from papers.runs.training import Training
from torch import Tensor, nn

DECAYED = {"weight_decay": 1e-2, "decayed": "convolutions"}
METHODS = (
    Method("none", **DECAYED),
    Method("adversarial", adversarial=0.5),
    Method("double-back", penalty="double-back", penalty_weight=10.0, **DECAYED),
    Method("spect-reg", penalty="spect-reg", penalty_weight=0.1),
    Method("jac-reg", penalty="jac-reg", penalty_weight=1.0),
    Method("frob-reg", penalty="frob-reg", penalty_weight=0.1),
    Method("confidence-penalty", penalty="confidence-penalty", penalty_weight=0.1),
    Method("snr", snr_lambda=0.1, **DECAYED),
    Method("cap", norm_scale={"mode": "cap"}, target="size", spared=("head*",)),
    Method("frobenius", norm_scale={"norm": "frobenius"}, target="size"),
)
RECIPE = Recipe(
    name="small/lenet5/none",
    data="mnist",
    model="lenet5",
    model_options={"scale": 0.25},
    method=METHODS[0],
    batch=16,
    epochs=4,
    lr=0.05,
    augment=False,
    train=40,
    balanced=True,
    points=2,
)
NETS: tuple[dict[str, Any], ...] = ({}, {"batch_norm": True})


def recipe_of(method: Method, **options: Any) -> Recipe:
    return replace(RECIPE, name=f"small/lenet5/{method.name}", method=method, model_options={"scale": 0.25, **options})


@pytest.fixture(scope="module")
def images() -> Images:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (100, 1, 28, 28), dtype=torch.uint8, generator=generator)
    return Images.of("mnist", 10, Split(x[:80], torch.arange(80) % 10), Split(x[80:], torch.arange(20) % 10))


@pytest.fixture
def in_place(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images of runs on the disk."""
    monkeypatch.setattr(running, "images_of", lambda *_: images)


def stepped(recipe: Recipe, images: Images, seeds: Sequence[int], steps: int = 2) -> Training:
    training = Training(recipe, images, seeds)
    training.begin(0)
    for _, batch in zip(range(steps), training.batches(0), strict=False):
        training.step(batch)
    return training


def weights(model: nn.Module) -> list[Tensor]:
    return [value.detach().double() for value in model.state_dict().values()]


@pytest.mark.filterwarnings("ignore:the first step moves")
@pytest.mark.parametrize("net", NETS, ids=("plain", "batch norm"))
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_each_network_of_a_stack_is_what_it_would_be_alone(method: Method, net: dict[str, Any], images: Images) -> None:
    recipe = recipe_of(method, **net)
    together = stepped(recipe, images, (3, 5))
    for member in together.members:
        start, alone = Training(recipe, images, [member.seed]), stepped(recipe, images, [member.seed])
        for first, one, other in zip(*map(weights, (start.model, alone.model, member.model)), strict=True):
            moved = (one - first).norm()
            assert (one - other).norm() <= 1e-3 * moved + 1e-6, (moved, (one - other).norm())
        assert [p.grad is not None for p in member.model.parameters()] == [True] * len(list(member.model.parameters()))


def test_networks_of_a_stack_differ_in_weights_images_and_batches(images: Images) -> None:
    training = Training(RECIPE, images, (0, 1))
    one, other = training.members
    assert not torch.equal(one.model.head.weight, other.model.head.weight)  # type: ignore[union-attr, arg-type]
    assert not torch.equal(one.images.train_x, other.images.train_x)
    training.begin(0)
    batch = next(training.batches(0))
    assert len(batch.images) == 2 * batch.size == 32
    assert not torch.equal(batch.images[:16], batch.images[16:])


def test_a_balanced_run_has_as_many_images_as_the_classes_divide(images: Images) -> None:
    (member,) = Training(replace(RECIPE, train=47), images, [0]).members
    assert member.images.train_y.bincount().tolist() == [4] * 10


def test_spectregs_projection_is_one_for_the_batch_of_each_network_and_of_its_seed_alone(images: Images) -> None:
    recipe = recipe_of(METHODS[3])
    drawn = []
    for seeds in ((0, 1), (1, 2)):
        training = Training(recipe, images, seeds)
        training.begin(0)
        projection = next(training.batches(0)).projection
        assert projection is not None and projection.shape == (32, 10)
        assert all(torch.equal(part, part[:1].expand(16, 10)) for part in projection.split(16))
        drawn.append(projection)
    assert torch.equal(drawn[0][16:], drawn[1][:16]) and not torch.equal(drawn[0][:16], drawn[0][16:])


def test_dropouts_masks_are_of_the_rate_and_of_each_seed_alone(images: Images) -> None:
    recipe = recipe_of(METHODS[0], dropout=0.25, scale=1.0)
    masks = []
    for seeds in ((0, 1), (1, 2)):
        training = Training(recipe, images, seeds)
        training.begin(0)
        next(training.batches(0))
        assert isinstance(training.networks, Stack)
        masks.append(training.networks.masks["dropout.mask"])
    assert torch.equal(masks[0][1], masks[1][0]) and not torch.equal(masks[0][0], masks[0][1])
    assert masks[0].shape == (2, 16, 84) and masks[0].unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert masks[0].eq(0).double().mean() == pytest.approx(0.25, abs=0.02)


def test_forward_of_a_stack_drops_what_the_masks_say() -> None:
    models = [build("lenet5", (1, 28, 28), 10, dropout=0.5) for _ in range(2)]
    apart = copy.deepcopy(models)
    stack, x = Stack(models, torch.zeros(1, 1, 28, 28)), torch.randn(6, 1, 28, 28)
    stack.train()
    stack.draw(3, [torch.Generator().manual_seed(seed) for seed in (0, 1)])
    found = stack.forward(x)
    for i, model in enumerate(apart):
        model.dropout = nn.Identity()
        model.head.register_forward_pre_hook(lambda _, inputs, i=i: inputs[0] * stack.masks["dropout.mask"][i])
        torch.testing.assert_close(found[3 * i : 3 * i + 3], model(x[3 * i : 3 * i + 3]))


def test_networks_are_written_through_the_stack_and_the_stack_through_them() -> None:
    models = [build("lenet5", (1, 28, 28), 10, batch_norm=True) for _ in range(2)]
    stack = Stack(models, torch.zeros(1, 1, 28, 28))
    with torch.no_grad():
        models[1].head.weight.fill_(3.0)  # type: ignore[union-attr, operator]
    assert torch.equal(stack.parameters["head.weight"][1], models[1].head.weight)  # type: ignore[arg-type]
    stack.train()
    stack.forward(5 + torch.randn(8, 1, 28, 28))
    assert [int(model.norm.num_batches_tracked) for model in models] == [1, 1]  # type: ignore[union-attr, arg-type]
    models[0].load_state_dict(models[1].state_dict())
    one, other = stack.parameters["conv1.weight"]
    assert torch.equal(one, other)


@pytest.mark.parametrize("net", [{}, {"dropout": 0.5, "batch_norm": True}], ids=("plain", "dropout and batch norm"))
def test_seeds_that_stop_together_after_each_epoch_end_in_the_results_of_ones_that_do_not(
    net: dict[str, Any], images: Images, in_place: None, tmp_path: Path
) -> None:
    recipe = recipe_of(METHODS[7], **net)
    whole = Run(recipe, (0, 1), tmp_path / "whole").finish(show=False)
    stops = 0
    while not (run := Run(recipe, (0, 1), tmp_path / "stopped")).results and run.training.epochs_done < recipe.epochs:
        torch.manual_seed(stops)
        run.training.run_epoch()
        checkpoint.save(run.folder, run.training.state())
        stops += 1
    again = run.finish(show=False)
    assert stops == recipe.epochs and whole is not None and again is not None
    assert [{**one, "step_ms": 0} for one in again] == [{**one, "step_ms": 0} for one in whole]
    assert [one["together"] for one in whole] == [[0, 1], [0, 1]]


def test_finished_seeds_are_read_and_the_others_trained(in_place: None, tmp_path: Path) -> None:
    first = Run(RECIPE, [1], tmp_path).finish(show=False)
    run = Run(RECIPE, (0, 1, 2), tmp_path)
    assert run.training.seeds == (0, 2) and run.folder.name == "seeds-0,2"
    results = run.finish(show=False)
    assert first is not None and results is not None
    assert [result["seed"] for result in results] == [0, 1, 2]
    assert json.loads(json.dumps(results[1])) == json.loads(json.dumps(first[0]))
    assert not hasattr(Run(RECIPE, (0, 1, 2), tmp_path), "training")


def test_a_deadline_between_points_loses_nothing(
    in_place: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, epochs=4, points=1)
    whole = Run(recipe, (0, 1), tmp_path / "whole").finish(show=False)
    epoch, begun, clock = Training.run_epoch, list[int](), [0.0]

    def run_epoch(self: Training, bar: Any) -> None:
        begun.append(self.epochs_done)
        epoch(self, bar)
        clock[0] += 1

    monkeypatch.setattr(Training, "run_epoch", run_epoch)
    monkeypatch.setattr(running.time, "monotonic", lambda: clock[0])
    again = None
    while again is None and len(begun) < 8:
        again = Run(recipe, (0, 1), tmp_path / "stopped").finish(show=False, deadline=clock[0] + 0.5)
    assert begun == [0, 1, 2, 3] and again is not None and whole is not None
    assert [{**one, "step_ms": 0} for one in again] == [{**one, "step_ms": 0} for one in whole]


def test_a_run_is_saved_between_points_as_time_goes_by(
    in_place: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    monkeypatch.setattr(checkpoint, "save", lambda _, state: saved.append(state["epochs_done"]))
    recipe = replace(RECIPE, epochs=4, points=1)
    Run(recipe, [0], tmp_path / "seldom").finish(show=False)
    monkeypatch.setattr(running, "SAVED_EVERY", 0.0)
    Run(recipe, [0], tmp_path / "often").finish(show=False)
    assert saved == [4, 1, 2, 3, 4]


def stopped(recipe: Recipe, seeds: Sequence[int], folder: Path, epochs: int) -> Run:
    """Runs that were begun and left by a process that ended."""
    run = Run(recipe, seeds, folder)
    for _ in range(epochs):
        run.training.run_epoch()
    checkpoint.save(run.folder, run.training.state())
    return run


@pytest.mark.parametrize("asked", [(0, 1, 2), (1, 0), (1,)])
def test_seeds_that_were_begun_together_go_on_together_whatever_is_asked_for(
    asked: tuple[int, ...], in_place: None, tmp_path: Path
) -> None:
    stopped(RECIPE, (0, 1), tmp_path, 3)
    run = Run(RECIPE, asked, tmp_path)
    assert run.parts == [(0, 1), *([(2,)] if 2 in asked else [])] and run.training.epochs_done == 3
    results = run.finish(show=False)
    assert results is not None and [result["seed"] for result in results] == list(asked)
    whole = Run(RECIPE, (0, 1), tmp_path / "whole").finish(show=False)
    assert whole is not None
    last = json.loads((tmp_path / RECIPE.name / "seed-1" / "result.json").read_text())
    assert last["epochs"] == whole[1]["epochs"]


def test_seeds_killed_between_their_results_are_not_trained_again(
    in_place: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = Run._keep

    def killed(self: Run, member: Any, show: bool) -> None:
        if member.seed == 1:
            raise KeyboardInterrupt
        keep(self, member, show)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_keep", killed)
        with pytest.raises(KeyboardInterrupt):
            Run(RECIPE, (0, 1, 2), tmp_path).finish(show=False)
    run = Run(RECIPE, (0, 1, 2), tmp_path)
    assert set(run.results) == {0} and run.training.epochs_done == RECIPE.epochs
    assert run.finish(show=False) is not None


@pytest.mark.parametrize("asked", [(0,), (0, 1, 2), (1, 0)])
def test_without_resume_nothing_that_was_begun_is_written_over(
    asked: tuple[int, ...], in_place: None, tmp_path: Path
) -> None:
    stopped(RECIPE, (0, 1), tmp_path, 1)
    with pytest.raises(ValueError, match=r"seeds-0\.\.1 holds a run already: --resume"):
        Run(RECIPE, asked, tmp_path, resume=False)
    Run(RECIPE, [2], tmp_path, resume=False)


def test_a_folder_that_another_process_trains_in_is_refused(in_place: None, tmp_path: Path) -> None:
    run, other = Run(RECIPE, (0, 1), tmp_path), Run(RECIPE, [1], tmp_path)
    with (
        folders.locked([run.place(seed) for seed in (0, 1)]),
        pytest.raises(OSError, match="another process trains there"),
    ):
        other.finish(show=False)
    assert other.finish(show=False) is not None


@pytest.mark.parametrize(
    ("seeds", "name"),
    [((3,), "seed-3"), ((1, 0), "seeds-0..1"), ((7, 0, 1, 2, 9), "seeds-0..2,7,9"), (range(100), "seeds-0..99")],
)
def test_folders_have_the_seeds_for_name(seeds: Sequence[int], name: str) -> None:
    assert folders.name_of(seeds) == name and folders.seeds_of(name) == tuple(sorted(seeds))


def test_a_folder_that_is_no_runs_has_no_seeds_and_too_many_seeds_have_no_folder(tmp_path: Path) -> None:
    assert [folders.seeds_of(name) for name in ("seeds", "seed-", "figures", "seed-1-2", "seed-1.2")] == [()] * 5
    with pytest.raises(ValueError, match="100 seeds that are no range are too many"):
        folders.folder_of(RECIPE, range(0, 200, 2), tmp_path)


@pytest.mark.parametrize("method", METHODS[2:6], ids=lambda method: method.name)
def test_second_derivatives_of_a_compiled_network_are_refused(method: Method, images: Images) -> None:
    with pytest.raises(ValueError, match="compile must be off for"):
        Training(recipe_of(method), images, [0], Settings("cpu", compile=True))


def test_a_run_is_measured_and_kept_at_its_points_alone(in_place: None, tmp_path: Path) -> None:
    run = Run(replace(RECIPE, epochs=5, points=2), (0, 1), tmp_path)
    results = run.finish(show=False)
    assert results is not None
    assert [row["epoch"] for row in results[0]["epochs"]] == [0, 2, 5]
    state = checkpoint.load(run.folder, {})
    assert state is not None and state["epochs_done"] == 5
    assert len(state["logs"][1]["step_ms"]) == 5


@pytest.mark.parametrize("seeds", [(), (1, 1), (-1,), (0, 2**31)])
def test_seeds_that_are_none_are_refused(seeds: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"seeds? must be"):
        Run(RECIPE, seeds, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "settings",
    [Settings("cpu", bf16=True), pytest.param(Settings("cpu", compile=True), marks=pytest.mark.full)],
    ids=("bfloat16", "compile"),
)
def test_a_stack_trains_in_bfloat16_and_compiled(settings: Settings, images: Images) -> None:
    training = Training(replace(recipe_of(METHODS[0]), epochs=1), images, (0, 1), settings)
    training.run_epoch()
    assert all(log.epochs[-1]["test_loss"] < 10 for log in training.logs)
