"""The backgrounds challenge, on small folders of the same layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from maskdistill.evaluation.backgrounds import (
    VARIANTS,
    background_challenge,
    open_backgrounds,
)
from maskdistill.evaluation.probes import linear_classifier

CLASSES = ("00_dog", "01_bird", "02_vehicle")
COLOURS = {"00_dog": (230, 40, 40), "01_bird": (40, 230, 40), "02_vehicle": (40, 40, 230)}


def picture(front: str, behind: str, noise: int) -> Image.Image:
    """A small object of one class's colour on a wide ground of another's, less bright."""
    pixels = np.zeros((16, 16, 3), np.uint8) + np.array(COLOURS[behind], np.uint8) // 2
    pixels[4:12, 4:12] = COLOURS[front]
    rng = np.random.default_rng(noise)
    return Image.fromarray((pixels * rng.uniform(0.8, 1.0, (16, 16, 1))).astype(np.uint8))


def write(root: Path, variant: str, split: str = "val", images: int = 4) -> None:
    for label, name in enumerate(CLASSES):
        folder = root / variant / split / name
        folder.mkdir(parents=True)
        for i in range(images):
            behind = name
            if variant == "mixed_next":
                behind = CLASSES[(label + 1) % 3]
            if variant == "mixed_rand":
                behind = CLASSES[(label + i) % 3]
            picture(name, behind, 10 * label + i).save(folder / f"{i}.png")


class MeanColour(nn.Module):
    """Sees the whole image's colour, hence mostly the ground."""

    def __init__(self, rows: slice = slice(None)) -> None:
        super().__init__()
        self.rows = rows
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        colour: Tensor = x[:, :, self.rows, self.rows].mean(dim=(2, 3)) * self.scale
        return colour


def test_what_looks_at_the_ground_has_a_gap(tmp_path: Path) -> None:
    for variant in ("original", "mixed_same", "mixed_rand", "mixed_next"):
        write(tmp_path, variant)
    write(tmp_path, "original", "train")
    (tmp_path / "fg_mask" / "val").mkdir(parents=True)  # is in the release, and no variant
    data = open_backgrounds(tmp_path)
    assert list(data.variants) == ["original", "mixed_same", "mixed_rand", "mixed_next"]
    assert data.classes == CLASSES
    assert data.train is not None

    behind = background_challenge(MeanColour(slice(0, 3)), data, 16)
    assert behind.accuracies == {
        "original": 1.0, "mixed_same": 1.0, "mixed_rand": 0.5, "mixed_next": 0.0,
    }  # fmt: skip
    assert behind.gap == 0.5
    for fit in ({}, {"fit": linear_classifier}):
        before = background_challenge(MeanColour(slice(6, 10)), data, 16, **fit)  # type: ignore[arg-type]
        assert set(before.accuracies.values()) == {1.0}
        assert before.gap == 0.0


def test_without_training_images(tmp_path: Path) -> None:
    for variant in ("original", "mixed_rand"):
        write(tmp_path, variant)
    data = open_backgrounds(tmp_path)
    assert data.train is None
    network = MeanColour(slice(0, 3))
    with pytest.warns(UserWarning, match="accuracies are too high"):
        found = background_challenge(network, data, 16)
    assert found.accuracies == {"mixed_rand": 0.5}
    assert found.gap is None
    given = background_challenge(network, data, 16, train=data.variants["original"])
    assert set(given.accuracies) == {"original", "mixed_rand"}


def test_nothing_to_fit_on(tmp_path: Path) -> None:
    write(tmp_path, "mixed_same")
    data = open_backgrounds(tmp_path)
    with pytest.raises(ValueError, match="train="):
        background_challenge(MeanColour(), data, 16)


def test_folders_that_are_not_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no variant") as error:
        open_backgrounds(tmp_path)
    assert all(name in str(error.value) for name in VARIANTS)
    write(tmp_path, "original")
    write(tmp_path, "only_fg")
    for file in (tmp_path / "only_fg" / "val" / "01_bird").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="images in each"):
        open_backgrounds(tmp_path)
    (tmp_path / "only_fg" / "val" / "01_bird").rmdir()
    with pytest.raises(ValueError, match="only_fg has the classes 00_dog, 02_vehicle"):
        open_backgrounds(tmp_path)
