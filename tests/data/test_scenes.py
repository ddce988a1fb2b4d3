"""The built-in scenes: reproducible, balanced, and neither trivial nor hopeless."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from maskdistill.data.scenes import Scenes


def test_the_same_arguments_give_the_same_scenes() -> None:
    first, second = Scenes(40, 32, seed=3), Scenes(40, 32, seed=3)
    assert np.array_equal(first.images, second.images)
    assert np.array_equal(first.masks, second.masks)


@pytest.mark.parametrize("count", [1, 7, 13, 200])
def test_a_shorter_data_set_is_a_prefix_of_a_longer_one(count: int) -> None:
    longer, shorter = Scenes(201, 24), Scenes(count, 24)
    assert np.array_equal(longer.images[:count], shorter.images)
    assert np.array_equal(longer.masks[:count], shorter.masks)
    assert np.array_equal(longer.labels[:count], shorter.labels)


def test_splits_and_seeds_share_no_image() -> None:
    data_sets = [
        Scenes(60, 24),
        Scenes(60, 24, split="val"),
        Scenes(60, 24, seed=1),
        Scenes(60, 24, split="val", seed=1),
    ]
    assert len({image.tobytes() for scenes in data_sets for image in scenes.images}) == 4 * 60


def test_arrays_and_items_have_the_documented_form() -> None:
    scenes = Scenes(30, 40, split="val")
    assert len(scenes) == 30
    assert (scenes.images.shape, scenes.images.dtype) == ((30, 40, 40, 3), np.dtype(np.uint8))
    assert (scenes.masks.shape, scenes.masks.dtype) == ((30, 40, 40), np.dtype(np.bool_))
    assert (scenes.labels.shape, scenes.labels.dtype) == ((30,), np.dtype(np.int64))
    image, label = scenes[-1]
    assert isinstance(image, Image.Image)
    assert (image.mode, image.size) == ("RGB", (40, 40))
    assert type(label) is int
    assert label == scenes.labels[-1]
    assert np.array_equal(np.asarray(image), scenes.images[-1])
    with pytest.raises(IndexError):
        scenes[30]


def test_every_prefix_is_balanced() -> None:
    scenes = Scenes(100, 16)
    assert len(set(scenes.classes)) == len(scenes.classes) >= 10
    for count in (1, 10, 37, 100):
        per_class = np.bincount(scenes.labels[:count], minlength=len(scenes.classes))
        assert per_class.max() - per_class.min() <= 1


@pytest.mark.parametrize("size", [16, 48, 64])
def test_every_mask_shows_an_object_and_a_background(size: int) -> None:
    area = Scenes(330, size).masks.mean(axis=(1, 2))
    assert area.min() > 0.05
    assert area.max() < 0.7
    assert 0.15 < area.mean() < 0.35


def test_a_mask_follows_its_object() -> None:
    """Objects are saturated and backgrounds faint, so the mask must separate the two."""
    scenes = Scenes(110, 48)
    colour = np.ptp(scenes.images.astype(np.float32), axis=-1)
    for colourful, mask in zip(colour, scenes.masks, strict=True):
        assert colourful[mask].mean() > colourful[~mask].mean()


def test_no_global_generator_is_read_or_moved() -> None:
    def draws() -> list[float]:
        np.random.seed(1)
        torch.manual_seed(1)
        scenes.append(Scenes(20, 24))
        return [float(np.random.rand()), float(torch.rand(()))]

    scenes = [Scenes(20, 24)]
    after = draws()
    np.random.seed(1)
    torch.manual_seed(1)
    assert after == [float(np.random.rand()), float(torch.rand(()))]
    assert np.array_equal(scenes[0].images, scenes[1].images)


def test_raw_pixels_give_the_class_away_only_in_part() -> None:
    train, val = Scenes(5000), Scenes(500, split="val")

    def pixels(scenes: Scenes, side: int) -> torch.Tensor:
        images = torch.from_numpy(scenes.images).permute(0, 3, 1, 2).float() / 255
        small = torch.nn.functional.interpolate(images, size=(side, side), mode="area")
        return torch.nn.functional.normalize(small.flatten(1), dim=1)

    for side in (16, 48):
        similarity, nearest = (pixels(val, side) @ pixels(train, side).T).topk(20)
        votes = torch.zeros(len(val), len(train.classes))
        votes.scatter_add_(1, torch.from_numpy(train.labels)[nearest], (similarity / 0.07).exp())
        accuracy = float((votes.argmax(1) == torch.from_numpy(val.labels)).float().mean())
        assert 2 / len(train.classes) < accuracy < 0.5


@pytest.mark.parametrize(
    ("arguments", "options", "wanted"),
    [
        ((0,), {}, "at least one image, got count=0"),
        ((-3,), {}, "at least one image, got count=-3"),
        ((5, 8), {}, "at least 16 pixels, got size=8"),
        ((5,), {"split": "test"}, "'train', 'val'.*split='test'"),
        ((5,), {"seed": -1}, "non-negative seed, got seed=-1"),
    ],
)
def test_bad_arguments_are_refused_in_words(
    arguments: tuple[int, ...], options: dict[str, object], wanted: str
) -> None:
    with pytest.raises(ValueError, match=wanted):
        Scenes(*arguments, **options)  # type: ignore[arg-type]
