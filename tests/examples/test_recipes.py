"""The recipes by name, and that they say what the papers say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import reproduce
import torch
from papers import models, published, recipes
from papers.candidates import candidates
from papers.methods import optimizer_for, start_orthogonal
from papers.objective import PENALTIES, Batch, Objective
from papers.recipe import SCALES, Recipe, completed
from papers.recipes import find, names, rows


def test_every_cell_of_the_papers_has_a_recipe() -> None:
    cells = [f"{row}/{method}" for row, methods in published.CELLS.items() for method in methods]
    assert len(cells) == 8 * 4 + 4 * 3 + 3 * 3 + 9 * 4 + 3
    assert set(cells) <= set(names())


def test_a_name_is_the_row_and_the_method_and_no_two_are_alike() -> None:
    assert len(set(names())) == len(names())
    for name in names():
        assert find(name).name == name == f"{find(name).row}/{find(name).method.name}"


@pytest.mark.parametrize("wrong", ["snr/vgg-cifar10-b64/srn", "normscale/mlp-5x200/ours", "digit/mlp/snr"])
def test_a_wrong_name_lists_the_near_ones(wrong: str) -> None:
    near = {"srn": "snr/vgg-cifar10-b64/snr", "ours": "normscale/mlp-5x2000/ours", "snr": "digits/mlp/snr"}
    with pytest.raises(ValueError, match=f"recipe must be .* got '{wrong}'; near: .*{near[wrong.split('/')[-1]]}"):
        find(wrong)


def test_a_name_like_no_other_and_a_wrong_table_are_refused() -> None:
    with pytest.raises(ValueError, match=r"recipe must be .* got 'zzz'$"):
        find("zzz")
    with pytest.raises(ValueError, match="table must be one of snr, normscale, gradreg, got 'digits'"):
        rows("digits")


def test_a_candidate_of_the_search_is_a_recipe_of_its_row_that_no_table_lists() -> None:
    found, plain = find("normscale/mlp-5x2000/cap-8-gain-2"), find("normscale/mlp-5x2000/none")
    assert (found.row, found.validation, found.train) == (plain.row, 0.0, None)
    assert {**found.as_dict(), "name": plain.name, "method": plain.as_dict()["method"]} == plain.as_dict()
    (searched,) = (one for one in candidates(plain) if one.name == "search/normscale/mlp-5x2000/cap-8-gain-2")
    assert found.method == searched.method
    assert found.name not in names()
    assert found not in rows("normscale")[found.row]


def test_every_candidate_of_a_row_is_found_on_every_base_with_the_settings_of_that_base() -> None:
    for first in (find("digits/mlp/vanilla"), find("snr/vgg-cifar10-b512/vanilla"), find("normscale/resnet34/none")):
        for one in list(candidates(first))[1:]:
            assert find(one.name.removeprefix("search/")).method == one.method
    for first in (find("digits/mlp/adamw"), find("snr/vgg-cifar10-b512/snr-adamw")):
        for one in list(candidates(first))[1:]:
            found = find(f"{first.row}/{one.method.name}-adamw")
            assert replace(found.method, name=one.method.name) == one.method
            assert found.lr == first.lr


def test_a_name_of_the_search_and_a_wrong_candidate_list_the_near_recipes() -> None:
    for wrong in ("search/normscale/mlp-5x2000/cap-8-gain-2", "normscale/mlp-5x2000/cap-8-gain-3"):
        with pytest.raises(ValueError, match=r"near: .*normscale/mlp-5x2000/cap-8-gain-2"):
            find(wrong)


def test_patterns_choose_names_in_the_order_of_the_tables() -> None:
    assert names("normscale/mlp-5*/[ns]*") == tuple(
        f"normscale/mlp-5x2000/{method}" for method in ("none", "spectral", "none-published", "spectral-published")
    )
    assert names("nothing*") == ()


@pytest.mark.parametrize("table", recipes.TABLES)
def test_methods_of_a_row_differ_by_nothing_but_method_base_and_published_defects(table: str) -> None:
    for row in rows(table).values():
        first = row[0]
        for recipe in row:
            same = {**recipe.as_dict(), "name": first.name, "method": first.as_dict()["method"], "published": False}
            if recipe.method.base != first.method.base:
                same["lr"] = first.lr
            assert same == first.as_dict()


def test_learning_rates_of_sgd_are_the_papers_and_their_geometric_mean_between() -> None:
    def lr(row: str) -> float:
        return find(f"snr/{row}/vanilla").lr

    large_ones = {"vgg-cifar10": 0.1, "nin-cifar100": 1.0, "densenet-cifar100": 0.1, "densenet-stl10": 1.0}
    for network, large in large_ones.items():
        assert (lr(f"{network}-b64"), lr(f"{network}-b4096")) == (0.01, large)
        assert lr(f"{network}-b512") ** 2 == pytest.approx(0.01 * large)
        assert math.log2(512 / 64) == math.log2(4096 / 512)


def test_snr_rows_have_the_papers_settings() -> None:
    methods = {recipe.method.name: recipe.method for recipe in rows("snr")["snr/vgg-cifar10-b64"]}
    assert methods["weight-decay"].weight_decay == 1e-4
    assert methods["adversarial"].adversarial == 1.0
    assert methods["snr"].snr_lambda == methods["snr-adamw"].snr_lambda == 0.01
    assert find("snr/densenet-stl10-b4096/snr").threshold == 0.67
    assert find("snr/vgg-cifar10-b64-noise20/snr").label_noise == 0.2


def test_norm_scaling_falls_at_epochs_60_and_120_of_200() -> None:
    for row in rows("normscale").values():
        for recipe in row:
            assert (recipe.batch, recipe.lr, recipe.gamma, recipe.epochs) == (512, 1e-3, 0.1, 200)
            assert [part * recipe.epochs for part in recipe.milestones] == [60, 120]
            assert (recipe.method.base, recipe.method.weight_decay, recipe.start) == ("adamw", 0.0, "orthogonal")


def test_gradient_regularization_has_the_reports_settings() -> None:
    for name in names("gradreg/*"):
        recipe = find(name)
        size = recipe.train or 0
        steps = recipe.epochs * (size // recipe.batch)
        assert (recipe.batch, recipe.lr, recipe.gamma, recipe.milestones) == (50, 1e-3, 0.1, (0.5, 0.75))
        assert abs(steps - 10_000) <= 0.5 * size / recipe.batch
        assert (recipe.method.base, recipe.method.weight_decay, recipe.method.decayed) == ("adam", 5e-4, "convolutions")
        assert recipe.balanced == ("c4-" not in name) and (recipe.test, recipe.augment) == (None, False)
        assert len(recipe.measured) == 11 and recipe.measured[-1] == recipe.epochs
        assert (recipe.model == "lenet") == ("/wide-" in name) and recipe.model in ("lenet", "lenet5")
    nets = {
        row: find(f"gradreg/{row}/none").model_options for row in ("c2-baseline", "c2-batchnorm", "c2-dropout", "c6")
    }
    assert list(nets.values()) == [{}, {"batch_norm": True}, {"dropout": 0.5}, {"dropout": 0.5}]


def test_gradient_regularization_has_the_reports_lambdas() -> None:
    def weight(name: str) -> float:
        return find(f"gradreg/{name}").method.penalty_weight

    assert (weight("c2-batchnorm/spect-reg"), weight("c2-batchnorm/double-back")) == (0.001, 0.001)
    assert (weight("c2-dropout/spect-reg"), weight("c2-baseline/double-back")) == (0.01, 50)
    assert [weight(f"c6/{name}") for name in ("spect-reg", "jac-reg", "frob-reg")] == [0.03, 1, 0.03]
    for size, lambdas in ((500, [50, 0.03, 0.3, 0.01]), (10000, [5, 0.01, 1, 0.1]), (20000, [2, 0.001, 0.3, 0.03])):
        found = [weight(f"c4-{size}/{name}") for name in ("double-back", "spect-reg", "jac-reg", "confidence-penalty")]
        assert found == lambdas
    assert len({find(name).train for name in names("gradreg/c4-*/none")}) == 9


def test_the_same_function_of_pixels_in_0_1_has_penalties_over_the_squared_deviation() -> None:
    deviation, text = 0.308, " ".join(reproduce.PAGE.read_text(encoding="utf-8").split())
    assert f"`1/std² = {1 / deviation**2:.1f}` times as large" in text
    torch.manual_seed(0)
    model, pixels = torch.nn.Linear(6, 3).double(), torch.rand(5, 6, dtype=torch.float64, requires_grad=True)
    images = ((pixels - 0.131) / deviation).detach().requires_grad_()
    batch = Batch(images, torch.arange(5) % 3, projection=torch.randn(3, dtype=torch.float64))
    for name in ("double-back", "spect-reg", "frob-reg", "jac-reg"):
        penalty = PENALTIES[name]
        of_pixels = penalty(model((pixels - 0.131) / deviation), pixels, batch)
        assert of_pixels.item() == pytest.approx(penalty(model(images), images, batch).item() / deviation**2)


def test_c6_is_c2_on_the_dropout_net_by_other_penalties_and_has_none_of_ours_a_second_time() -> None:
    c2, c6 = (rows("gradreg")[f"gradreg/{row}"] for row in ("c2-dropout", "c6"))
    first, again = c2[0].as_dict(), c6[0].as_dict()
    assert {**first, "name": again["name"]} == again
    assert [recipe.method.name for recipe in c6] == ["none", "spect-reg", "jac-reg", "frob-reg"]
    assert [recipe.method.name for recipe in c2][-3:] == ["snr-adam", "spectral", "cap"]


def test_wide_rows_are_the_same_but_for_their_network() -> None:
    wide = [name for name in names("gradreg/wide-*")]
    assert {name.split("/")[1] for name in wide} == {
        f"wide-{row}" for row in ("c2-baseline", "c2-batchnorm", "c2-dropout", "c6", "c4-500", "c4-2000", "c4-10000")
    }
    for name in wide:
        plain = find(name.replace("wide-", ""))
        assert replace(plain, name=name, model="lenet") == find(name)


def test_candidates_decay_what_their_row_decays() -> None:
    method = find("gradreg/c2-baseline/cap-8-gain-2").method
    assert (method.weight_decay, method.decayed, method.base) == (5e-4, "convolutions", "adam")


def test_what_an_earlier_version_wrote_of_a_recipe_is_read_as_it_was_meant() -> None:
    for name in ("normscale/mlp-5x2000/ours", "snr/vgg-cifar10-b64/adversarial"):
        plain = json.loads(json.dumps(find(name).as_dict()))
        earlier = {key: value for key, value in plain.items() if key not in ("points", "balanced")}
        known = {key: value for key, value in plain["method"].items() if key not in ("decayed", "penalty")}
        found = completed(earlier | {"method": known})
        assert found == plain
        assert json.dumps(found) == json.dumps(plain), "in another order, so that a record changes by being read"


@pytest.mark.parametrize(
    ("epochs", "points", "found"), [(4, None, [0, 1, 2, 3, 4]), (7, 3, [0, 2, 5, 7]), (2, 5, [0, 1, 2])]
)
def test_points_are_spread_evenly_over_the_epochs(epochs: int, points: int | None, found: list[int]) -> None:
    assert replace(find("digits/mlp/vanilla"), epochs=epochs, points=points).measured == found


def test_published_defects_are_a_switch_that_is_off_in_the_stated_method() -> None:
    chosen = [name for name in names() if find(name).published]
    assert chosen == [name for name in names() if name.endswith("-published")]
    assert len(chosen) == 4 * 3


def test_every_data_set_has_a_recipe() -> None:
    used = {find(name).data for name in names()}
    assert used == {"digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "stl10"}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_every_recipe_can_be_scaled(scale: object) -> None:
    for name in names():
        found = find(name).scaled(scale)  # type: ignore[arg-type]
        assert isinstance(found, Recipe) and found.name == name


def test_a_scale_never_takes_more_images_than_the_recipe() -> None:
    recipe = find("gradreg/c4-500/none")
    assert [recipe.scaled(SCALES[name]).train for name in ("full", "half", "cpu", "tiny")] == [500, 500, 500, 256]
    assert [recipe.scaled(SCALES[name]).test for name in ("half", "cpu")] == [None, 1000]


# --- what recipes make ------------------------------------------------------------------------------------------------

SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "fashion-mnist": (1, 28, 28), "stl10": (3, 96, 96)}
"""Of images; all others are CIFAR's."""
CLASSES = {"cifar100": 100}
TINY = SCALES["tiny"]
ONE_OF_EACH = (
    *names("snr/vgg-cifar10-b64/*"),
    *names("normscale/resnet34/*"),
    *names("normscale/mlp-5x2000/*"),
    *names("digits/mlp/*"),
    *names("gradreg/c6/*"),
    *names("gradreg/c4-500/*"),
    *(f"{row}/snr" for row in ("snr/nin-cifar100-b4096", "snr/densenet-cifar100-b64", "mnist/lenet5")),
)


def made(recipe: Recipe) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """The recipe's network and a batch of 4."""
    torch.manual_seed(0)
    shape = SHAPES.get(recipe.data, (3, 32, 32))
    classes = CLASSES.get(recipe.data, 10)
    model = models.build(recipe.model, shape, classes, **recipe.model_options)
    return model, torch.randn(4, *shape), torch.randint(classes, (4,))


@pytest.mark.parametrize("row", sorted({find(name).row for name in names()}))
def test_every_row_builds_its_network_at_every_scale(row: str) -> None:
    recipe = find(names(f"{row}/*")[0]).scaled(TINY)
    model, images, _ = made(recipe)
    assert model.eval()(images[:2]).shape == (2, CLASSES.get(recipe.data, 10))
    with torch.device("meta"):
        assert made(find(recipe.name))[0] is not None


@pytest.mark.filterwarnings("ignore:the first step moves")  # where targets are not what weights start with
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_step_of_each_method_changes_every_weight_and_keeps_it_finite(name: str) -> None:
    recipe = find(name).scaled(TINY)
    model, images, labels = made(recipe)
    if recipe.start == "orthogonal":
        start_orthogonal(model, images, 0)
    optimizer = optimizer_for(
        recipe.method, model, images, lr=recipe.lr, momentum=recipe.momentum, one_target=recipe.published
    )
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    Objective(recipe.method, model, list(model.parameters())).fill_gradients(Batch(images, labels))
    optimizer.step()
    for key, weight in model.named_parameters():
        assert weight.isfinite().all() and not torch.equal(weight, before[key]), key


def test_methods_of_a_row_start_from_the_same_weights() -> None:
    starts = []
    for name in names("normscale/mlp-5x2000/*"):
        model, images, _ = made(find(name).scaled(TINY))
        start_orthogonal(model, images, 7)
        starts.append(torch.cat([weight.flatten() for weight in model.parameters()]))
    assert all(torch.equal(start, starts[0]) for start in starts)


def test_published_runs_have_one_target_and_stated_ones_each_their_own() -> None:
    def targets(method: str) -> list[float]:
        recipe = find(f"normscale/mlp-5x2000/{method}").scaled(TINY)
        model, images, _ = made(recipe)
        optimizer = optimizer_for(recipe.method, model, images, lr=1e-3, momentum=0, one_target=recipe.published)
        lists = [group["target"] for group in optimizer.param_groups if isinstance(group.get("target"), list)]
        return [target for targets in lists for target in targets if target is not None]

    width = 250
    sizes = [3072, *[width] * 4, 100]
    own = [(b / a) ** 0.5 for a, b in pairwise(sizes)]
    assert targets("spectral") == pytest.approx(own)
    assert targets("spectral-published") == pytest.approx([own[0]] * 5)
    assert targets("ours") == pytest.approx([2 * target for target in own[:4]])
