"""Maskers with a regular pattern: so many visible patches in each cell of the grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskdistill.masking._engine import top_k
from maskdistill.masking.base import Masker
from maskdistill.masking.context import MaskContext


@dataclass(frozen=True, repr=False)
class GridMasker(Masker):
    """Shows so many patches in each square cell of the grid, always the same or random ones.

    >>> GridMasker()(1, (4, 4)).view(4, 4)
    tensor([[False,  True, False,  True],
            [ True,  True,  True,  True],
            [False,  True, False,  True],
            [ True,  True,  True,  True]])
    >>> GridMasker(random=True).fixed_count((14, 14))
    147

    Args:
        cell: patches along a side of a cell. Cells at the right and lower edge are cut where the
            grid ends, and show what they have, if it is less than ``visible``.
        visible: patches shown in each cell.
        random: draw the visible patches anew in each cell; ``False`` shows each cell's first.

    Raises:
        ValueError: an argument out of range.

    The fixed form is MAE's grid-wise masking (He et al., 2022, Fig. 6), which hides 3 of 4 patches;
    the random one is the uniform sampling of UM-MAE (Li et al., 2022).
    """

    cell: int = 2
    visible: int = 1
    random: bool = False

    def __post_init__(self) -> None:
        for name, least in (("cell", 1), ("visible", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"GridMasker: {name} must be an int >= {least}; got {value!r}.")
        if self.visible > self.cell**2:
            raise ValueError(
                f"GridMasker: a cell of {self.cell}x{self.cell} patches cannot show {self.visible}."
            )

    def fixed_count(self, grid: tuple[int, int], progress: float = 0.0) -> int:
        """Return the count, which depends on the grid alone."""

        def sides(length: int) -> list[int]:
            return [min(self.cell, length - i) for i in range(0, length, self.cell)]

        return sum(max(h * w - self.visible, 0) for h in sides(grid[0]) for w in sides(grid[1]))

    def _draw(self, context: MaskContext) -> Tensor:
        (height, width), size = context.grid, self.cell
        rows, columns = -(-height // size), -(-width // size)
        inside = torch.zeros(
            rows * size, columns * size, dtype=torch.float32, device=context.device
        )
        inside[:height, :width] = 1
        inside = inside.unflatten(0, (rows, size)).unflatten(2, (columns, size))
        inside = inside.transpose(1, 2).flatten(2).flatten(0, 1)  # (cells, size * size)
        if self.random:
            order = context.rand(context.batch * rows * columns, size * size)
        else:
            order = torch.linspace(
                1, 0, size * size + 1, dtype=torch.float32, device=context.device
            )[:-1]
        # Places outside the grid come last, so that a cut cell shows what it has.
        scores = inside.repeat(context.batch, 1) * (1 + order)
        shown = top_k(scores, self.visible).view(context.batch, rows, columns, size, size)
        mask = ~shown.transpose(2, 3).reshape(context.batch, rows * size, columns * size)
        return mask[:, :height, :width].flatten(1)


@dataclass(frozen=True, repr=False)
class CheckerboardMasker(Masker):
    """Hides every second square, like the black squares of a chessboard.

    >>> CheckerboardMasker(random=False)(1, (2, 4)).view(2, 4)
    tensor([[ True, False,  True, False],
            [False,  True, False,  True]])

    Args:
        size: patches along a side of a square.
        random: toss a coin for each image, whether the black or the white squares are hidden.

    Raises:
        ValueError: size out of range.
    """

    size: int = 1
    random: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"CheckerboardMasker: size must be an int >= 1; got {self.size!r}.")

    def fixed_count(self, grid: tuple[int, int], progress: float = 0.0) -> int | None:
        """Return the count, unless black and white differ and the coin decides."""
        black = sum(
            (row // self.size + column // self.size) % 2 == 0
            for row in range(grid[0])
            for column in range(grid[1])
        )
        if self.random and 2 * black != grid[0] * grid[1]:
            return None
        return black

    def _draw(self, context: MaskContext) -> Tensor:
        row = torch.arange(context.grid[0], device=context.device) // self.size
        column = torch.arange(context.grid[1], device=context.device) // self.size
        black = (row[:, None] + column) % 2 == 0
        if self.random:
            return black.flatten() ^ (context.rand(context.batch, 1) < 0.5)
        return black.flatten().repeat(context.batch, 1)
