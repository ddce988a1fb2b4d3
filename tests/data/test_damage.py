"""What stands in for a damaged image depends on neither workers, order nor resuming."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from maskdistill.data import BatchStream, CropDataset, MultiCrop, crop_loader, open_data
from maskdistill.data.sources import Damage, ImageDataset

pytestmark = [
    pytest.mark.filterwarnings("ignore::maskdistill.data.DamagedImageWarning"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 1)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i:02d}.png")
    for victim in ("cat/03", "cat/04", "dog/00", "dog/11"):  # two in a row, and the last of all
        (tmp_path / "train" / f"{victim}.png").write_bytes(b"")
    return tmp_path


def pixels_of(batch: list[tuple[Image.Image, int]]) -> list[tuple[bytes, int]]:
    return [(image.tobytes(), label) for image, label in batch]


def read(train: ImageDataset, order: list[int], workers: int) -> dict[int, tuple[bytes, int]]:
    loader: DataLoader = DataLoader(
        train, 2, sampler=order, num_workers=workers, collate_fn=pixels_of
    )
    return dict(zip(order, (one for batch in loader for one in batch), strict=True))


def test_stand_ins_do_not_depend_on_what_was_read_before(root: Path) -> None:
    wanted = read(open_data(root).train, list(range(24)), 0)
    assert wanted[3] == wanted[4] == wanted[5]
    assert wanted[23] == wanted[0]
    backwards = list(range(23, -1, -1))
    assert read(open_data(root).train, backwards, 0) == wanted
    for order in (list(range(24)), backwards):
        assert read(open_data(root).train, order, 2) == wanted
    known = open_data(root).train
    read(known, [3, 12], 0)  # found out before
    assert read(known, list(range(24)), 0) == wanted


def crops(root: Path, start: int, workers: int) -> list[Tensor]:
    transform = MultiCrop(16, 8, local_crops=1)
    batches = BatchStream(24, 6, start=start, stop=8, seed=0)
    loader = crop_loader(CropDataset(open_data(root).train, transform, 0), batches, workers=workers)
    return [torch.cat([view.flatten() for view in batch.images]) for batch in loader]


def test_crops_of_stand_ins_are_the_same_after_a_resume(root: Path) -> None:
    wanted = crops(root, 0, 0)
    for start, workers in ((0, 2), (3, 0), (5, 2)):
        for one, other in zip(crops(root, start, workers), wanted[start:], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_an_image_counts_once(root: Path) -> None:
    damage = Damage(4, 1)
    damage.record(2, "a", "b")
    damage.record(2, "a", "b")
    assert (damage.count, damage.is_known(2), damage.is_known(1)) == (1, True, False)
