"""A table's runs and report, with training that is made up and, once, with training as it is."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import reproduce
import torch
from papers.data import Images, load
from papers.data.reading import Split
from papers.recipe import SCALES, Recipe
from papers.recipes import find
from papers.runs import checkpoint, running, timing
from papers.runs.machine import Machine
from papers.tables import records, reproducing
from papers.tables.kept import Kept
from papers.tables.planning import planned
from papers.tables.reproducing import Reproduction, Tools

from tests.examples.faked import MLP, Fake, reproduced

METHODS = ("none", "frobenius", "spectral", "ours")

pytestmark = pytest.mark.usefixtures("without_figures")


def quiet(line: str) -> None:
    """In the place of print."""


def test_a_plan_has_all_rows_and_all_stated_methods() -> None:
    plan = planned("normscale", scale=SCALES["cpu"])
    assert len(plan) == 4
    for recipes in plan.values():
        assert tuple(recipe.method.name for recipe in recipes) == METHODS
        assert all(recipe.scale == "cpu" for recipe in recipes)


def test_patterns_choose_rows_with_or_without_the_table_and_methods() -> None:
    for pattern in ("vgg-*-b64", "snr/vgg-*-b64"):
        plan = planned("snr", rows=[pattern], methods=["snr*", "vanilla"], scale=SCALES["tiny"], epochs=7)
        (recipes,) = plan.values()
        assert [recipe.method.name for recipe in recipes] == ["vanilla", "snr", "snr-adamw"]
        assert {recipe.epochs for recipe in recipes} == {7}
    (recipes,) = planned("normscale", rows=["resnet34"], methods=["*-published"], scale=SCALES["full"]).values()
    assert all(recipe.published for recipe in recipes) and len(recipes) == 3


def test_the_papers_threshold_holds_at_full_scale_and_length_alone() -> None:
    def threshold(**how: Any) -> float | None:
        return planned("snr", rows=["vgg-*-b64"], **how)["snr/vgg-cifar10-b64"][0].threshold

    assert threshold(scale=SCALES["full"]) == threshold(scale=SCALES["full"], epochs=200) == 0.88
    assert threshold(scale=SCALES["full"], epochs=20) is threshold(scale=SCALES["cpu"]) is None


def test_runs_go_seed_by_seed_over_all_methods_of_a_row(tmp_path: Path) -> None:
    fake = Fake()
    reproduced(fake, tmp_path, "--rows", "mlp-*", "--seeds", "2")
    row = [(f"{MLP}/{method}", seed) for seed in (0, 1) for method in METHODS]
    assert fake.trained[:8] == row and len(fake.trained) == 16
    assert fake.timed[0] == [f"{MLP}/{method}" for method in METHODS]


def test_a_second_call_makes_only_what_is_missing(tmp_path: Path) -> None:
    reproduced(Fake(), tmp_path, "--rows", "mlp-5*", "--seeds", "1")
    again = Fake()
    text = reproduced(again, tmp_path, "--rows", "mlp-5*", "--seeds", "2")
    assert again.trained == [(f"{MLP}/{method}", 1) for method in METHODS] and again.timed == []
    third = Fake(lost=["cifar100"])
    assert reproduced(third, tmp_path, "--rows", "mlp-5*", "--seeds", "2") == text and third.trained == []


def test_what_is_recorded_is_not_run_again_and_further_seeds_join_it_in_the_report_and_the_record(
    tmp_path: Path,
) -> None:
    words = ("--rows", "mlp-5*", "--record", tmp_path / "kept", "--seeds")
    reproduced(Fake(limit=6), tmp_path / "first", *words, "2")
    fake = Fake()
    text = reproduced(fake, tmp_path / "elsewhere", *words, "3")
    assert fake.trained == [
        *((f"{MLP}/{name}", 1) for name in METHODS[2:]),
        *((f"{MLP}/{name}", 2) for name in METHODS),
    ]
    assert len(fake.timed) == 1
    (row,) = records.read_all(tmp_path / "kept")
    assert all(sorted(row.of(method)) == [0, 1, 2] for method in METHODS) and list(row.times) == list(METHODS)
    nothing = Fake(lost=["cifar100"])
    assert reproduced(nothing, tmp_path / "third", *words, "3") == text
    assert nothing.trained == [] and nothing.timed == [] and records.read_all(tmp_path / "kept") == [row]


def test_without_record_what_is_recorded_is_run_again(tmp_path: Path) -> None:
    words = ("--rows", "mlp-5*", "--seeds", "1")
    reproduced(Fake(), tmp_path / "first", *words, "--record", tmp_path / "kept")
    fake = Fake()
    reproduced(fake, tmp_path / "elsewhere", *words)
    assert len(fake.trained) == 4 and len(fake.timed) == 1


def test_a_stop_leaves_a_report_of_what_there_is_and_the_next_call_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = reproduced(Fake(limit=5), tmp_path, "--rows", "mlp-*", "--seeds", "2")
    assert "The budget is spent; the same command goes on." in capsys.readouterr().out
    assert f"Not finished:\n\n- `{MLP}`: the budget ended before" in text
    assert "- `normscale/mlp-7x4000`: the budget ended before" in text
    counts = [line.split("|")[2].strip() for line in text.splitlines() if line.startswith(("| none", "| spectral"))]
    assert counts == ["2", "1"]
    rest = Fake()
    reproduced(rest, tmp_path, "--rows", "mlp-*", "--seeds", "2")
    assert len(rest.trained) == 16 - 5
    assert "budget" not in capsys.readouterr().out


def test_no_run_begins_after_the_budget(tmp_path: Path) -> None:
    fake = Fake()
    text = reproduced(fake, tmp_path, "--budget", "0")
    assert fake.trained == [] and fake.timed == []
    assert text.count("the budget ended before") == 4


def test_times_wait_for_the_next_call_where_the_budget_ends_with_the_last_run(tmp_path: Path) -> None:
    plan = planned("normscale", rows=["mlp-5*"], scale=SCALES["tiny"])
    fake = Fake()
    ends = time.monotonic() + 0.3

    def train(*words: Any) -> list[dict[str, Any]] | None:
        found = fake.train(*words)
        time.sleep(max(0.0, ends + 0.01 - time.monotonic()) if len(fake.trained) == 4 else 0.0)
        return found

    tools = Tools(train, fake.images, fake.times)
    first = Reproduction(Kept(tmp_path, Machine()), 1, ends, tools, quiet).run(plan)
    assert first.stopped and len(fake.trained) == 4 and fake.timed == []
    second = Reproduction(Kept(tmp_path, Machine()), 1, tools=tools, tell=quiet).run(plan)
    assert not second.stopped and len(fake.trained) == 4 and len(fake.timed) == 1


def test_seeds_are_trained_together_and_those_that_are_there_are_not_trained_again(tmp_path: Path) -> None:
    words = ("--rows", "mlp-5*", "--methods", "none", "spectral")
    fake = Fake()
    reproduced(fake, tmp_path, *words, "--seeds", "1")
    reproduced(fake, tmp_path, *words, "--seeds", "5", "--together", "3")
    assert fake.together == [[0], [0], [1, 2], [1, 2], [3, 4], [3, 4]]
    assert fake.trained[-2:] == [(f"{MLP}/spectral", 3), (f"{MLP}/spectral", 4)]


def test_a_damaged_checkpoint_of_seeds_trained_together_is_told_before_anything_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny" / MLP / "none" / "seeds-0..1" / "checkpoint.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no archive")
    fake = Fake()
    with pytest.raises(SystemExit):
        reproduced(fake, tmp_path, "--seeds", "2", "--together", "2")
    assert str(path) in capsys.readouterr().err and fake.trained == []


def test_the_budget_ends_timing(tmp_path: Path) -> None:
    plan = planned("normscale", rows=["mlp-5*"], scale=SCALES["tiny"])
    fake = Fake()
    told: list[float] = []

    def times(recipes: Sequence[Recipe], images: object, machine: Machine, deadline: float) -> dict[str, float]:
        told.append(deadline)
        raise timing.OutOfTime

    tools = Tools(fake.train, fake.images, times)
    ends = time.monotonic() + 100
    outcome = Reproduction(Kept(tmp_path, Machine()), 1, ends, tools, quiet).run(plan)
    assert told == [ends] and outcome.stopped and outcome.reasons == {MLP: reproducing.TOO_LATE}
    with pytest.raises(timing.OutOfTime):
        timing.time_methods([find("digits/mlp/vanilla")], load("digits"), deadline=time.monotonic())


def test_training_is_told_the_deadline(tmp_path: Path) -> None:
    told: list[float | None] = []

    def train(recipe: Recipe, seeds: Sequence[int], folder: Path, machine: Machine, deadline: float | None) -> None:
        told.append(deadline)

    before = time.monotonic()
    reproduce.main(["snr", "--budget", "2", "--out", str(tmp_path)], Tools(train, Fake().images, Fake().times))
    assert told[0] is not None and before + 120 <= told[0] <= time.monotonic() + 120


def test_a_row_without_its_data_is_not_run_with_the_reason_and_the_others_are(tmp_path: Path) -> None:
    fake = Fake(lost=["stl10"])
    words = ["--rows", "*-b64", "--seeds", "1", "--methods", "vanilla", "snr"]
    text = reproduced(fake, tmp_path, *words, table="snr", unfinished="snr/densenet-stl10-b64")
    assert "- `snr/densenet-stl10-b64`: stl10 is not there" in text
    assert {name.split("/")[1] for name, _ in fake.trained} == {
        "vgg-cifar10-b64", "nin-cifar100-b64", "densenet-cifar100-b64"
    }  # fmt: skip


def test_a_row_too_large_for_the_device_is_passed_over_with_the_reason(tmp_path: Path) -> None:
    fake = Fake(full=["normscale/mlp-7x4000"])
    text = reproduced(fake, tmp_path, "--seeds", "1", unfinished="normscale/mlp-7x4000")
    assert "- `normscale/mlp-7x4000`: none: the device has too little memory (CUDA out of memory.); frobenius: " in text
    assert len(fake.trained) == 12


def test_a_method_too_large_for_the_device_leaves_the_later_ones_of_its_row(tmp_path: Path) -> None:
    fake = Fake(full=[f"{MLP}/frobenius"])
    text = reproduced(fake, tmp_path, "--rows", "mlp-5*", "--seeds", "2", unfinished=MLP)
    left = [name for name in METHODS if name != "frobenius"]
    assert fake.trained == [(f"{MLP}/{name}", seed) for seed in (0, 1) for name in left]
    assert fake.timed == [[f"{MLP}/{name}" for name in left]]
    assert f"- `{MLP}`: frobenius: the device has too little memory (CUDA out of memory.)" in text


def test_an_error_in_a_row_is_its_reason_and_the_others_are_run_reported_and_recorded(tmp_path: Path) -> None:
    fake, kept = Fake(broken=[f"{MLP}/spectral"]), tmp_path / "kept"
    text = reproduced(fake, tmp_path, "--rows", "mlp-*", "--seeds", "1", "--record", kept, unfinished=MLP)
    assert f"- `{MLP}`: [Errno 28] No space left on device" in text
    assert [name for name, _ in fake.trained] == [
        *(f"{MLP}/{name}" for name in METHODS[:2]),
        *(f"normscale/mlp-7x4000/{name}" for name in METHODS),
    ]
    assert {row.name: row.methods for row in records.read_all(kept)} == {
        MLP: ["none", "frobenius"],
        "normscale/mlp-7x4000": list(METHODS),
    }


def test_an_interrupt_leaves_the_report_and_record_of_what_is_finished(tmp_path: Path) -> None:
    fake = Fake()

    def train(*words: Any) -> list[dict[str, Any]] | None:
        if len(fake.trained) == 2:
            raise KeyboardInterrupt
        return fake.train(*words)

    words = ["normscale", "--scale", "tiny", "--out", str(tmp_path), "--record", str(tmp_path / "kept")]
    with pytest.raises(KeyboardInterrupt):
        reproduce.main(words, Tools(train, fake.images, fake.times))
    assert records.read_all(tmp_path / "kept")[0].methods == ["none", "frobenius"]
    assert "| none | 1 |" in (tmp_path / "tiny" / "normscale.md").read_text()


def test_a_damaged_or_foreign_result_or_checkpoint_is_told_before_anything_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "tiny"
    for name, file, content in (
        ("mlp-5x2000/ours", "result.json", b"{"),
        ("mlp-5x2000/none", "result.json", b"{}"),
        ("mlp-7x4000/none", "checkpoint.pt", b"no archive"),
    ):
        path = runs / "normscale" / name / "seed-1" / file
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    foreign = runs / "normscale/resnet50/none/seed-0"
    foreign.mkdir(parents=True)
    recipe = planned("normscale", rows=["resnet50"], scale=SCALES["cpu"])["normscale/resnet50"][0]
    checkpoint.save(foreign, checkpoint.identity_of(recipe, [0], Machine().settings))
    fake = Fake()
    with pytest.raises(SystemExit) as ended:
        reproduced(fake, tmp_path, "--seeds", "2")
    told = capsys.readouterr().err
    assert ended.value.code == 2 and fake.trained == []
    assert "mlp-5x2000/none/seed-1/result.json cannot be read (KeyError('recipe'))" in told
    assert "ours/seed-1/result.json cannot be read" in told and "none/seed-1/checkpoint.pt cannot be read" in told
    assert "resnet50/none/seed-0/checkpoint.pt is of another run: recipe.batch is" in told
    plan = planned("normscale", rows=["resnet50"], scale=SCALES["tiny"])
    checkpoint.save(foreign, checkpoint.identity_of(plan["normscale/resnet50"][0], [0], Machine().settings))
    kept = Kept(runs, Machine())
    kept.check(plan, 2)
    times = kept.times_path("normscale/resnet50")
    times.write_text("[")
    with pytest.raises(ValueError, match=r"times-\w+-float32.json cannot be read .* remove it to take times anew"):
        kept.check(plan, 2)


def test_methods_without_the_first_one_are_not_timed(tmp_path: Path) -> None:
    fake = Fake()
    reproduced(fake, tmp_path, "--rows", "mlp-5*", "--seeds", "1", "--methods", "spectral")
    assert fake.timed == []
    reproduced(fake, tmp_path, "--rows", "mlp-5*", "--seeds", "1")
    assert len(fake.timed) == 1 and len(fake.timed[0]) == 4


def test_scales_epochs_and_precisions_have_folders_of_their_own(tmp_path: Path) -> None:
    for words in ((), ("--epochs", "5"), ("--bf16",)):
        words = ("normscale", "--rows", "mlp-5*", "--seeds", "1", "--scale", "tiny", "--out", str(tmp_path), *words)
        reproduce.main(words, Fake().tools)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny", "tiny-5-epochs", "tiny-bf16"]


def test_a_finished_run_of_another_recipe_is_not_taken_for_this_one(tmp_path: Path) -> None:
    fake, plan = Fake(), planned("normscale", rows=["mlp-5*"], scale=SCALES["tiny"])
    kept = Kept(tmp_path, Machine())
    Reproduction(kept, 1, tools=fake.tools, tell=quiet).run(plan)
    other = planned("normscale", rows=["mlp-5*"], scale=SCALES["tiny"], epochs=9)
    with pytest.raises(ValueError, match=r"result.json is of another recipe, with other epochs"):
        kept.rows(other, 1)


@pytest.mark.parametrize("settings", [{"device": "cuda:0", "bf16": False}, {"device": "cpu", "bf16": True}])
def test_a_finished_run_of_another_device_or_precision_is_not_taken_for_this_one(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    kept, plan = Kept(tmp_path, Machine(device="cpu")), planned("normscale", rows=["mlp-5*"], scale=SCALES["tiny"])
    Reproduction(kept, 1, tools=Fake().tools, tell=quiet).run(plan)
    assert len(kept.rows(plan, 1)) == 1
    path = tmp_path / MLP / "ours" / "seed-0" / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "settings": settings}))
    with pytest.raises(ValueError, match=r"ours/seed-0/result.json was computed otherwise, .* instead of cpu float32"):
        kept.rows(plan, 1)


def test_times_of_another_precision_are_not_taken_for_these(tmp_path: Path) -> None:
    plan = planned("normscale", rows=["mlp-5*"], scale=SCALES["tiny"])
    fakes = [Fake(), Fake()]
    for fake, bf16 in zip(fakes, (False, True), strict=True):
        Reproduction(Kept(tmp_path / str(bf16), Machine(bf16=bf16)), 1, tools=fake.tools, tell=quiet).run(plan)
    (times,) = (tmp_path / "True" / MLP).glob("times-*.json")
    times.rename(tmp_path / "False" / MLP / times.name)
    (times,) = (tmp_path / "False" / MLP).glob("times-*-float32.json")
    times.unlink()
    again = Fake()
    Reproduction(Kept(tmp_path / "False", Machine()), 1, tools=again.tools, tell=quiet).run(plan)
    assert len(again.timed) == 1 and again.trained == []


def test_a_row_is_trained_timed_and_reported_on_real_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        x = torch.randint(256, (count, 3, 32, 32), generator=random, dtype=torch.uint8)
        return Split(x, torch.randint(100, (count,), generator=random))

    images = Images.of("cifar100", 100, split(300), split(200))
    monkeypatch.setattr(running, "images_of", lambda *_: images)
    monkeypatch.setattr(reproducing, "TIMED_STEPS", 2)
    monkeypatch.setattr(timing, "COLD", 1)
    words = ["normscale", "--rows", "mlp-5*", "--methods", "none", "spectral", "--seeds", "1"]
    words += ["--scale", "tiny", "--epochs", "1", "--device", "cpu"]
    out, kept = tmp_path / "out", tmp_path / "kept"
    reproduce.main([*words, "--out", str(out), "--record", str(kept)], Tools(images=lambda *_: images))
    text = (out / "tiny-1-epochs" / "normscale.md").read_text()
    lines = [line.split("|") for line in text.splitlines() if line.startswith(("| none |", "| spectral |"))]
    assert [line[2].strip() for line in lines] == ["1", "1"] and lines[0][-2].strip() == "1.00"
    (row,) = records.read_all(kept)
    assert row.methods == ["none", "spectral"] == list(row.times)
    starts = {json.dumps([run.epochs[name][0] for name in ("test_loss", "sigma_mean")]) for run in row.runs}
    assert len(starts) == 1
    assert row.of("spectral")[0].layers["head.weight"]["target"] == pytest.approx((100 / 250) ** 0.5, rel=1e-3)
