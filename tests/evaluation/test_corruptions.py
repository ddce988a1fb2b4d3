"""Corruptions against independent implementations, and the table of accuracies."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import maskdistill as md
from maskdistill.data import Scenes
from maskdistill.evaluation.corruptions import (
    CORRUPTIONS,
    EXTRA_CORRUPTIONS,
    CorruptionTable,
    corrupt,
    corruption_table,
    mean_corruption_error,
    severity_table,
)
from maskdistill.evaluation.features import evaluation_images
from maskdistill.evaluation.probes import knn_classifier
from maskdistill.evaluation.robustness import occluded_features

ALL = CORRUPTIONS + EXTRA_CORRUPTIONS
TABLES = ("cifar", "tiny-imagenet", "imagenet")
NOISES = ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise")


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    images = evaluation_images(Scenes(11, 32), 32)[0]
    images[0, :, :4, :4], images[0, :, 4:8, :4], images[1, :, :4] = 0, 120, 255  # no saturation
    return images


def change(after: Tensor, before: Tensor) -> float:
    return float((after.float() - before.float()).square().mean().sqrt())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("table", TABLES)
def test_every_severity(pixels: Tensor, name: str, table: str) -> None:
    before = pixels.clone()
    found = [corrupt(pixels, name, s, table=table) for s in range(1, 6)]  # type: ignore[arg-type]
    assert pixels.equal(before), "the images given are left alone"
    for image in found:
        assert image.shape == pixels.shape
        assert image.dtype == torch.uint8
    changes = [change(image, pixels) for image in found]
    assert changes[0] > 0
    if name not in ("saturate", "pixelate"):  # whose published severities are not in this order
        assert changes == sorted(changes), changes


@pytest.mark.parametrize("name", ALL)
def test_batches_do_not_matter(pixels: Tensor, name: str) -> None:
    whole = corrupt(pixels, name, 3, seed=4)
    parts = [corrupt(pixels[i : i + 4], name, 3, seed=4, first=i) for i in range(0, 11, 4)]
    assert whole.equal(torch.cat(parts))
    assert whole.equal(corrupt(pixels, name, 3, seed=5)) == (name not in NOISES)


def test_noises_have_their_strengths() -> None:
    grey = torch.full((40, 3, 32, 32), 128, dtype=torch.uint8)

    def noise(name: str) -> Tensor:
        return corrupt(grey, name, 2, table="cifar").double() / 255 - 128 / 255

    for name, deviation in (
        ("gaussian_noise", 0.06),
        ("shot_noise", math.sqrt(128 / 255 / 250)),
        ("speckle_noise", 0.10 * 128 / 255),
    ):
        assert noise(name).std() == pytest.approx(deviation, rel=0.02)
        assert abs(noise(name).mean()) < 0.001
    values = corrupt(grey, "impulse_noise", 5, table="imagenet")
    assert (values == 0).double().mean() == pytest.approx(0.27 / 2, abs=0.005)
    assert (values == 255).double().mean() == pytest.approx(0.27 / 2, abs=0.005)
    assert not (values[:, 0] == values[:, 1]).all(), "each channel by itself"
    assert not values[0].equal(values[1]), "each image by itself"


@pytest.mark.parametrize("severity", [1, 5])
def test_gaussian_blur_is_scipys(pixels: Tensor, severity: int) -> None:
    scipy = pytest.importorskip("scipy.ndimage")
    sigma = {1: 1.0, 5: 6.0}[severity]
    ours = corrupt(pixels, "gaussian_blur", severity, table="imagenet")
    theirs = scipy.gaussian_filter(
        pixels.double().numpy(), (0, 0, sigma, sigma), mode="nearest", truncate=4.0
    )
    assert np.abs(ours.numpy() - theirs).max() < 0.51


def test_defocus_blur_is_a_soft_disc(pixels: Tensor) -> None:
    # A point becomes the kernel. Radius 2.5, hardly softened: 21 pixels alike.
    point = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    point[:, :, 16, 16] = 255
    disc = corrupt(point, "defocus_blur", 4, table="tiny-imagenet")[0, 0]
    near = sum(1 for y in range(-3, 4) for x in range(-3, 4) if x * x + y * y <= 6.25)
    assert int((disc > 0).sum()) == near == 21
    assert disc.unique().tolist() == [0, round(255 / 21)]
    # Radius 10 softened by 0.5 pixels; over the edge the image is mirrored, without its last line.
    scipy = pytest.importorskip("scipy.ndimage")
    ticks = np.arange(-10, 11)
    kernel = (ticks[:, None] ** 2 + ticks**2 <= 100).astype(float)
    bell = np.exp(-(np.arange(-2, 3) ** 2) / (2 * 0.5**2))
    bell /= bell.sum()
    kernel /= kernel.sum()
    for axis in (0, 1):
        kernel = scipy.correlate1d(kernel, bell, axis=axis, mode="mirror")
    theirs = scipy.correlate(pixels[2, 0].double().numpy(), kernel, mode="mirror")
    ours = corrupt(pixels, "defocus_blur", 5, table="imagenet")[2, 0]
    assert np.abs(ours.numpy() - theirs).max() < 0.51


@pytest.mark.parametrize("name", ["brightness", "saturate"])
@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_colours_are_changed_in_hsv(pixels: Tensor, name: str, severity: int) -> None:
    published: dict[str, list[tuple[float, ...]]] = {
        "brightness": [(0.05,), (0.10,), (0.15,), (0.20,), (0.30,)],
        "saturate": [(0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)],
    }
    settings = published[name][severity - 1]
    some = pixels[:2]
    ours = corrupt(some, name, severity, table="cifar").permute(0, 2, 3, 1).reshape(-1, 3)
    for rgb, found in zip(some.permute(0, 2, 3, 1).reshape(-1, 3).tolist(), ours, strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(value / 255 for value in rgb))
        if name == "brightness":
            v = min(v + settings[0], 1)
        else:
            s = min(max(s * settings[0] + settings[1], 0), 1)
        wanted = [255 * value for value in colorsys.hsv_to_rgb(h, s, v)]
        assert found.tolist() == pytest.approx(wanted, abs=0.501)


def test_contrast_and_pillows(pixels: Tensor) -> None:
    low = corrupt(pixels, "contrast", 5, table="imagenet").double()
    mean = pixels.double().mean(dim=(2, 3), keepdim=True)
    assert (low - (mean + 0.05 * (pixels - mean))).abs().max() < 0.501
    half = corrupt(pixels, "pixelate", 5, table="tiny-imagenet")
    blocks = half.unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2)
    assert (blocks == blocks[..., :1]).all(), "half the size and back: 2x2 pixels are one"
    means = pixels.double().unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2).mean(dim=-1)
    assert (blocks[..., 0] - means).abs().max() <= 1, "Pillow rounds by row, then by column"


def test_tables_by_size() -> None:
    assert [severity_table((s, s)) for s in (32, 45, 46, 64, 119, 120, 224, 384)] == [
        "cifar", "cifar", "tiny-imagenet", "tiny-imagenet", "tiny-imagenet",
        "imagenet", "imagenet", "imagenet",
    ]  # fmt: skip


def test_the_table_of_a_vit(pixels: Tensor) -> None:
    vit = md.MaskedViT(md.create_backbone("vit_tiny_patch16_224", 32, 8, depth=1), "pixel")
    labels = torch.arange(11)
    classify = knn_classifier(occluded_features(vit, pixels), labels, k=1)
    table = corruption_table(vit, classify, pixels, labels, severities=(1, 5))
    assert set(table.accuracies) == set(CORRUPTIONS)
    assert table.table == "cifar"
    assert table.clean == 1.0
    rows = [value for row in table.accuracies.values() for value in row]
    assert table.mean == pytest.approx(sum(rows) / len(rows))
    assert table.retention == table.mean
    assert table.accuracies["brightness"][1] < 1.0
    again = corruption_table(vit, classify, pixels, labels, severities=(1, 5), batch_size=4)
    assert again == table
    own = corruption_table(
        vit, classify, pixels, labels, names=("gaussian_noise",), severities=(5,), table="imagenet"
    )
    noisy = corrupt(pixels, "gaussian_noise", 5, table="imagenet")
    right = (classify(occluded_features(vit, noisy)) == labels).double().mean()
    assert own.accuracies["gaussian_noise"] == (float(right),)
    with pytest.raises(ValueError, match="same corruptions"):
        mean_corruption_error(table, own)
    with pytest.raises(ValueError, match="at least one"):
        corruption_table(vit, classify, pixels, labels, names=())
    with pytest.raises(ValueError, match="one per image"):
        corruption_table(vit, classify, pixels, labels[:3])


def test_error_relative_to_a_baseline() -> None:
    def table(**rows: tuple[float, ...]) -> CorruptionTable:
        return CorruptionTable(rows, (1, 2), 1.0, 0.5, 0.5, "imagenet")

    model = table(contrast=(0.9, 0.7), pixelate=(0.6, 0.6))
    base = table(contrast=(0.5, 0.3), pixelate=(0.9, 0.7))
    assert mean_corruption_error(model, base) == pytest.approx((0.4 / 1.2 + 0.8 / 0.4) / 2)
    assert mean_corruption_error(base, base) == 1.0
    with pytest.raises(ValueError, match="no error under contrast"):
        mean_corruption_error(model, table(contrast=(1.0, 1.0), pixelate=(0.5, 0.5)))


def test_bad_input(pixels: Tensor) -> None:
    with pytest.raises(ValueError, match="gaussian_noise, shot_noise"):
        corrupt(pixels, "fog", 1)
    with pytest.raises(ValueError, match="from 1 to 5"):
        corrupt(pixels, "contrast", 0)
    with pytest.raises(ValueError, match="16x16"):
        corrupt(pixels[:, :, :8, :8], "contrast", 1)
    with pytest.raises(ValueError, match="cifar, tiny-imagenet, imagenet"):
        corrupt(pixels, "contrast", 1, table="svhn")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="before normalisation"):
        corrupt(pixels.float(), "contrast", 1)
