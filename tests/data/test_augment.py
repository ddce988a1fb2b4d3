"""Crops: their boxes, their distribution, and their independence of everything but the seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from maskdistill.data import (
    BatchStream,
    CropDataset,
    MultiCrop,
    augment,
    crop_loader,
    derive_seed,
    normalize,
    resize_for_evaluation,
)


def gradient(width: int = 80, height: int = 60) -> Image.Image:
    """Red grows to the right and green downwards, so a crop's colours tell where it lies."""
    x = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    y = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))


class One(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, count: int = 10) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return gradient(), 0


def test_shapes() -> None:
    crops = MultiCrop(32, 16, local_crops=3)(gradient())
    assert [tuple(c.shape) for c in crops.images] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 3
    assert all(c.dtype == torch.uint8 for c in crops.images)
    assert crops.boxes.shape == (5, 4)
    assert crops.flipped.shape == (5,)


def test_boxes_and_flips_say_where_a_crop_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MultiCrop, "_colour", lambda self, crop, blur, solarize: crop)
    torch.manual_seed(0)
    flips = 0
    for _ in range(20):
        crops = MultiCrop(32, 16, local_crops=2)(gradient())
        for image, box, flipped in zip(crops.images, crops.boxes, crops.flipped, strict=True):
            left, top, right, bottom = (255 * box).tolist()
            red, green = image[0].float(), image[1].float()
            columns = red.mean(dim=0).flip(0) if flipped else red.mean(dim=0)
            assert float(columns[0]) == pytest.approx(left, abs=9)
            assert float(columns[-1]) == pytest.approx(right, abs=9)
            assert float(green[0].mean()) == pytest.approx(top, abs=9)
            assert float(green[-1].mean()) == pytest.approx(bottom, abs=9)
            flips += int(flipped)
    assert 20 < flips < 60


def test_scales_are_kept() -> None:
    torch.manual_seed(0)
    transform = MultiCrop(8, 8, 2, global_scale=(0.5, 1.0), local_scale=(0.1, 0.3))
    boxes = torch.stack([transform(gradient()).boxes for _ in range(200)])
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    assert float(area[:, :2].min()) > 0.46
    assert float(area[:, :2].max()) <= 1
    assert float(area[:, 2:].min()) > 0.08
    assert float(area[:, 2:].max()) < 0.33
    assert float(area[:, 2:].mean()) == pytest.approx(0.2, abs=0.02)


def test_colours_are_augmented_as_often_as_in_dino(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, int] = {"jitter": 0, "grey": 0, "blur": 0, "solarize": 0}

    def count(name: str):  # type: ignore[no-untyped-def]
        def counted(image: Image.Image, *args: object, **kwargs: object) -> Image.Image:
            calls[name] += 1
            return image

        return counted

    monkeypatch.setattr(augment, "_JITTER", count("jitter"))
    monkeypatch.setattr(augment, "_blur", count("blur"))
    monkeypatch.setattr(augment.TF, "rgb_to_grayscale", count("grey"))
    monkeypatch.setattr(augment.TF, "solarize", count("solarize"))
    torch.manual_seed(0)
    n, transform = 600, MultiCrop(8, 8, 2)
    for _ in range(n):
        transform(gradient(16, 16))
    assert calls["jitter"] / (4 * n) == pytest.approx(0.8, abs=0.03)
    assert calls["grey"] / (4 * n) == pytest.approx(0.2, abs=0.03)
    assert calls["blur"] / n == pytest.approx(1.0 + 0.1 + 2 * 0.5, abs=0.12)
    assert calls["solarize"] / n == pytest.approx(0.2, abs=0.05)


def test_crops_depend_on_seed_epoch_and_image_alone() -> None:
    dataset = CropDataset(One(), MultiCrop(16, 8, 2), seed=0)
    torch.manual_seed(1)
    first = dataset[0, 3]
    state = torch.random.get_rng_state()
    dataset[0, 4]
    again = dataset[0, 3]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.images, again.images, strict=True))
    for other in (dataset[1, 3], dataset[0, 4], CropDataset(One(), dataset.transform, 1)[0, 3]):
        assert not torch.equal(other.boxes, first.boxes)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_goes_on_where_it_stopped(workers: int) -> None:
    dataset = CropDataset(One(), MultiCrop(16, 8, 1), seed=0)

    def boxes(start: int) -> list[torch.Tensor]:
        stream = BatchStream(10, 4, start=start, stop=6, seed=0)
        return [crops.boxes for crops in crop_loader(dataset, stream, workers=workers)]

    whole, rest = boxes(0), boxes(3)
    assert whole[0].shape == (4, 3, 4)
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], rest, strict=True))


def test_each_epoch_is_a_permutation_shared_by_the_ranks() -> None:
    def items(rank: int) -> list[list[tuple[int, int]]]:
        return list(BatchStream(13, 3, start=0, stop=4, seed=0, rank=rank, world=2))

    first, second = items(0), items(1)
    assert [{epoch for epoch, _ in batch} for batch in first] == [{0}, {0}, {1}, {1}]
    for epoch in (0, 1):
        seen = [i for batch in first + second for e, i in batch if e == epoch]
        assert len(set(seen)) == len(seen) == 12
    assert first[0] != [(0, i) for _, i in first[2]]
    with pytest.raises(ValueError, match="do not fill one step"):
        BatchStream(5, 3, start=0, stop=1, seed=0, world=2)


def test_seeds_differ() -> None:
    seeds = {derive_seed(0, "masks", step, rank) for step in range(50) for rank in range(4)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_evaluation_images() -> None:
    image = gradient(100, 50)
    assert resize_for_evaluation(image, 32).shape == (3, 32, 32)
    whole = resize_for_evaluation(image, 32, crop=False)
    assert float(whole[0, :, 0].float().mean()) < 10
    assert float(whole[0, :, -1].float().mean()) > 245
    centre = resize_for_evaluation(image, 32)
    assert float(centre[0, :, 0].float().mean()) > 50, "the sides are cut off"


def test_normalize() -> None:
    images = torch.full((2, 3, 1, 1), 255, dtype=torch.uint8)
    expected = torch.tensor([(1 - m) / s for m, s in zip(augment.MEAN, augment.STD, strict=True)])
    torch.testing.assert_close(normalize(images)[0, :, 0, 0], expected)
