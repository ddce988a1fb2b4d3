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
from maskdistill.masking.ratios import Ratio, check_ratio

# One round places at most one rectangle in every image; BEiT gives each rectangle ten tries. What
# is left to hide shrinks geometrically, so a fixed number of rounds serves any grid without asking
# the device: up to ratio 0.75 on 14x14, more rounds hide no more (tests/masking/test_blocks.py).
_ROUNDS = 24
_TRIES = 10


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
        max_patches: greatest area of a rectangle, in patches; None is no limit but the ratio.
        aspect: least and greatest ratio of height to width.
        exact: complete each row at random to exactly round(ratio * N), as DINOv3 does. With
            ``False`` rows stop short where no further rectangle fits, as in BEiT, and never exceed
            the ratio.

    Rectangles lie inside the grid, so the centre is hidden far more often than the corners: at
    ratio 0.3 on 14x14 about twelve times (tests/masking/test_blocks.py).

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
        if len(self.aspect) != 2 or not 0 < self.aspect[0] <= self.aspect[1] < math.inf:
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
        mask = self._place(context, target).flatten(1)
        return complete(mask, count, context) if self.exact else mask

    def _place(self, context: MaskContext, target: Tensor) -> Tensor:
        """Place rectangles in all images at once: ``(B,)`` targets to ``(B, H, W)`` masks."""
        batch, (height, width) = context.batch, context.grid
        mask = torch.zeros(batch, height, width, dtype=torch.bool, device=context.device)
        left = target.clone()
        rows = torch.arange(height, device=context.device)
        columns = torch.arange(width, device=context.device)
        least = (min(height, width) // 3) ** 2 if self.min_patches is None else self.min_patches
        # All numbers are drawn beforehand, so that what is drawn never depends on what was placed.
        numbers = context.rand(_ROUNDS, 4, batch, _TRIES)
        for area, aspect, place_y, place_x in numbers:
            h, w = self._sizes(area, aspect, left, least)
            top = (place_y * (height - h + 1)).floor().clamp(max=height - 1)
            start = (place_x * (width - w + 1)).floor().clamp(max=width - 1)
            top, start, h, w = (t.long() for t in (top, start, h, w))
            # On a rectangle that does not fit, top and start are meaningless; clamp its reading.
            added = h * w - _covered(mask, top.clamp(min=0), start.clamp(min=0), h, w)
            # Strictly smaller than the grid, as in BEiT: no rectangle spans it.
            fits = (h < height) & (w < width) & (added > 0) & (added <= self._limit(left)[:, None])
            first = fits.int().argmax(dim=1, keepdim=True)
            placed = fits.gather(1, first) & (left > 0)[:, None]
            top, start, h, w, added = (t.gather(1, first) for t in (top, start, h, w, added))
            in_rows = (rows >= top) & (rows < top + h) & placed
            in_columns = (columns >= start) & (columns < start + w)
            mask |= in_rows[:, :, None] & in_columns[:, None, :]
            # An image where all tries failed is finished: nothing is left to hide.
            left = (left - added[:, 0]) * placed[:, 0]
            if mask.device.type == "cpu" and not torch.compiler.is_compiling() and not left.any():
                break  # free to ask on a CPU; an accelerator would have to wait for the answer
        return mask

    def _limit(self, left: Tensor) -> Tensor:
        return left if self.max_patches is None else left.clamp(max=self.max_patches)

    def _sizes(
        self, area: Tensor, aspect: Tensor, left: Tensor, least: int
    ) -> tuple[Tensor, Tensor]:
        """Turn uniform numbers ``(B, tries)`` into heights and widths, whole but float."""
        low, high = (math.log(end) for end in self.aspect)
        # Less left than the least reverses the range, as in BEiT: the area lies between the two.
        patches = least + (self._limit(left)[:, None] - least) * area
        ratio = torch.exp(low + (high - low) * aspect)
        return (patches * ratio).sqrt().round(), (patches / ratio).sqrt().round()


def _covered(mask: Tensor, top: Tensor, start: Tensor, h: Tensor, w: Tensor) -> Tensor:
    """Count the hidden patches inside rectangles: ``(B, H, W)`` and ``(B, tries)`` corners.

    A summed-area table answers each rectangle with four look-ups.
    """
    height, width = mask.shape[1:]
    table = F.pad(mask.to(torch.int32).cumsum(1).cumsum(2), (1, 0, 1, 0)).flatten(1)
    bottom, end = (top + h).clamp(max=height), (start + w).clamp(max=width)

    def at(row: Tensor, column: Tensor) -> Tensor:
        return table.gather(1, row * (width + 1) + column)

    return at(bottom, end) - at(top, end) - at(bottom, start) + at(top, start)
