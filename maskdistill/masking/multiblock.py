"""I-JEPA's masks: a large context block without several smaller target blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from maskdistill.masking.base import Masker
from maskdistill.masking.context import MaskContext
from maskdistill.masking.ratios import check_pair

# As in the original, a context that is left with too few patches is drawn again.
_TRIES = 20


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

    def __post_init__(self) -> None:
        for name in ("targets", "min_visible"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"MultiBlockMasker: {name} must be an int >= 0; got {value!r}.")
        for name in ("target_scale", "context_scale", "target_aspect"):
            ends = check_pair("MultiBlockMasker", name, getattr(self, name))
            object.__setattr__(self, name, ends)
            most = 1.0 if name.endswith("scale") else math.inf
            if not 0 < ends[0] <= ends[1] <= most or math.isinf(ends[1]):
                raise ValueError(
                    f"MultiBlockMasker: {name} must be (low, high) with 0 < low <= high"
                    f"{' <= 1' if most == 1 else ''}; got {ends!r}."
                )

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

    def _draw(self, context: MaskContext) -> Tensor:
        rows, columns = self._blocks(context, self.targets, self.target_scale, self.target_aspect)
        if context.memory is not None:
            each = rows[..., :, None] * columns[..., None, :]
            context.memory[self, "targets", context.grid] = each.flatten(2) > 0
        free = (rows.transpose(1, 2) @ columns == 0).float()
        rows, columns = self._blocks(context, _TRIES, self.context_scale, (1.0, 1.0))
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
