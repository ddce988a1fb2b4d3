"""Maskers made of rectangles that are cheap to draw: one for each image, or equal squares."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maskdistill.masking import constraints
from maskdistill.masking.base import ExactMasker, Masker, complete, hidden_if_fixed
from maskdistill.masking.context import MaskContext
from maskdistill.masking.ratios import Ratio

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

    constraints = {
        "ratio": constraints.ratio,
        "min_patches": constraints.optional(constraints.whole(1)),
        "max_patches": constraints.optional(constraints.whole(1)),
        "aspect": constraints.interval(),
    }

    def check_parameters(self) -> None:
        least, most = self.min_patches, self.max_patches
        if most is not None and most < (least or 1):
            raise ValueError(
                f"BlockMasker: max_patches must be None or an int >= min_patches ({least}); "
                f"got {most!r}."
            )

    def fixed_count(self, grid: tuple[int, int], progress: float = 0.0) -> int | None:
        """Return the count, if it is exact and the ratio does not vary by image."""
        return hidden_if_fixed(self.ratio, grid, progress) if self.exact else None

    def draw(self, context: MaskContext) -> Tensor:
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
            if context.can_look:  # leave finished images alone; an accelerator does them all
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


@dataclass(frozen=True, repr=False)
class SingleBlockMasker(ExactMasker):
    """Hides one rectangle, or shows one and hides the rest.

    >>> SingleBlockMasker(0.5)(8, (14, 14)).sum(dim=1).unique()
    tensor([98])
    >>> SingleBlockMasker(0.65, inverse=True).rolled()
    SingleBlockMasker(0.65, inverse=True).rolled()

    The rectangle's ratio of height to width is log-uniform as far as the grid admits it, its place
    uniform among those where it fits; its last row is cut to the exact number of patches.

    Args:
        ratio: share of patches to hide, in [0, 1]; a number, a schedule, or one per image.
        aspect: least and greatest ratio of height to width.
        inverse: show the rectangle, and hide what is around it.

    Raises:
        ValueError: an argument out of range.

    CAPI (Darcet et al., 2025), which rolls its masks: ``.rolled()``. Without that the centre of the
    grid is in the rectangle far more often than its corners.
    """

    aspect: tuple[float, float] = (0.5, 2.0)
    inverse: bool = False

    constraints = {"aspect": constraints.interval()}

    def choose(self, context: MaskContext, count: int | Tensor) -> Tensor:
        if self.inverse:
            count = context.patches - count
        mask = self._rectangle(context, count)
        return ~mask if self.inverse else mask

    def _rectangle(self, context: MaskContext, count: int | Tensor) -> Tensor:
        """Mark the first ``count`` patches of a rectangle just large enough: ``(B, N)``."""
        height, width = context.grid
        size: Tensor = (
            torch.zeros(context.batch, dtype=torch.float32, device=context.device) + count
        )
        shape, place_y, place_x = context.rand(3, context.batch)
        low = (size.clamp_min(1) / width**2).log().clamp_min(math.log(self.aspect[0]))
        high = (height**2 / (size + 1e-5)).log().clamp_max(math.log(self.aspect[1]))
        aspect = (low + (high - low) * shape).exp()
        # Where the grid is too narrow for any such rectangle, it spans the grid on one side.
        h = (size * aspect).sqrt().ceil().clamp(1, height)
        w = torch.maximum((size / aspect).sqrt().ceil(), (size / h).ceil()).clamp(1, width)
        h = torch.maximum(h, (size / w).ceil())
        top = (place_y * (height - h + 1)).floor().clamp(max=height - 1)
        left = (place_x * (width - w + 1)).floor().clamp(max=width - 1)
        down = torch.arange(height, device=context.device) - top[:, None]
        right = torch.arange(width, device=context.device) - left[:, None]
        # The patches of the rectangle are numbered row by row; those outside are out of range.
        outside = height * width
        start = torch.where(down >= 0, down * w[:, None], outside)
        step = torch.where((right >= 0) & (right < w[:, None]), right, outside)
        number = start[:, :, None] + step[:, None, :]
        return (number < size[:, None, None]).flatten(1)


@dataclass(frozen=True, repr=False)
class SquaresMasker(ExactMasker):
    """Hides squares of one size around random patches, or shows them and hides the rest.

    >>> SquaresMasker(0.8, inverse=True)(8, (14, 14)).sum(dim=1).unique()
    tensor([157])

    As many squares are drawn as would cover the ratio and ``adjust`` if none overlapped; then
    single patches are taken away or added at random until the number is exact.

    Args:
        ratio: share of patches to hide, in [0, 1]; a number, a schedule, or one per image.
        size: patches along a side of a square.
        adjust: share of the grid that is drawn beyond the ratio, because squares overlap.
        inverse: show the squares, and hide what is around them.

    Raises:
        ValueError: an argument out of range.

    data2vec 2.0 (Baevski et al., 2023), with ``inverse=True``, size 3 and ratio 0.8.
    """

    size: int = 3
    adjust: float = 0.07
    inverse: bool = False

    constraints = {
        "adjust": constraints.fixed_share,
        "size": constraints.whole(1),
    }

    def choose(self, context: MaskContext, count: int | Tensor) -> Tensor:
        if self.inverse:
            count = context.patches - count
        mask = complete(self._squares(context, count), count, context)
        return ~mask if self.inverse else mask

    def _squares(self, context: MaskContext, count: int | Tensor) -> Tensor:
        (height, width), area = context.grid, self.size**2
        extra = self.adjust * context.patches
        number: int | Tensor
        if isinstance(count, int):
            most = number = int((count + extra) / area)
        else:
            most = int((context.patches + extra) / area)
            number = ((count + extra) / area).long()[:, None]
        place_y, place_x = context.rand(2, context.batch, most)
        # A margin on all sides, so that a square may reach over the edge.
        margin, before = self.size - 1, self.size // 2
        y = (place_y * height).floor().long() + margin - before
        x = (place_x * width).floor().long() + margin - before
        across = width + margin
        shape = (context.batch, (height + margin) * across)
        centres = torch.zeros(shape, dtype=torch.float32, device=context.device)
        wanted = (torch.arange(most, device=context.device) < number).float()
        centres.scatter_add_(1, y * across + x, wanted.expand(context.batch, -1))
        mask = centres.view(context.batch, height + margin, across) > 0
        # Spread each centre along the columns, then along the rows.
        tall = mask[:, :height].clone()
        for step in range(1, self.size):
            tall |= mask[:, step : step + height]
        square = tall[:, :, :width].clone()
        for step in range(1, self.size):
            square |= tall[:, :, step : step + width]
        return square.flatten(1)


# As in the original, a context that is left with too few patches is drawn again.
_CONTEXT_TRIES = 20


class Blocks(NamedTuple):
    """The blocks of a batch.

    Attributes:
        context: ``(B, N)`` bool, True where the context encoder sees.
        targets: ``(B, T, N)`` bool, True where each target lies.
    """

    context: Tensor
    targets: Tensor


@dataclass(frozen=True, repr=False)
class MultiBlockMasker(Masker):
    """Hides all but a large block, and several smaller blocks within: what is to be predicted.

    The targets of an image are of one size.

    >>> MultiBlockMasker()(8, (14, 14)).shape
    torch.Size([8, 196])
    >>> blocks = MultiBlockMasker().draw_blocks(8, (14, 14))
    >>> blocks.context.shape, blocks.targets.shape
    (torch.Size([8, 196]), torch.Size([8, 4, 196]))

    The call returns the context encoder's mask, ``~blocks.context``. A predictor wants the targets
    too: ``draw_blocks`` returns both, of the same draw as the call.

    Args:
        targets: number of target blocks, T.
        target_scale: least and greatest share of the grid in a target.
        target_aspect: least and greatest ratio of a target's height to its width.
        context_scale: least and greatest share of the grid in the context block, a square as far as
            the grid admits.
        min_visible: a context left with this many patches or fewer is drawn again, up to 20 times;
            then the best of them is taken.

    Raises:
        ValueError: an argument out of range.

    I-JEPA (Assran et al., 2023). Four differences from its code: blocks reach the last row and
    column; a block's scale and aspect ratio are independent; every image, not every batch, draws
    the size of its targets and of its context; and no index is cut off to make rows equally long.
    For equal rows use ``.exactly(ratio)``.
    """

    targets: int = 4
    target_scale: tuple[float, float] = (0.15, 0.2)
    target_aspect: tuple[float, float] = (0.75, 1.5)
    context_scale: tuple[float, float] = (0.85, 1.0)
    min_visible: int = 10

    constraints = {
        "targets": constraints.whole(0),
        "target_scale": constraints.interval(1.0),
        "target_aspect": constraints.interval(),
        "context_scale": constraints.interval(1.0),
        "min_visible": constraints.whole(0),
    }

    def draw_blocks(
        self,
        batch: int,
        grid: tuple[int, int],
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Blocks:
        """Draw the context and each target; arguments as in the call."""
        memory: dict[object, Tensor] = {}
        context = ~self(batch, grid, generator=generator, device=device, memory=memory)
        return Blocks(context, memory[self, "targets", tuple(grid)])

    def draw(self, context: MaskContext) -> Tensor:
        rows, columns = self._blocks(context, self.targets, self.target_scale, self.target_aspect)
        if context.memory is not None:
            each = rows[..., :, None] * columns[..., None, :]
            context.memory[self, "targets", context.grid] = each.flatten(2) > 0
        free = (rows.transpose(1, 2) @ columns == 0).float()
        rows, columns = self._blocks(context, _CONTEXT_TRIES, self.context_scale, (1.0, 1.0))
        visible = ((rows @ free) * columns).sum(dim=2)
        # The first that leaves enough; where none does, the one that leaves most.
        best = torch.where(visible > self.min_visible, context.patches, visible).argmax(dim=1)
        row, column = (
            side.gather(1, best[:, None, None].expand(-1, 1, side.shape[2])).squeeze(1)
            for side in (rows, columns)
        )
        return (row[:, :, None] * column[:, None, :] * free == 0).flatten(1)

    def _blocks(
        self,
        context: MaskContext,
        number: int,
        scale: tuple[float, float],
        aspect: tuple[float, float],
    ) -> tuple[Tensor, Tensor]:
        """Draw rectangles of one random size in random places.

        Returns:
            ``(B, number, H)`` and ``(B, number, W)``: 1 in the rows and columns of each, else 0.
        """
        height, width = context.grid
        area, shape = context.rand(2, context.batch, 1)
        place_y, place_x = context.rand(2, context.batch, number)
        size = (context.patches * (scale[0] + (scale[1] - scale[0]) * area)).floor()
        ratio = aspect[0] + (aspect[1] - aspect[0]) * shape
        # Strictly smaller than the grid, as in the original, unless the grid is one patch wide.
        h = (size * ratio).sqrt().round().clamp(1, max(height - 1, 1))
        w = (size / ratio).sqrt().round().clamp(1, max(width - 1, 1))

        def reach(place: Tensor, extent: Tensor, length: int) -> Tensor:
            start = (place * (length - extent + 1)).floor().clamp(max=length - 1)[..., None]
            at = torch.arange(length, device=context.device)
            return ((at >= start) & (at < start + extent[..., None])).float()

        return reach(place_y, h, height), reach(place_x, w, width)
