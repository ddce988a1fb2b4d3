"""The mask network of `adios_scenes.py`, and what its masks are worth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maskdistill as md
from maskdistill.data import normalize
from maskdistill.evaluation import evaluating
from maskdistill.evaluation.judge import Judge

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class MaskNetwork(nn.Module):
    """A small U-Net that shares out each pixel among K masks.

    >>> MaskNetwork(masks=4)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 4, 32, 32])

    Args:
        masks: number of masks, K; at each pixel they sum to 1.
        width: channels at full resolution.
    """

    def __init__(self, masks: int, width: int = 8) -> None:
        super().__init__()
        self.fine, self.middle = _convolutions(3, width), _convolutions(width, 2 * width)
        self.coarse = _convolutions(2 * width, 4 * width)
        self.to_middle = _convolutions(6 * width, 2 * width)
        self.to_fine = _convolutions(3 * width, width)
        self.head = nn.Conv2d(width, masks, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(B, 3, h, w)``, sides multiples of 4, to soft masks ``(B, K, h, w)``."""
        fine = self.fine(images)
        middle = self.middle(F.max_pool2d(fine, 2))
        coarse = self.coarse(F.max_pool2d(middle, 2))
        middle = self.to_middle(torch.cat([_enlarge(coarse), middle], dim=1))
        fine = self.to_fine(torch.cat([_enlarge(middle), fine], dim=1))
        masks: Tensor = self.head(fine).softmax(dim=1)
        return masks


def _convolutions(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, padding=1), nn.GroupNorm(4, out), nn.ReLU(),
        nn.Conv2d(out, out, 3, padding=1), nn.GroupNorm(4, out), nn.ReLU(),
    )  # fmt: skip


def _enlarge(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class OneMask(nn.Module):
    """One of a network's masks, as the score ``(B, 1, h, w)`` that `LearnedMasker` wants."""

    def __init__(self, network: nn.Module, index: int) -> None:
        super().__init__()
        self.network, self.index = network, index

    def forward(self, images: Tensor) -> Tensor:
        """Return mask ``index`` of the images."""
        masks: Tensor = self.network(images)
        return masks[:, self.index : self.index + 1]


def compare_with_objects(network: nn.Module, judge: Judge, ratio: float) -> dict[str, Any]:
    """Return the Jaccard of hard masks with the object masks, pixel by pixel.

    A masker knows no pixels, only a grid: on a grid of one patch per pixel it draws pixel masks.

    Args:
        network: gives K soft masks.
        judge: of images that have object masks.
        ratio: the area of all masks that are compared.
    """
    assert judge.images.val_masks is not None
    objects = torch.from_numpy(judge.images.val_masks).flatten(1)
    pixels = normalize(judge.pixels(range(len(objects))))
    generator = torch.Generator().manual_seed(0)

    def jaccard(masker: md.Masker) -> float:
        masks = masker(len(pixels), (judge.size, judge.size), images=pixels, generator=generator)
        return float(((masks & objects).sum(dim=1) / (masks | objects).sum(dim=1)).mean())

    with evaluating(network):
        count = network(pixels[:1]).shape[1]
        each = [jaccard(md.masking.LearnedMasker(ratio, OneMask(network, k))) for k in range(count)]
    return {
        "jaccard_of_each_mask": each,
        "jaccard_rectangles": jaccard(md.masking.SingleBlockMasker(ratio)),
        "jaccard_random_pixels": jaccard(md.RandomMasker(ratio)),
        "object_share": float(objects.float().mean()),
    }


def draw_masks(
    network: nn.Module, chosen: int, judge: Judge, ratio: float, patch_size: int
) -> Figure:
    """Draw images, their soft masks, and the hard masks that a policy draws with the chosen one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    raw = judge.pixels(judge.shown)
    pixels = normalize(raw)
    masker = md.masking.LearnedMasker(ratio, OneMask(network, chosen))
    policy = md.AsymmetricMaskPolicy(masker, global_crops=1)
    with evaluating(network), torch.no_grad():
        soft = network(pixels)
        hard = policy([pixels], patch_size).student[0]
    assert hard is not None
    visible = md.mask_pixels(raw / 255 - 0.5, hard, patch_size) + 0.5  # hidden is grey
    names = [f"mask {k + 1}" + "\n(chosen)" * (k == chosen) for k in range(soft.shape[1])]
    rows = {
        "image": raw / 255,
        **dict(zip(names, soft.unbind(1), strict=True)),
        "hard mask": visible,
    }
    size = (0.8 * len(raw) + 0.5, 0.8 * len(rows))
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), len(raw), squeeze=False)
    for row, (name, shown) in enumerate(rows.items()):
        axes[row][0].set_ylabel(name, fontsize=7)
        for column, (axis, picture) in enumerate(zip(axes[row], shown, strict=True)):
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            colours = picture.permute(1, 2, 0) if picture.ndim == 3 else picture
            axis.imshow(colours.numpy(), cmap="inferno", vmin=0, vmax=1)
            if judge.images.val_masks is not None and row:
                outline = judge.images.val_masks[judge.shown[column]]
                axis.contour(outline, levels=[0.5], colors="#56B4E9", linewidths=0.8)
    return figure
