"""Figures of what is hidden."""

from __future__ import annotations

import matplotlib
import pytest
import torch

import maskdistill as md
from maskdistill import plotting
from maskdistill.data import MultiCrop
from tests.plotting.shown import (
    IMAGES,
    SCENES,
    views,
)


def test_crops_are_outlined_where_they_lie() -> None:
    figure = views(md.AsymmetricMaskPolicy(md.RandomMasker(0.3)))
    whole = figure.axes[0]
    frames = [p for p in whole.patches if isinstance(p, matplotlib.patches.Rectangle)]
    assert len(frames) == 5
    assert {p.get_linestyle() for p in frames[:2]} == {"-"}
    assert not {p.get_linestyle() for p in frames[2:]} & {"-"}
    assert [text.get_text() for text in whole.texts] == ["1", "2", "1", "2", "3"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        boxes = MultiCrop(32, 16, local_crops=3)(SCENES[0][0]).boxes
    size = whole.images[0].get_array().shape[0]
    left, top, right, bottom = (boxes[3] * size - 0.5).tolist()
    assert frames[3].get_bbox().extents == pytest.approx((left, top, right, bottom), abs=0.01)
    assert not views(md.ViewPolicy(), boxes=False).axes[0].patches


def test_each_role_is_shown_what_it_sees() -> None:
    figure = views(md.ViewPolicy(teacher_global=md.RandomMasker(0.5)))
    said = [axis.get_xlabel() for axis in figure.axes[1:]]
    assert said == ["clean"] * 5 + ["50% hidden"] * 2 + [""] * 3
    assert [t.get_text() for axis in figure.axes[8:] for t in axis.texts] == ["not seen"] * 3


def test_boxes_of_another_shape_are_refused() -> None:
    crops = [torch.zeros(1, 3, 16, 16, dtype=torch.uint8)] * 2
    policy = md.ViewPolicy()
    masks = policy(crops, 8)
    with pytest.raises(ValueError, match=r"\(1, 2, 4\).*\(2, 4\)"):
        plotting.plot_view_masks(IMAGES[0], crops, masks, policy, 8, boxes=torch.zeros(2, 4))
