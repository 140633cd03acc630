"""Batches repeat bit for bit whatever came before, give each image at most once an epoch, and hold one uint8 copy."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import Any

import pytest
import torch
from papers.data import Batches, evaluation
from papers.data.augment import crop, draw
from papers.data.batches import Batch
from papers.data.seeding import Use, generator
from torch import Tensor

MEAN, STD = (0.5, 0.25, 0.4), (0.2, 0.3, 0.1)


def numbered(count: int) -> tuple[Tensor, Tensor]:
    """Noise and, in place of labels, the number of the image."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 10, 12), dtype=torch.uint8, generator=generator), torch.arange(count)


def made(count: int = 103, size: int = 10, device: torch.device | str = "cpu", **options: Any) -> Batches:
    x, y = numbered(count)
    settings = {"mean": MEAN, "std": STD, "augment": True, "seed": 0} | options
    return Batches(x.to(device), y.to(device), size, **settings)


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    for (x, y), (again_x, again_y) in zip(first, second, strict=True):
        assert torch.equal(x, again_x)
        assert torch.equal(y, again_y)


def normalized(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    return ((x.double() / 255 - mean) / std).float()


@pytest.mark.parametrize("augment", [True, False])
def test_an_epoch_repeats_bit_for_bit_whatever_ran_before(augment: bool, device: torch.device) -> None:
    straight, resumed = made(device=device, augment=augment), made(device=device, augment=augment)
    epochs = [list(straight.epoch(i)) for i in range(4)]
    next(straight.epoch(9))
    torch.manual_seed(99)
    torch.rand(7, device=device)
    assert_same(epochs[3], list(resumed.epoch(3)))
    assert_same(epochs[1], list(straight.epoch(1)))


def test_two_epochs_read_in_turn_do_not_disturb_each_other() -> None:
    batches = made()
    alone = list(batches.epoch(0)), list(batches.epoch(1))
    in_turn = list(zip(batches.epoch(0), batches.epoch(1), strict=True))
    assert_same(alone[0], [pair[0] for pair in in_turn])
    assert_same(alone[1], [pair[1] for pair in in_turn])


def test_no_two_uses_epochs_or_seeds_have_one_generator() -> None:
    states = {generator(use, seed, i).initial_seed() for use in Use for seed in range(4) for i in range(4)}
    assert len(states) == len(Use) * 16


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    list(made().epoch(0))
    assert torch.equal(before, torch.get_rng_state())


def test_epochs_and_seeds_differ_from_each_other() -> None:
    orders = [
        tuple(torch.cat([y for _, y in made(seed=seed).epoch(i)]).tolist())
        for seed, i in itertools.product(range(4), range(4))
    ]
    assert len(set(orders)) == 16


@pytest.mark.parametrize(("count", "size"), [(103, 10), (103, 7), (100, 10), (103, 103), (5, 1)])
def test_an_epoch_is_whole_batches_with_no_image_twice(count: int, size: int) -> None:
    batches = made(count, size)
    found = list(batches.epoch(0))
    assert len(found) == batches.steps == count // size
    assert all(x.shape == (size, 3, 10, 12) and y.shape == (size,) for x, y in found)
    seen = torch.cat([y for _, y in found]).tolist()
    assert len(set(seen)) == len(seen)


def test_the_images_left_over_come_in_other_epochs() -> None:
    batches = made(19, 10)
    seen = Counter(n for i in range(60) for _, y in batches.epoch(i) for n in y.tolist())
    assert len(seen) == 19
    assert max(seen.values()) < 60


def test_images_without_augmenting_are_normalized_and_go_with_their_labels(device: torch.device) -> None:
    x, _ = numbered(103)
    for images, y in made(device=device, augment=False).epoch(0):
        assert images.dtype == torch.float32
        torch.testing.assert_close(images.cpu(), normalized(x[y.cpu()]), rtol=1e-6, atol=2e-6)


def test_augmented_images_are_a_crop_of_the_image_of_their_label() -> None:
    x, _ = numbered(103)
    places = torch.tensor(list(itertools.product(range(9), range(9), range(2))))
    kinds = set()
    for images, labels in made().epoch(0):
        for image, y in zip(images, labels, strict=True):
            every = normalized(crop(x, y.repeat(len(places)), places))
            same = (every - image).abs().amax((1, 2, 3)) < 1e-5
            assert same.sum() == 1
            kinds.add(tuple(places[same][0].tolist()))
    assert len(kinds) > 50
    assert {mirrored for *_, mirrored in kinds} == {0, 1}


def test_without_flip_nothing_is_mirrored() -> None:
    x, _ = numbered(103)
    upright = torch.tensor(list(itertools.product(range(9), range(9), [0])))
    images, labels = next(made(flip=False).epoch(0))
    for image, y in zip(images, labels, strict=True):
        every = normalized(crop(x, y.repeat(len(upright)), upright))
        assert ((every - image).abs().amax((1, 2, 3)) < 1e-5).sum() == 1


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_the_memory_format_is_honoured_and_changes_no_value(augment: bool, memory_format: torch.memory_format) -> None:
    chosen = list(made(augment=augment, memory_format=memory_format).epoch(0))
    assert all(images.is_contiguous(memory_format=memory_format) for images, _ in chosen)
    assert_same(chosen, list(made(augment=augment).epoch(0)))
    x, y = numbered(20)
    tested = evaluation(x, y, 8, MEAN, STD, augment, memory_format=memory_format)
    assert all(images.is_contiguous(memory_format=memory_format) for images, _ in tested)


def test_the_images_are_held_once_and_left_as_they_are() -> None:
    x, y = numbered(103)
    before = x.clone()
    batches = Batches(x, y, 10, mean=MEAN, std=STD, augment=False, seed=0)
    for images, labels in batches.epoch(0):
        images.zero_()
        labels.zero_()
    for images, labels in evaluation(x, y, 103, MEAN, STD):
        images.zero_()
        labels.zero_()
    assert torch.equal(x, before)
    assert torch.equal(y, torch.arange(103))
    held = [value for value in vars(batches).values() if isinstance(value, Tensor) and value.numel() >= x.numel()]
    assert [value.data_ptr() for value in held] == [x.data_ptr()]


@pytest.mark.parametrize(("size", "last"), [(10, 3), (103, 103), (500, 103), (1, 1)])
def test_evaluation_gives_all_images_in_order_with_a_short_last_batch(
    size: int, last: int, device: torch.device
) -> None:
    x, y = numbered(103)
    found = list(evaluation(x.to(device), y.to(device), size, MEAN, STD))
    assert torch.equal(torch.cat([labels for _, labels in found]).cpu(), y)
    assert len(found[-1][0]) == len(found[-1][1]) == last
    images = torch.cat([images for images, _ in found]).cpu()
    torch.testing.assert_close(images, normalized(x), rtol=1e-6, atol=2e-6)


def test_augmented_evaluation_is_in_order_and_goes_by_its_seed() -> None:
    x, y = numbered(103)
    first, again, other = (list(evaluation(x, y, 40, MEAN, STD, augment=True, seed=seed)) for seed in (0, 0, 1))
    assert_same(first, again)
    assert torch.equal(torch.cat([labels for _, labels in first]), y)
    assert not torch.equal(first[0][0], other[0][0])
    middle = torch.cat([images for images, _ in first]) == normalized(x)
    assert middle.float().mean() < 0.5


def test_flip_mirrors_half_of_the_images() -> None:
    mirrored = draw(10_000, torch.Generator().manual_seed(0), flip=True)[:, 2].float().mean()
    assert abs(mirrored - 0.5) < 0.025


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"size": 104}, "size must be at most the 103 images there are, got a batch of 104"),
        ({"size": 0}, "size must be a batch of 1 or more, got 0"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"mean": (0.5,)}, "mean and std must be 3 numbers, std positive, got (0.5,)"),
        ({"std": (0.2, 0.0, 0.1)}, "mean and std must be 3 numbers, std positive"),
        ({"x": torch.zeros(103, 3, 10, 12)}, "x must be images (N, C, H, W) uint8, got (103, 3, 10, 12) torch.float32"),
        ({"y": torch.arange(102)}, "y must be (103,) on cpu, got (102,) on cpu"),
        ({"x": torch.zeros(103, 3, 4, 12, dtype=torch.uint8)}, "augment needs images larger than its padding of 4"),
    ],
)
def test_batches_that_cannot_be_are_refused_by_the_constructor(change: dict[str, Any], told: str) -> None:
    x, y = numbered(103)
    arguments = {"x": x, "y": y, "size": 10, "mean": MEAN, "std": STD, "augment": True, "seed": 0} | change
    with pytest.raises(ValueError, match=re.escape(told)):
        Batches(**arguments)
    if "size" not in change or not change["size"]:
        with pytest.raises(ValueError, match=re.escape(told)):
            evaluation(**arguments)


def test_an_epoch_before_the_first_is_refused_when_asked_for() -> None:
    with pytest.raises(ValueError, match="i must be an epoch from 0, got -1"):
        made().epoch(-1)
