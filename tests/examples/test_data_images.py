"""Images knows its mean and standard deviation, and its parts hold what they say and nothing else."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from papers.data import Images, images
from papers.data.reading import Split
from torch import Tensor

CLASSES = 5


def numbered(count: int, first: int, classes: int = CLASSES) -> Split:
    """Images that differ all, the number of each in its first two pixels, and its label from that number."""
    number = torch.arange(first, first + count)
    x = torch.randint(0, 256, (count, 3, 6, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(first))
    x[:, 0, 0, 0], x[:, 0, 0, 1] = (number // 256).to(torch.uint8), (number % 256).to(torch.uint8)
    return Split(x, number % classes)


def number(x: Tensor) -> list[int]:
    return (x[:, 0, 0, 0].long() * 256 + x[:, 0, 0, 1].long()).tolist()


@pytest.fixture
def data() -> Images:
    return Images.of("made", CLASSES, numbered(600, 0), numbered(50, 1000))


def test_mean_and_std_are_those_of_all_training_pixels_by_channel(
    data: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled = data.train_x.double() / 255
    for chunk in (7, 600, 4096):
        monkeypatch.setattr(images, "CHUNK", chunk)
        mean, std = images.mean_and_std(data.train_x)
        torch.testing.assert_close(torch.tensor(mean, dtype=torch.float64), scaled.mean((0, 2, 3)), rtol=1e-13, atol=0)
        expected = scaled.std((0, 2, 3), correction=0)
        torch.testing.assert_close(torch.tensor(std, dtype=torch.float64), expected, rtol=1e-13, atol=0)
    assert (mean, std) == (data.mean, data.std)


def test_mean_and_std_stay_those_of_the_whole_training_set(data: Images) -> None:
    for part in (data.subset(9, 9, 0), data.validation(9, 0), data.with_label_noise(0.5, 0)):
        assert (part.mean, part.std) == (data.mean, data.std)
        assert (part.name, part.classes, part.shape) == ("made", CLASSES, (3, 6, 7))


def test_subset_draws_without_replacement_and_keeps_labels(data: Images) -> None:
    part = data.subset(100, 20, seed=3)
    train, test = number(part.train_x), number(part.test_x)
    assert len(set(train)) == 100
    assert len(set(test)) == 20
    assert set(train) <= set(range(600))
    assert set(test) <= set(range(1000, 1050))
    assert part.train_y.tolist() == [n % CLASSES for n in train]
    assert part.test_y.tolist() == [n % CLASSES for n in test]


def test_subset_of_one_seed_is_the_same_and_part_of_a_larger_one(data: Images) -> None:
    small, again, large = data.subset(100, 20, 3), data.subset(100, 20, 3), data.subset(200, 30, 3)
    assert number(small.train_x) == number(again.train_x) == number(large.train_x)[:100]
    assert number(small.test_x) == number(large.test_x)[:20]
    assert number(small.train_x) != number(data.subset(100, 20, 4).train_x)


def test_validation_parts_the_training_set_and_has_nothing_of_the_test_set(data: Images) -> None:
    part = data.validation(150, seed=1)
    train, held = number(part.train_x), number(part.test_x)
    assert sorted(train + held) == list(range(600))
    assert len(held) == 150
    assert part.test_y.tolist() == [n % CLASSES for n in held]
    assert part.train_y.tolist() == [n % CLASSES for n in train]
    assert held == number(data.validation(150, seed=1).test_x) != number(data.validation(150, seed=2).test_x)


def test_label_noise_changes_just_that_fraction_and_only_training_labels(data: Images) -> None:
    noisy = data.with_label_noise(0.2, seed=0)
    assert (noisy.train_y != data.train_y).sum() == 120
    assert torch.equal(noisy.test_y, data.test_y)
    assert noisy.train_x is data.train_x
    assert torch.equal(data.train_y, torch.arange(600) % CLASSES)
    assert torch.equal(noisy.train_y, data.with_label_noise(0.2, seed=0).train_y)
    assert not torch.equal(noisy.train_y, data.with_label_noise(0.2, seed=1).train_y)


def test_label_noise_draws_evenly_from_the_other_classes() -> None:
    x = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(80, 1, 1, 1)
    one_class = Split(x, torch.full((len(x),), 2))
    noisy = Images.of("made", CLASSES, one_class, one_class).with_label_noise(1.0, seed=0).train_y
    counts = noisy.bincount(minlength=CLASSES)
    assert counts[2] == 0
    expected = len(x) / 4
    others = counts[[0, 1, 3, 4]]
    assert ((others - expected).abs() < 5 * (expected * 0.75) ** 0.5).all()


def test_one_seed_holds_out_other_images_than_get_a_wrong_label(data: Images) -> None:
    wrong = set((data.with_label_noise(0.25, seed=0).train_y != data.train_y).nonzero().flatten().tolist())
    held = set(number(data.validation(150, seed=0).test_x))
    kept = set(number(data.subset(150, 1, seed=0).train_x))
    for a, b in ((wrong, held), (wrong, kept), (held, kept)):
        assert 15 < len(a & b) < 60


def test_no_label_noise_changes_nothing(data: Images) -> None:
    assert torch.equal(data.with_label_noise(0.0, seed=0).train_y, data.train_y)


def test_digits_are_not_mirrored_and_pictures_are(data: Images) -> None:
    names = ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "stl10")
    assert [replace(data, name=name).flips for name in names] == [False, False, True, True, True, True]


def test_parts_are_the_same_on_every_device(data: Images, device: torch.device) -> None:
    moved = data.to(device)
    assert moved.train_x.device.type == moved.test_y.device.type == device.type
    for part, there in (
        (data.subset(9, 8, 0), moved.subset(9, 8, 0)),
        (data.validation(9, 0), moved.validation(9, 0)),
        (data.with_label_noise(0.3, 0), moved.with_label_noise(0.3, 0)),
    ):
        assert torch.equal(part.train_x, there.train_x.cpu())
        assert torch.equal(part.train_y, there.train_y.cpu())
        assert torch.equal(part.test_y, there.test_y.cpu())


@pytest.mark.parametrize(
    ("call", "arguments", "told"),
    [
        ("subset", (601, 50, 0), "train must be 1 to 600 images of made, got 601"),
        ("subset", (600, 0, 0), "test must be 1 to 50 images of made, got 0"),
        ("validation", (600, 0), "count must be 1 to 599 of made's training set, got 600"),
        ("validation", (0, 0), "count must be 1 to 599 of made's training set, got 0"),
        ("subset", (1, 1, -1), "seed must be 0 or more, got -1"),
        ("with_label_noise", (1.1, 0), "fraction must be 0 to 1, got 1.1"),
        ("with_label_noise", (float("nan"), 0), "fraction must be 0 to 1, got nan"),
    ],
)
def test_parts_that_cannot_be_are_refused(data: Images, call: str, arguments: Any, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        getattr(data, call)(*arguments)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"train_x": torch.zeros(600, 3, 6, 7)},
            "train_x must be (N, C, H, W) uint8, got (600, 3, 6, 7) torch.f",
        ),
        ({"test_x": torch.zeros(50, 1, 6, 7, dtype=torch.uint8)}, "test_x must be (N, C, H, W) uint8"),
        ({"train_y": torch.zeros(599).long()}, "train_y must be (600,) int64, got (599,) torch.int64"),
        ({"test_y": torch.zeros(50).int()}, "test_y must be (50,) int64, got (50,) torch.int32"),
        ({"classes": 4}, "train_y must be labels 0 to 3, one at least"),
        ({"mean": (0.5,)}, "mean and std must be 3 numbers, std positive, got (0.5,)"),
        ({"std": (1.0, 0.0, 1.0)}, "mean and std must be 3 numbers, std positive"),
    ],
)
def test_images_refuse_tensors_that_do_not_belong_together(data: Images, change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        replace(data, **change)


def test_images_all_alike_are_refused() -> None:
    plain = Split(torch.full((4, 1, 2, 2), 7, dtype=torch.uint8), torch.zeros(4).long())
    with pytest.raises(ValueError, match="std positive"):
        Images.of("made", 1, plain, plain)


def test_a_balanced_choice_has_as_many_of_each_class_and_is_part_of_a_larger_one() -> None:
    labels = torch.arange(60) % 3
    x = torch.arange(60, dtype=torch.uint8).view(60, 1, 1, 1).expand(60, 1, 2, 2).contiguous()
    images = Images.of("some", 3, Split(x, labels), Split(x[:5], labels[:5]))
    small, large = (images.subset(count, 5, 7, balanced=True) for count in (6, 30))
    for chosen, each in ((small, 2), (large, 10)):
        assert chosen.train_y.bincount().tolist() == [each] * 3
        assert torch.equal(chosen.train_x[:, 0, 0, 0] % 3, chosen.train_y)
    assert set(small.train_x[:, 0, 0, 0].tolist()) < set(large.train_x[:, 0, 0, 0].tolist())
    assert not torch.equal(small.train_x, images.subset(6, 5, 8, balanced=True).train_x)
    assert not torch.equal(small.train_y, small.train_y.sort()[0])


@pytest.mark.parametrize("count", [7, 63])
def test_a_balanced_choice_that_the_classes_cannot_give_is_refused(count: int) -> None:
    labels = torch.cat([torch.arange(60) % 3, torch.zeros(10, dtype=torch.int64)])
    x = torch.randint(256, (70, 1, 2, 2), dtype=torch.uint8)
    images = Images.of("some", 3, Split(x, labels), Split(x, labels))
    with pytest.raises(ValueError, match=f"train must be a multiple of 3 classes, of 20 images each, got {count}"):
        images.subset(count, 5, 0, balanced=True)
