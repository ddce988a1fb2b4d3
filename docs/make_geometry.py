"""Draws docs/img/geometry.png: one region of a scene, hidden in every crop that contains it.

    python docs/make_geometry.py

The scene is a built-in one and the crops are fixed, so the picture is the same each time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

import maskdistill as md
from maskdistill.data import Scenes

SIZE, PATCH = 288, 12
"""Pixels of the scene's sides and of a patch's; both divide every crop."""
# Colour-blind-safe (Okabe and Ito, 2008).
VIEWS = (
    ("global 1", (2, 2, 18, 18), False, 168, "#0072B2"),
    ("global 2", (7, 6, 23, 22), True, 168, "#D55E00"),
    ("local 1", (4, 9, 12, 17), False, 84, "#009E73"),
    ("local 2", (12, 12, 20, 20), True, 84, "#CC79A7"),
)
"""Name, box in 24ths of the image, whether mirrored, pixels of a side, and colour."""
HIDDEN = np.array([0.16, 0.16, 0.19], dtype=np.float32)
REGION = md.masking.SingleBlockMasker(0.15) | md.masking.SingleBlockMasker(0.1)
SEED, SCENE = 6, 4


def main() -> None:
    """Draw the picture and write it beside the pages."""
    image = torch.from_numpy(Scenes(SCENE + 1, size=SIZE).images[SCENE]).permute(2, 0, 1)
    boxes = torch.tensor([[box for _, box, _, _, _ in VIEWS]]) / 24
    flipped = torch.tensor([[flip for _, _, flip, _, _ in VIEWS]])
    crops = [cut(image, box, flip, side) for _, box, flip, side, _ in VIEWS]

    figure = Figure(figsize=(8.2, 3.2), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    places = figure.add_gridspec(2, 6)
    whole = bare(figure.add_subplot(places[:, :2]))
    rows: tuple[Literal["same", "complementary"], ...] = ("same", "complementary")
    for row, views in enumerate(rows):
        masker = md.SceneMasker(REGION, grid=(24, 24), views=views)
        policy = md.ViewPolicy.student_all_views(masker)
        seed = torch.Generator().manual_seed(SEED)
        masks = policy(crops, PATCH, generator=seed, boxes=boxes, flipped=flipped).student
        if row == 0:
            # The whole image is a crop too, in which the same seed hides the same region.
            everything = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
            seed, still = torch.Generator().manual_seed(SEED), torch.tensor([False])
            region = masker(1, (24, 24), generator=seed, boxes=everything, flipped=still)
            draw_scene(whole, image, region)
        for column, (crop, mask) in enumerate(zip(crops, masks, strict=True)):
            name, _, flip, _, colour = VIEWS[column]
            axis = bare(figure.add_subplot(places[row, column + 2]))
            axis.imshow(hide(crop[0], mask, 1.0), interpolation="nearest")
            axis.spines[:].set(visible=True, color=colour, linewidth=2.5)
            if row == 0:
                axis.set_title(f"{name}, mirrored" if flip else name, fontsize=9, color=colour)
            if column == 0:
                axis.set_ylabel(f'"{views}"', fontsize=8, family="monospace")
    figure.savefig(Path(__file__).parent / "img" / "geometry.png")


def cut(image: Tensor, box: tuple[int, ...], flip: bool, side: int) -> Tensor:
    """Return a crop of a box in 24ths of the image: ``(1, 3, side, side)`` uint8."""
    left, top, right, bottom = (edge * SIZE // 24 for edge in box)
    part = image[None, :, top:bottom, left:right].float()
    crop = F.interpolate(part, (side, side), mode="bilinear", antialias=True).round().byte()
    return crop.flip(3) if flip else crop


def hide(image: Tensor, mask: Tensor | None, opacity: float) -> Any:
    """Return ``(3, H, W)`` pixels as an array, darkened where the one mask hides."""
    pixels = image.permute(1, 2, 0).numpy().astype(np.float32) / 255
    assert mask is not None
    side = round(mask.shape[1] ** 0.5)
    hidden = F.interpolate(mask.view(1, 1, side, side).float(), pixels.shape[:2])[0, 0, :, :, None]
    alpha = opacity * hidden.numpy()
    return (1 - alpha) * pixels + alpha * HIDDEN


def draw_scene(axis: Any, image: Tensor, region: Tensor) -> None:
    """Draw the image with the region darkened and the crops outlined."""
    axis.imshow(hide(image, region, 0.6), interpolation="nearest")
    for name, box, _, _, colour in VIEWS:
        left, top, right, bottom = (edge * SIZE / 24 - 0.5 for edge in box)
        axis.add_patch(
            Rectangle((left, top), right - left, bottom - top, fill=False, ec=colour, lw=2.5)
        )
        axis.text(
            left + 4, top + 4, name, fontsize=8, va="top", color="white",
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip
    axis.set_title("the image, the crops, and the region", fontsize=9)


def bare(axis: Any) -> Any:
    """Take ticks and frame away, for a picture."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    return axis


if __name__ == "__main__":
    main()
