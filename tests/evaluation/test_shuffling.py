"""Tiles in disorder: nothing is lost, and each order is as likely."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import maskdistill as md
from maskdistill.data import Scenes
from maskdistill.evaluation.features import evaluation_images
from maskdistill.evaluation.knn import knn_classifier
from maskdistill.evaluation.robustness import (
    _reordered,
    occluded_features,
    shuffle_curve,
    shuffle_patches,
)


def tiles(image: Tensor, pieces: int) -> list[bytes]:
    height, width = image.shape[1] // pieces, image.shape[2] // pieces
    return [
        image[:, r * height : (r + 1) * height, c * width : (c + 1) * width].numpy().tobytes()
        for r in range(pieces)
        for c in range(pieces)
    ]


@given(st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2]), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_tiles_stay_whole(pieces: int, tall: int, batch: int) -> None:
    images = torch.randint(256, (batch, 3, 12 * tall, 24), dtype=torch.uint8)
    shuffled = shuffle_patches(images, pieces)
    assert shuffled.shape == images.shape
    assert shuffled.dtype == torch.uint8
    for before, after in zip(images, shuffled, strict=True):
        assert Counter(tiles(before, pieces)) == Counter(tiles(after, pieces))


def test_tiles_go_where_the_order_says() -> None:
    images = torch.arange(36.0).view(1, 1, 6, 6)
    kept = torch.arange(9)[None]
    assert _reordered(images, kept).equal(images)
    swapped = kept.clone()
    swapped[0, [1, 3]] = torch.tensor(
        [3, 1]
    )  # the second of the first row, the first of the second
    found = _reordered(images, swapped)
    assert found[0, 0, :2, 2:4].equal(images[0, 0, 2:4, :2])
    assert found[0, 0, 2:4, :2].equal(images[0, 0, :2, 2:4])
    assert int((found != images).sum()) == 8


def test_every_order_is_as_likely() -> None:
    images = torch.arange(4.0).view(1, 1, 2, 2).expand(4800, 1, 2, 2)
    shuffled = shuffle_patches(images, 2, generator=torch.Generator().manual_seed(0))
    orders = Counter(tuple(row.tolist()) for row in shuffled.flatten(1))
    assert len(orders) == 24
    assert min(orders.values()) > 140, "200 expected, give or take 14"
    assert max(orders.values()) < 260


def test_the_curve() -> None:
    vit = md.MaskedViT(md.create_backbone("vit_tiny_patch16_224", 32, 8, depth=1), "pixel")
    pixels, labels = evaluation_images(Scenes(22, 32), 32)
    classify = knn_classifier(occluded_features(vit, pixels), torch.arange(22), k=1)
    curve = shuffle_curve(vit, classify, pixels, torch.arange(22), pieces=(16, 2, 4))
    assert list(curve) == [1, 2, 4, 16]
    assert curve[1] == 1.0 > curve[16]
    again = shuffle_curve(vit, classify, pixels, torch.arange(22), pieces=(2, 4, 16), batch_size=5)
    assert again == curve
    with pytest.raises(ValueError, match="pieces=3"):
        shuffle_curve(vit, classify, pixels, labels, pieces=(2, 3))
    with pytest.raises(ValueError, match="one per image"):
        shuffle_curve(vit, classify, pixels, labels[1:])
