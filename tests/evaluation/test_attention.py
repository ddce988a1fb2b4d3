"""Attention against object masks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskdistill.evaluation import attention_jaccard, keep_mass
from maskdistill.evaluation.attention import jaccard_per_image, pointing_game


def test_keep_mass_keeps_the_fewest() -> None:
    attention = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]])
    assert keep_mass(attention, 0.6).tolist() == [[True, True, False, False],
                                                  [True, True, True, False]]  # fmt: skip
    assert keep_mass(attention, 1.0).all()
    assert keep_mass(7 * attention, 0.6).equal(keep_mass(attention, 0.6)), "scale is no matter"


def naive(
    attention: Tensor, mask: Tensor, grid: tuple[int, int], mass: float, ignore: Tensor
) -> float:
    """One map against one mask: greedily kept patches, then pixel after pixel."""
    total, held, kept = float(attention.double().sum()), 0.0, set()
    for patch in attention.argsort(descending=True, stable=True).tolist():
        if held >= mass * total:
            break
        kept.add(patch)
        held += float(attention[patch])
    both = either = 0
    height, width = mask.shape
    for y in range(height):
        for x in range(width):
            if ignore[y, x]:
                continue
            seen = (y * grid[0] // height) * grid[1] + x * grid[1] // width in kept
            both += seen and bool(mask[y, x])
            either += seen or bool(mask[y, x])
    return both / either


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    height=st.integers(4, 9),
    width=st.integers(4, 9),
    mass=st.sampled_from([0.3, 0.6, 0.9]),
    seed=st.integers(0, 10**6),
)
def test_jaccard_is_the_definition(
    rows: int, columns: int, height: int, width: int, mass: float, seed: int
) -> None:
    """Also where patches do not divide the pixels, with void pixels, and in any chunks."""
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(3, 2, rows * columns, generator=generator)
    masks, ignore = torch.rand(2, 3, height, width, generator=generator) > 0.6
    masks[:, 0, 0], ignore[:, 0, 0] = True, False
    each = jaccard_per_image(attention, masks, (rows, columns), mass=mass, ignore=ignore, chunk=2)
    maps = torch.cat([attention, attention.mean(dim=1, keepdim=True)], dim=1)
    expected = torch.tensor(
        [[naive(m, masks[i], (rows, columns), mass, ignore[i]) for m in maps[i]] for i in range(3)]
    )
    torch.testing.assert_close(each["best_head"], expected[:, :-1].amax(dim=1))
    torch.testing.assert_close(each["mean_over_heads"], expected[:, :-1].mean(dim=1))
    torch.testing.assert_close(each["head_mean"], expected[:, -1])
    whole = attention_jaccard(attention, masks, (rows, columns), mass=mass, ignore=ignore)
    assert whole.head_mean == pytest.approx(float(expected[:, -1].mean()))


def test_void_pixels_do_not_count() -> None:
    """The bug of the usual code: comparing a bool mask with 255 leaves void in the union."""
    attention = torch.tensor([[[1.0, 0.0, 0.0, 0.0]]])
    mask, ignore = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    mask[:, 0, 0], ignore[:, 0, 1], ignore[:, 1, :2] = True, True, True
    assert attention_jaccard(attention, mask, (2, 2)).best_head == pytest.approx(1 / 4)
    assert attention_jaccard(attention, mask, (2, 2), ignore=ignore).best_head == 1.0
    with pytest.raises(ValueError, match="empty outside the void"):
        attention_jaccard(attention, mask, (2, 2), ignore=mask)


def test_pointing_game() -> None:
    # Four patches of 4x4 pixels; the object is the pixel at (row 1, column 5).
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, 1, 5] = True
    attention = torch.tensor([[[0.1, 0.6, 0.2, 0.1], [0.1, 0.1, 0.7, 0.1]]])
    # The middle of patch 1 is (2, 6), sqrt(2) away from the object; that of patch 2 is (6, 2).
    assert tuple(pointing_game(attention, mask, (2, 2))) == (0, 0, 0)
    assert tuple(pointing_game(attention, mask, (2, 2), tolerance=1.4)) == (0, 0, 0)
    # The mean over heads is greatest on patch 2.
    assert tuple(pointing_game(attention, mask, (2, 2), tolerance=1.5)) == (1, 0.5, 0)
    assert tuple(pointing_game(attention, mask, (2, 2), tolerance=6)) == (1, 1, 1)
    mask[0, 2, 6] = True
    assert tuple(pointing_game(attention, mask, (2, 2))) == (1, 0.5, 0)


def test_pointing_with_and_without_tolerance_agree() -> None:
    attention, masks = torch.rand(20, 3, 16), torch.rand(20, 9, 11) > 0.5
    exact = pointing_game(attention, masks, (4, 4))
    assert exact == pointing_game(attention, masks, (4, 4), tolerance=0.5, chunk=3)
    assert 0 < exact.head_mean < 1


def test_bad_input() -> None:
    attention, mask = torch.rand(2, 3, 4), torch.ones(2, 4, 4, dtype=torch.bool)
    for score in (attention_jaccard, pointing_game):
        with pytest.raises(ValueError, match="grid of 3x3"):
            score(attention, mask, (3, 3))
        with pytest.raises(ValueError, match="bool"):
            score(attention, mask.float(), (2, 2))
        with pytest.raises(ValueError, match="B = 2"):
            score(attention, mask[:1], (2, 2))
        with pytest.raises(ValueError, match="at least one image"):
            score(attention[:0], mask[:0], (2, 2))
        for wrong in (math.nan, math.inf, -1.0):
            with pytest.raises(ValueError, match="diverged"):
                score(attention + wrong, mask, (2, 2))
    with pytest.raises(ValueError, match="mass must be"):
        attention_jaccard(attention, mask, (2, 2), mass=60)
    with pytest.raises(ValueError, match="ignore must be bool"):
        attention_jaccard(attention, mask, (2, 2), ignore=mask[:, :2])
    with pytest.raises(ValueError, match="tolerance"):
        pointing_game(attention, mask, (2, 2), tolerance=-1)
    mask[1] = False
    with pytest.raises(ValueError, match="empty"):
        attention_jaccard(attention, mask, (2, 2))
