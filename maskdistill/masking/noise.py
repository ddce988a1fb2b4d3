"""Masks cut from filtered noise, whose spectrum says how the hidden patches cluster."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from maskdistill.masking.context import MaskContext
from maskdistill.masking.scores import ScoreMasker

Color = Literal["red", "green", "blue", "purple"]


@dataclass(frozen=True, repr=False)
class ColorNoiseMasker(ScoreMasker):
    """Hides where noise of a colour is highest: blobs of a size, or patches that keep apart.

    >>> ColorNoiseMasker(0.75, "green")(8, (14, 14)).sum(dim=1).unique()
    tensor([147])

    White noise W is filtered by Gaussians G of two widths:

    - ``"red"``, low frequencies, G_coarse * W: large blobs;
    - ``"green"``, middle frequencies, G_fine * W - G_coarse * W: blobs of one size;
    - ``"blue"``, high frequencies, W - G_fine * W: patches that keep apart from each other;
    - ``"purple"``, all but the middle, W - G_fine * W + G_coarse * W.

    Every image draws noise of its own, larger than the grid, so that edges are like the middle. But
    blobs as large as the grid crowd out others within it: red noise at ratio 0.75 hides the centre
    in 0.77 of the draws and a corner in 0.73.

    Args:
        ratio: share of patches to hide, in [0, 1]; a number, a schedule, or one per image.
        color: ``"red"``, ``"green"``, ``"blue"`` or ``"purple"``.
        fine: standard deviation of the narrower Gaussian, in patches.
        coarse: standard deviation of the wider one, in patches.

    Raises:
        ValueError: an argument out of range.

    ColorMAE (Hinojosa et al., 2024), where green was best. It cuts its masks from files of noise
    whose widths are not published: the defaults here are our choice.
    """

    color: Color = "green"
    fine: float = 1.0
    coarse: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.color not in get_args(Color):
            raise ValueError(
                f"ColorNoiseMasker: color must be one of {', '.join(get_args(Color))}; "
                f"got {self.color!r}."
            )
        if not 0 < self.fine < self.coarse < math.inf:
            raise ValueError(
                "ColorNoiseMasker: fine and coarse must be widths in patches, 0 < fine < coarse; "
                f"got {self.fine!r} and {self.coarse!r}."
            )

    def _scores(self, context: MaskContext) -> Tensor:
        margin = math.ceil(3 * self.coarse)
        height, width = context.grid
        noise = context.rand(context.batch, height + 2 * margin, width + 2 * margin) - 0.5

        def blurred(sigma: float) -> Tensor:
            down, across = (_gaussian(n, margin, sigma, context.device) for n in context.grid)
            return down @ noise @ across.T

        white = noise[:, margin : margin + height, margin : margin + width]
        match self.color:
            case "red":
                field = blurred(self.coarse)
            case "green":
                field = blurred(self.fine) - blurred(self.coarse)
            case "blue":
                field = white - blurred(self.fine)
            case "purple":
                field = white - blurred(self.fine) + blurred(self.coarse)
        return field.flatten(1)


def _gaussian(length: int, margin: int, sigma: float, device: torch.device) -> Tensor:
    """Return the matrix that blurs ``length + 2 * margin`` numbers to the ``length`` inner ones."""
    inner = torch.arange(length, device=device)[:, None] + margin
    distance = torch.arange(length + 2 * margin, device=device) - inner
    # Cut off at the margin for every row alike, and normalised.
    weight = torch.exp(-0.5 * (distance / sigma) ** 2) * (distance.abs() <= margin)
    return (weight / weight.sum(dim=1, keepdim=True)).to(torch.float32)
