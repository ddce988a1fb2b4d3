"""What the tests of figures draw."""

from __future__ import annotations

from typing import Any

import matplotlib.text
import numpy as np
import torch
from torch import Tensor

import maskdistill as md
from maskdistill import plotting
from maskdistill.data import MultiCrop, Scenes

GRID = (4, 4)
SCENES = Scenes(4, size=32, split="val")
IMAGES = torch.from_numpy(SCENES.images).permute(0, 3, 1, 2).contiguous()
MASKS = torch.from_numpy(SCENES.masks)
OUTLINE = [86, 180, 233]


def attention(images: int = 4, heads: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(images, heads, 16, generator=generator).softmax(dim=-1)


def curve(accuracy: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    ratios = tuple(i / 10 for i in range(10))
    return ratios, tuple(accuracy * (1 - r) for r in ratios)


def metrics(*values: float, key: str = "knn") -> list[dict[str, float]]:
    return [{"step": 100 * i, key: value} for i, value in enumerate(values)]


def views(policy: md.ViewPolicy, boxes: bool = True) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        crops = MultiCrop(32, 16, local_crops=3)(SCENES[0][0])
    images = [crop[None] for crop in crops.images]
    masks = policy(images, 8, generator=torch.Generator().manual_seed(0))
    where = crops.boxes[None] if boxes else None
    return plotting.plot_view_masks(IMAGES[0], images, masks, policy, 8, boxes=where)


def every_figure() -> dict[str, Any]:
    maps = {"random weights": attention(seed=1), "asymmetric": attention()}
    seeds = {"none": [metrics(0.4, 0.5), metrics(0.4, 0.6)], "asymmetric": [metrics(0.3, 0.7)]}
    return {
        "views": views(md.AsymmetricMaskPolicy(md.RandomMasker(0.3))),
        "masker": plotting.plot_masker(md.RandomMasker(0.3), GRID, samples=50),
        "attention": plotting.plot_attention(IMAGES, maps, GRID, MASKS),
        "heads": plotting.plot_attention_heads(IMAGES[:2], attention(2), GRID, MASKS[:2]),
        "strip": plotting.plot_attention_strip(IMAGES, {0: attention(), 90: attention()}, GRID),
        "curves": plotting.plot_curves(metrics(0.4, 0.5), {"raw pixels": 0.4}, 5.5),
        "bands": plotting.plot_training_bands(seeds, floors={"random weights": 0.4}),
        "occlusion": plotting.plot_occlusion({"none": [curve(0.6), curve(0.5)]}),
        "intervals": plotting.plot_intervals(
            {"asymmetric": {"knn_20": (0.01, 0.02), "effective_rank": (3.0, 5.0)}},
            units={"knn_20": "%"}, better={"knn_20": "higher"}, baseline="none",
        ),
    }  # fmt: skip


def luminance(colour: Any) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def contrast(one: Any, other: Any) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def overlapping(figure: Any, texts: Any) -> list[tuple[str, str]]:
    """Return the pairs of texts that cover each other, by a pixel at least."""
    figure.canvas.draw()
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    found = []
    for i, (one, a) in enumerate(boxes):
        for other, b in boxes[:i]:
            wide = min(a.x1, b.x1) - max(a.x0, b.x0)
            high = min(a.y1, b.y1) - max(a.y0, b.y0)
            if wide > 1 and high > 1:
                found.append((one, other))
    return found


def beyond(figure: Any) -> list[str]:
    """Return the texts that the figure's edge cuts."""
    figure.canvas.draw()
    right, top = figure.bbox.width + 2, figure.bbox.height + 2
    cut = []
    for text in figure.findobj(matplotlib.text.Text):
        box = text.get_window_extent()
        if text.get_text().strip() and text.get_visible() and not (
            box.x0 > -2 and box.y0 > -2 and box.x1 < right and box.y1 < top
        ):  # fmt: skip
            cut.append(text.get_text())
    return cut
