"""Maskers made of rectangles that are cheap to draw: one for each image, or equal squares."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from maskdistill.masking.algebra import complete
from maskdistill.masking.context import MaskContext
from maskdistill.masking.ratios import check_pair, check_ratio
from maskdistill.masking.scores import ExactMasker


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

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "aspect", check_pair("SingleBlockMasker", "aspect", self.aspect))
        if not 0 < self.aspect[0] <= self.aspect[1] < math.inf:
            raise ValueError(
                "SingleBlockMasker: aspect must be (low, high) with 0 < low <= high; "
                f"got {self.aspect!r}."
            )

    def _hide(self, context: MaskContext, count: int | Tensor) -> Tensor:
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

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ratio("SquaresMasker", "adjust", self.adjust, per_image=False, schedules=False)
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"SquaresMasker: size must be an int >= 1; got {self.size!r}.")

    def _hide(self, context: MaskContext, count: int | Tensor) -> Tensor:
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
