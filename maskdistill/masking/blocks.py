"""Maskers that hide rectangles of patches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from maskdistill.masking.algebra import complete
from maskdistill.masking.base import Masker, hidden_if_fixed
from maskdistill.masking.context import MaskContext
from maskdistill.masking.ratios import Ratio, check_pair, check_ratio

# One round places at most one rectangle in every image; BEiT gives each rectangle ten tries. What
# is left to hide shrinks geometrically, so a fixed number of rounds serves any grid without asking
# the device: up to ratio 0.75 on 14x14, more rounds hide no more (tests/masking/test_blocks.py).
_ROUNDS = 24
_TRIES = 10
_HALF = 2.0**12
"""A uniform float32 number has 24 binary digits; half of them are plenty for a choice."""


@dataclass(frozen=True, repr=False)
class BlockMasker(Masker):
    """Hides random rectangles, one after the other, until the ratio is reached.

    >>> BlockMasker(0.4)(8, (14, 14)).sum(dim=1).unique()
    tensor([78])

    Each rectangle draws its area uniformly between ``min_patches`` and what is left to hide, its
    aspect ratio log-uniformly, and its place uniformly among those where it fits; it is taken if it
    adds at least one patch and not more than what is left. Ten failures in a row end the image.

    Args:
        ratio: share of patches to hide, in [0, 1]; a number, a schedule, or one per image.
        min_patches: least area drawn for a rectangle, in patches; None is iBOT's, the square of a
            third of the grid's shorter side, rounded down.
        max_patches: greatest area drawn for a rectangle, and most patches that it may add; None is
            no limit but the ratio.
        aspect: least and greatest ratio of height to width.
        exact: complete each row at random to exactly round(ratio * N), as DINOv3 does. With
            ``False`` rows stop short where no further rectangle fits, as in BEiT, and never exceed
            the ratio.

    Rectangles lie inside the grid, so the centre is hidden far more often than the corners: at
    ratio 0.3 on 14x14 about twelve times; ``.rolled()`` treats all places alike.

    Raises:
        ValueError: an argument out of range.

    BEiT (Bao et al., 2022), whose generator iBOT and DINOv2 inherit; all images of the batch are
    drawn together, with the same distribution as the original's loop.
    """

    ratio: Ratio
    min_patches: int | None = 4
    max_patches: int | None = None
    aspect: tuple[float, float] = (0.3, 1 / 0.3)
    exact: bool = True  # type: ignore[assignment]  # a field here, a property elsewhere

    def __post_init__(self) -> None:
        check_ratio("BlockMasker", "ratio", self.ratio)
        least, most = self.min_patches, self.max_patches
        if least is not None and (not isinstance(least, int) or least < 1):
            raise ValueError(
                f"BlockMasker: min_patches must be None or an int >= 1; got {least!r}."
            )
        if most is not None and (not isinstance(most, int) or most < (least or 1)):
            raise ValueError(
                f"BlockMasker: max_patches must be None or an int >= min_patches ({least}); "
                f"got {most!r}."
            )
        object.__setattr__(self, "aspect", check_pair("BlockMasker", "aspect", self.aspect))
        if not 0 < self.aspect[0] <= self.aspect[1] < math.inf:
            raise ValueError(
                "BlockMasker: aspect must be (low, high) with 0 < low <= high; "
                f"got {self.aspect!r}."
            )

    def fixed_count(self, grid: tuple[int, int], progress: float = 0.0) -> int | None:
        """Return the count, if it is exact and the ratio does not vary by image."""
        return hidden_if_fixed(self.ratio, grid, progress) if self.exact else None

    def _draw(self, context: MaskContext) -> Tensor:
        count = context.count(self.ratio)
        target = count
        if isinstance(target, int):  # filled on the device: moving a number there would wait
            target = torch.full((context.batch,), target, device=context.device)
        mask = self._place(context, target.float()).flatten(1)
        return complete(mask, count, context) if self.exact else mask

    def _least(self, grid: tuple[int, int]) -> int:
        least = (min(grid) // 3) ** 2 if self.min_patches is None else self.min_patches
        if self.max_patches is not None and self.max_patches < least:
            raise ValueError(
                f"{self!r}: on a grid of {grid[0]}x{grid[1]} the least area is {least} patches, "
                "more than max_patches; choose a greater one, or min_patches yourself."
            )
        return least

    def _place(self, context: MaskContext, left: Tensor) -> Tensor:
        """Place rectangles in all images at once: ``(B,)`` patches to hide, ``(B, H, W)`` masks."""
        mask = torch.zeros(context.batch, *context.grid, dtype=torch.float32, device=context.device)
        # All numbers are drawn beforehand, so that what is drawn never depends on what was placed.
        for shape, place in context.rand(_ROUNDS, 2, context.batch, _TRIES):
            going: slice | Tensor = slice(None)
            if context.may_ask:  # leave finished images alone; an accelerator does them all
                going = left.nonzero().squeeze(1)
                if not len(going):
                    break
            mask[going], left[going] = self._round(
                mask[going], left[going], shape[going], place[going]
            )
        return mask > 0

    def _round(
        self, mask: Tensor, left: Tensor, shape: Tensor, place: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Place at most one rectangle in each image: the first of its tries that fits.

        Args:
            mask: ``(B, H, W)``, 1 where hidden.
            left: ``(B,)`` patches still to hide; 0 ends an image.
            shape: ``(B, tries)`` uniform numbers, of which half the digits choose the area and half
                the aspect ratio.
            place: ``(B, tries)`` uniform numbers that choose among the places where it fits.

        Returns:
            The new mask, and what is left after it.
        """
        height, width = mask.shape[1:]
        limit = left if self.max_patches is None else left.clamp(max=self.max_patches)
        h, w = self._sizes(shape, limit, (height, width))
        # A rectangle that does not fit has no place; any will do, for it is not taken.
        rows, columns = (height - h + 1).clamp_min(1), (width - w + 1).clamp_min(1)
        number = (place * (rows * columns)).floor()
        top = (number / columns).floor()
        start = number - top * columns
        added = h * w - _covered(mask, top, start, h, w)
        # Strictly smaller than the grid, as in BEiT: no rectangle spans it.
        fits = (h < height) & (w < width) & (added > 0) & (added <= limit[:, None])
        first = fits.int().argmax(dim=1, keepdim=True)
        placed = fits.gather(1, first) & (left > 0)[:, None]
        top, start, h, w, added = (t.gather(1, first) for t in (top, start, h, w, added))
        row = torch.arange(height, device=mask.device)
        column = torch.arange(width, device=mask.device)
        in_rows = ((row >= top) & (row < top + h) & placed).float()
        in_columns = ((column >= start) & (column < start + w)).float()
        mask = torch.maximum(mask, in_rows[:, :, None] * in_columns[:, None, :])
        # An image where all tries failed is finished: nothing is left to hide.
        return mask, (left - added[:, 0]) * placed[:, 0]

    def _sizes(self, shape: Tensor, limit: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Turn uniform numbers ``(B, tries)`` into heights and widths, whole but float."""
        least = self._least(grid)
        low, high = (math.log(end) for end in self.aspect)
        digits = shape * _HALF
        area = digits.floor()
        ratio = torch.exp(low + (high - low) * (digits - area))
        # Less left than the least reverses the range, as in BEiT: the area lies between the two.
        patches = least + (limit[:, None] - least) * (area / _HALF)
        return (patches * ratio).sqrt().round(), (patches / ratio).sqrt().round()


def _covered(mask: Tensor, top: Tensor, start: Tensor, h: Tensor, w: Tensor) -> Tensor:
    """Count the hidden patches inside rectangles: ``(B, H, W)`` and ``(B, tries)`` corners.

    A summed-area table answers each rectangle with four look-ups.
    """
    height, width = mask.shape[1:]
    table = F.pad(mask.cumsum(1).cumsum(2), (1, 0, 1, 0)).flatten(1)
    top, bottom = top * (width + 1), (top + h).clamp(max=height) * (width + 1)
    end = (start + w).clamp(max=width)
    corners = torch.stack([bottom + end, top + end, bottom + start, top + start], dim=1)
    both, above, before, corner = (
        table.gather(1, corners.long().flatten(1)).view_as(corners).unbind(1)
    )
    return both - above - before + corner
