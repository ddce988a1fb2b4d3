"""Boxes and connected components, against torchvision, SciPy and cases with known answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from maskdistill.evaluation.discovery import (
    attention_boxes,
    box_iou,
    centre_box,
    centre_box_corloc,
    centre_box_jaccard,
    component_at,
    connected_components,
    corloc,
    largest_component,
    mask_boxes,
)


def random_masks(seed: int, height: int, width: int, share: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(4, height, width, generator=generator) < share


shapes = {
    "seed": st.integers(0, 10**6),
    "height": st.integers(1, 12),
    "width": st.integers(1, 12),
    "share": st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0]),
}


@settings(max_examples=60, deadline=None)
@given(**shapes)
def test_components_are_scipys(seed: int, height: int, width: int, share: float) -> None:
    masks = random_masks(seed, height, width, share)
    labels, largest = connected_components(masks), largest_component(masks)
    for mask, ours, kept in zip(masks.numpy(), labels.numpy(), largest.numpy(), strict=True):
        theirs, count = ndimage.label(mask)
        # Both number by first cell in reading order, so the ranks of our labels are SciPy's.
        assert (
            np.unique(ours, return_inverse=True)[1].reshape(ours.shape) + mask.all() == theirs
        ).all()
        sizes = [(theirs == n).sum() for n in range(1, count + 1)]
        expected = theirs == 1 + int(np.argmax(sizes)) if sizes else np.zeros_like(mask)
        assert (kept == expected).all()


def test_a_spiral_is_one_component() -> None:
    """The longest way that a label can have to go."""
    spiral = torch.zeros(1, 31, 31, dtype=torch.bool)
    y = x = 0
    dy, dx = 0, 1
    spiral[0, 0, 0] = True
    for _ in range(2000):
        ahead, beyond = (y + dy, x + dx), (y + 2 * dy, x + 2 * dx)
        inside = 0 <= ahead[0] < 31 and 0 <= ahead[1] < 31
        free = not (0 <= beyond[0] < 31 and 0 <= beyond[1] < 31 and spiral[0, beyond[0], beyond[1]])
        if inside and free and not spiral[0, ahead[0], ahead[1]]:
            y, x = ahead
            spiral[0, y, x] = True
        else:
            dy, dx = dx, -dy
    assert ndimage.label(spiral[0].numpy())[1] == 1
    assert int(spiral.sum()) > 300
    assert connected_components(spiral)[spiral].unique().tolist() == [1]


@settings(max_examples=30, deadline=None)
@given(**shapes)
def test_component_of_a_cell(seed: int, height: int, width: int, share: float) -> None:
    masks = random_masks(seed, height, width, share)
    cells = torch.arange(4) * 7 % (height * width)
    for mask, cell, ours in zip(masks, cells.tolist(), component_at(masks, cells), strict=True):
        place = (cell // width, cell % width)
        theirs, _ = ndimage.label(mask.numpy())
        expected = np.zeros_like(mask.numpy())
        expected[place] = True
        if mask[place]:
            expected = theirs == theirs[place]
        assert (ours.numpy() == expected).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), height=st.integers(1, 12), width=st.integers(1, 12))
def test_mask_boxes_are_torchvisions(seed: int, height: int, width: int) -> None:
    masks = random_masks(seed, height, width, 0.2)
    masks[:, height // 2, width // 2] = True
    theirs = torchvision.ops.masks_to_boxes(masks)  # whose right and bottom are inside
    assert torch.equal(mask_boxes(masks), (theirs + torch.tensor([0, 0, 1, 1])).long())


def test_iou_is_torchvisions() -> None:
    corners = 20 * torch.rand(2, 30, 2, 2)
    first, second = torch.cat([corners.amin(dim=2), corners.amax(dim=2)], dim=-1)
    torch.testing.assert_close(
        box_iou(first[:, None], second[None]), torchvision.ops.box_iou(first, second)
    )
    assert float(box_iou(torch.zeros(4), torch.zeros(4))) == 0, "empty boxes, no NaN"


def test_attention_box_is_around_the_largest_part() -> None:
    # 3x4 patches in an image of 30x80 pixels: a part of three patches, and a brighter single one.
    attention = torch.tensor([[[0.0, 0.2, 0.2, 0.0],
                               [0.0, 0.0, 0.2, 0.0],
                               [0.4, 0.0, 0.0, 0.0]]]).reshape(1, 1, 12)  # fmt: skip
    boxes = attention_boxes(attention, (3, 4), (30, 80), mass=1.0)
    assert boxes.tolist() == [[[20.0, 0.0, 60.0, 20.0]]]
    assert attention_boxes(attention, (3, 4), (30, 80), mass=0.4).tolist() == [[[0, 20, 20, 30]]]


def test_corloc_takes_any_of_the_boxes() -> None:
    found = torch.tensor([[0, 0, 10, 10]]).expand(3, 4)
    truth = [
        torch.tensor([[50, 50, 60, 60], [0, 0, 10, 20]]),  # the second, by exactly a half
        torch.tensor([[0, 0, 10, 21]]),
        torch.tensor([[0, 0, 10, 10], [0, 0, 1, 1], [2, 2, 3, 3]]),
    ]
    assert [corloc(found[i : i + 1], truth[i : i + 1]) for i in range(3)] == [1, 0, 1]
    assert corloc(found, truth) == pytest.approx(2 / 3)
    assert corloc(found, truth, threshold=0.51) == pytest.approx(1 / 3)
    assert corloc(found, found) == 1.0, "one box per image, as a tensor"


def test_padding_is_no_box() -> None:
    """An empty box among the predictions does not match what fills up short lists."""
    found = torch.zeros(2, 4)
    truth = [torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([[0.0, 0, 9, 9], [5, 5, 9, 9]])]
    assert corloc(found, truth, threshold=1e-9) == 0


def test_centre_boxes() -> None:
    assert centre_box((40, 80), 1.0).tolist() == [0, 0, 80, 40]
    left, top, right, bottom = centre_box((40, 80), 0.3).tolist()
    assert (right - left) * (bottom - top) == pytest.approx(0.3 * 40 * 80, rel=1e-5)
    assert (left + right, top + bottom) == pytest.approx((80, 40))
    assert (right - left) / (bottom - top) == pytest.approx(2, rel=1e-5)


def test_the_best_centre_box_is_found() -> None:
    masks = torch.zeros(2, 20, 20, dtype=torch.bool)
    masks[0, 5:15, 5:15], masks[1, 4:16, 4:16] = True, True
    best = centre_box_jaccard(masks)
    by_hand = {}
    for area in [i / 20 for i in range(1, 21)]:
        box = torch.zeros(20, 20, dtype=torch.bool)
        left, top, right, bottom = centre_box((20, 20), area).round().int().tolist()
        box[top:bottom, left:right] = True
        overlap = [int((m & box).sum()) / int((m | box).sum()) for m in masks]
        by_hand[area] = sum(overlap) / 2
    assert best.score == pytest.approx(max(by_hand.values()))
    assert by_hand[best.area] == max(by_hand.values())
    ignore = masks[1] & ~masks[0]  # what makes the second larger is void
    voids = torch.stack([ignore, ignore])
    assert centre_box_jaccard(masks, ignore=voids) == (1.0, 0.25)
    located = centre_box_corloc(mask_boxes(masks), (20, 20), threshold=0.9)
    assert located.score == 0.5, "no one box is that close to both"


def test_bad_input() -> None:
    boxes = torch.tensor([[0.0, 0, 1, 1]])
    with pytest.raises(ValueError, match="one box per image"):
        corloc(boxes[0], [boxes])
    with pytest.raises(ValueError, match="of 1 images; got 2"):
        corloc(boxes, [boxes, boxes])
    with pytest.raises(ValueError, match="image 0 must be"):
        corloc(boxes, [boxes[:0]])
    with pytest.raises(ValueError, match="finite"):
        corloc(boxes * float("nan"), [boxes])
    with pytest.raises(ValueError, match="threshold"):
        corloc(boxes, [boxes], threshold=50)
    with pytest.raises(ValueError, match="area must be"):
        centre_box((10, 10), 1.5)
    with pytest.raises(ValueError, match="empty"):
        mask_boxes(torch.zeros(1, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="bool"):
        mask_boxes(torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="at least one head has none"):
        attention_boxes(torch.zeros(1, 1, 4), (2, 2), (8, 8))
