"""Crops: their boxes, their distribution, and their independence of everything but the seed."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from maskdistill.data import (
    BatchStream,
    CropDataset,
    MultiCrop,
    derive_seed,
    normalize,
    resize_for_evaluation,
)
from maskdistill.data import crops as augment
from maskdistill.data.crops import image_keys
from tests.data.pictures import collate_crops, gradient, scenes, to_pillow
from tests.data.pil_crops import PillowCrops


class One(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, count: int = 10) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return gradient(), 0


def test_boxes_and_flips_say_where_a_crop_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "colour_", lambda images, colours: images)
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


def test_colours_are_augmented_as_often_as_in_dino() -> None:
    n, transform = 3000, MultiCrop(224, 96, 2)
    sampled = transform.sample(torch.arange(n), torch.tensor([[60, 80]]).expand(n, 2))
    blur, solarize = (x.float().mean(dim=0).tolist() for x in (sampled.sigma > 0, sampled.solarize))
    assert blur == pytest.approx([1.0, 0.1, 0.5, 0.5], abs=0.04)
    assert solarize == pytest.approx([0.0, 0.2, 0.0, 0.0], abs=0.03)
    assert float(sampled.sigma[:, 0].min()) == pytest.approx(0.1, abs=0.01)
    assert float(sampled.sigma[:, 0].max()) == pytest.approx(2.0, abs=0.01)
    small = MultiCrop(56, 24, 2).sample(torch.arange(n), torch.tensor([[60, 80]]).expand(n, 2))
    assert float(small.sigma.max()) == pytest.approx(0.5, abs=0.01)


def test_the_views_are_those_of_the_pillow_pipeline() -> None:
    """Box edges, channel means, spreads and histograms of many crops, view by view."""
    n = 1000
    transform = MultiCrop(24, 16, 1, global_scale=(0.5, 1.0), local_scale=(0.1, 0.3))
    images = [to_pillow(x) for x in scenes(20, 48)] * (n // 20)
    torch.manual_seed(3)
    reference = PillowCrops(transform)
    theirs = collate_crops([reference(image) for image in images])
    keys = image_keys(3, torch.zeros(n, dtype=torch.long), torch.arange(n))
    ours = transform.cut(images, keys)
    rates = {what: count / (3 * n) for what, count in reference.done.items()}
    sampled = transform.sample(keys, torch.full((n, 2), 48))
    assert rates["jitter"] == pytest.approx(float(sampled.jitter.float().mean()), abs=0.04)
    assert rates["blur"] == pytest.approx(float((sampled.sigma > 0).float().mean()), abs=0.05)
    # Five standard errors of a difference of two means.
    for a, b in zip(ours.boxes.unbind(1), theirs.boxes.unbind(1), strict=True):
        margin = 5 * (a.std(dim=0) + b.std(dim=0)) / (2 * n) ** 0.5
        assert bool(((a.mean(dim=0) - b.mean(dim=0)).abs() < margin).all())
    for a, b in zip(ours.images, theirs.images, strict=True):
        for what in (_means, _spreads, _saturations, _roughness, _shares_of_levels):
            x, y = what(a.float()), what(b.float())
            margin = 5 * ((x.var(dim=0) + y.var(dim=0)) / n).sqrt() + 1e-4
            assert bool(((x.mean(dim=0) - y.mean(dim=0)).abs() < margin).all()), what.__name__


def _means(x: Tensor) -> Tensor:
    return x.mean(dim=(2, 3))


def _spreads(x: Tensor) -> Tensor:
    return x.std(dim=(2, 3))


def _saturations(x: Tensor) -> Tensor:
    return (x.amax(dim=1) - x.amin(dim=1)).mean(dim=(1, 2))[:, None]


def _roughness(x: Tensor) -> Tensor:
    return x.diff(dim=3).abs().mean(dim=(2, 3))


def _shares_of_levels(x: Tensor) -> Tensor:
    bins = (x / 32).long()
    return torch.stack([(bins == i).float().mean(dim=(2, 3)) for i in range(8)], 1).flatten(1)


def test_images_of_any_kind(tmp_path: Path) -> None:
    transform = MultiCrop(16, 8, 1)
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (20, 30), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "grey.png")
    with Image.open(tmp_path / "grey.png") as grey:
        assert grey.mode == "L"
        crops = transform.cut(
            [grey, grey.convert("P"), grey.convert("RGBA")], torch.zeros(3).long()
        )
    as_tensor = transform.cut([pixels.expand(3, -1, -1)], torch.zeros(1).long())
    for view, one in zip(crops.images, as_tensor.images, strict=True):
        assert all(torch.equal(view[i], one[0]) for i in (0, 2))
    for size in ((1, 1), (1, 50), (50, 1), (2, 3)):
        tiny = transform(Image.new("RGB", size, (9, 9, 9)))
        assert tiny.images[0].shape == (3, 16, 16)
        assert bool(((tiny.boxes >= 0) & (tiny.boxes <= 1)).all())


@pytest.mark.parametrize(
    "image", [torch.zeros(3, 4, 4), torch.zeros(1, 4, 4).byte(), torch.zeros(3, 0, 4).byte()]
)
def test_other_tensors_are_refused(image: Tensor) -> None:
    with pytest.raises(ValueError, match="an image must"):
        MultiCrop(16, 8, 1)(image)


def test_transforms_are_values() -> None:
    transform = MultiCrop(16, 8, 1)
    transform(gradient())
    assert pickle.loads(pickle.dumps(transform)) == transform == MultiCrop(16, 8, 1)
    assert hash(transform) == hash(MultiCrop(16, 8, 1))


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


def test_batches_and_their_order_do_not_matter() -> None:
    dataset = CropDataset(One(), MultiCrop(16, 8, 2), seed=0)
    items = [(0, 3), (1, 4), (0, 9), (7, 3)]
    together = dataset.batch(items)
    for i, crops in enumerate(dataset.__getitems__(items)):
        alone = dataset[items[i]]
        for a, b, c in zip(crops.images, alone.images, together.images, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c[i])
    again = collate_crops([dataset[item] for item in items])
    assert all(torch.equal(a, b) for a, b in zip(again.images, together.images, strict=True))
    assert torch.equal(again.boxes, together.boxes)


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
    raw = images.float()
    torch.testing.assert_close(normalize(raw)[0, :, 0, 0], expected)
    assert bool((raw == 255).all()), "what is passed in stays"
