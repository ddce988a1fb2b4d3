"""Pixels of masks, attention and outlines."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskdistill import plotting
from tests.plotting.shown import (
    GRID,
    IMAGES,
    MASKS,
    OUTLINE,
    attention,
    contrast,
)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 6), columns=st.integers(1, 6), height=st.integers(1, 70),
    width=st.integers(1, 70), data=st.data(),
)  # fmt: skip
def test_hidden_patches_and_no_others_change(
    rows: int, columns: int, height: int, width: int, data: st.DataObject
) -> None:
    cells = data.draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns))
    mask = torch.tensor(cells)
    image = torch.full((3, 7, 9), 3, dtype=torch.uint8)
    pixels = plotting.masked_pixels(image, mask, (rows, columns), size=(height, width))
    assert pixels.shape == (height, width, 3)
    assert pixels.dtype == np.uint8
    for y in range(height):
        for x in range(width):
            # The patch that the middle of the pixel lies in.
            patch = int((y + 0.5) * rows / height) * columns + int((x + 0.5) * columns / width)
            assert bool(pixels[y, x].mean() > 50) == cells[patch]


@pytest.mark.parametrize("level", [0, 90, 153, 200, 255])
@pytest.mark.parametrize("patch", [4, 8, 16])
def test_hidden_patches_stand_out_from_any_grey(level: int, patch: int) -> None:
    """The contrast of a hidden patch's extremes to the image, as WCAG 2 measures it."""
    image = torch.full((3, 2 * patch, 2 * patch), level, dtype=torch.uint8)
    mask = torch.tensor([True, False, False, False])
    hidden = plotting.masked_pixels(image, mask, (2, 2))[:patch, :patch].reshape(-1, 3)
    best = max(contrast(tuple(pixel / 255), (level / 255,) * 3) for pixel in hidden)
    # Plain grey in tiny patches cannot differ from a grey that is its like; stripes do.
    assert best > (1.7 if patch >= 6 else 1.0)


def test_an_image_is_enlarged_by_repetition_and_reduced_by_averaging() -> None:
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    image[:, 0] = 200
    large = plotting.masked_pixels(image, None, (1, 1), size=6)
    assert large.shape == (6, 6, 3)
    assert large[:, 0, 0].tolist() == [200, 200, 200, 0, 0, 0]
    assert abs(int(plotting.masked_pixels(image, None, (1, 1), size=1)[0, 0, 0]) - 100) <= 1
    wide = plotting.masked_pixels(image[:, :1], None, (1, 1), size=8)
    assert wide.shape == (4, 8, 3)  # the longer side


def test_without_an_image_a_patch_has_16_pixels() -> None:
    assert plotting.masked_pixels(None, torch.ones(6).bool(), (2, 3)).shape == (32, 48, 3)
    assert plotting.attention_pixels(None, torch.rand(6), (2, 3)).shape == (32, 48, 3)


def test_attention_pixels_are_the_colours_of_the_map() -> None:
    values = torch.tensor([0.0, 0.25, 0.5, 1.0])
    pixels = plotting.attention_pixels(IMAGES[0], values, (2, 2), look="map")
    inferno = matplotlib.colormaps["inferno"]
    for patch, value in enumerate(values.tolist()):
        middle = pixels[8 + 16 * (patch // 2), 8 + 16 * (patch % 2)]
        assert np.abs(middle / 255 - np.array(inferno(value)[:3])).max() < 0.01


def test_a_scale_darkens_weak_attention() -> None:
    values = torch.full((16,), 0.5)
    own = plotting.attention_pixels(None, values, GRID)
    weak = plotting.attention_pixels(None, values, GRID, scale=5.0)
    assert own.mean() > 2 * weak.mean()
    assert (plotting.attention_pixels(None, 3 * values, GRID) == own).all()


def test_an_overlay_shows_the_image_where_nothing_is_attended() -> None:
    values = torch.zeros(16)
    values[0] = 1
    pixels = plotting.attention_pixels(IMAGES[0], values, GRID).astype(float)
    image = IMAGES[0].permute(1, 2, 0).numpy()
    assert np.abs(pixels[8:] - 0.62 * image[8:]).max() <= 1
    assert np.abs(pixels[:8, :8] - 0.62 * image[:8, :8]).max() > 60


def test_attention_of_nothing_is_dark_and_no_error() -> None:
    assert plotting.attention_pixels(None, torch.zeros(16), GRID).max() <= 5


def test_bilinear_attention_has_more_colours_than_patches() -> None:
    values = attention()[0, 0]
    nearest = plotting.attention_pixels(None, values, GRID, look="map")
    smooth = plotting.attention_pixels(None, values, GRID, look="map", interpolation="bilinear")
    assert len(np.unique(nearest.reshape(-1, 3), axis=0)) <= 16
    assert len(np.unique(smooth.reshape(-1, 3), axis=0)) > 40


def test_an_outline_lies_within_the_border_and_black_outside() -> None:
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:6, 2:6] = True
    grey = np.full((32, 32, 3), 128, np.uint8)
    pixels = plotting.outlined_pixels(grey, mask)
    blue = (pixels == OUTLINE).all(axis=2)
    inside = np.kron(mask.numpy(), np.ones((4, 4))) > 0
    assert blue.sum() == 16**2 - 14**2
    assert not (blue & ~inside).any()
    black = (pixels == 0).all(axis=2)
    assert black.sum() == 18**2 - 16**2
    assert not (black & inside).any()
    assert (grey == 128).all()
    assert (
        (plotting.attention_pixels(IMAGES[0], attention()[0, 0], GRID, outline=MASKS[0]) == OUTLINE)
        .all(axis=2)
        .any()
    )


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: plotting.masked_pixels(IMAGES[0].float(), None, GRID), "uint8, not normalised"),
        (lambda: plotting.masked_pixels(IMAGES, None, GRID), r"\(3, H, W\).*\(4, 3, 32, 32\)"),
        (lambda: plotting.masked_pixels(None, torch.ones(9).bool(), GRID), "N = 16.*4x4"),
        (lambda: plotting.masked_pixels(None, torch.ones(16), GRID), "float32"),
        (lambda: plotting.masked_pixels(None, None, GRID, size=0), "at least 1"),
        (lambda: plotting.attention_pixels(None, attention()[0], GRID), "mean over heads"),
        (lambda: plotting.attention_pixels(None, -torch.ones(16), GRID), "before the softmax"),
        (lambda: plotting.attention_pixels(None, torch.full((16,), torch.nan), GRID), "finite"),
        (lambda: plotting.attention_pixels(None, torch.ones(16), GRID, scale=0.0), "positive"),
        (lambda: plotting.attention_pixels(None, torch.ones(16), GRID, look="x"), "overlay, map"),
        (lambda: plotting.outlined_pixels(np.zeros((4, 4, 3), np.uint8), MASKS), r"\(H, W\) bool"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
