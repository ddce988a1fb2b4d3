"""The shapes in which a model hands over its patch tokens, and one way to write into each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from maskdistill.applying import replace_tokens

Grid = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """Where patch tokens lie in the output of a module.

    Attributes:
        axes: ``"b n d"``, ``"b h w d"`` or ``"b d h w"``.
        in_tuple: whether the tokens are the first of a tuple, as in XCiT or MViTv2.
        tokens_per_patch: rows and columns of tokens in one patch of the mask: (1, 1) in a ViT,
            (8, 8) in a Swin, whose stem is finer than its last stage; None where patches and
            tokens are not aligned.
    """

    axes: str
    in_tuple: bool = False
    tokens_per_patch: Grid | None = (1, 1)

    def tokens(self, output: Any) -> Tensor:
        """Return the tensor of tokens in the output."""
        tokens: Tensor = output[0] if self.in_tuple else output
        return tokens

    def width(self, output: Any) -> int:
        """Return the tokens' width, D."""
        return int(self.tokens(output).shape[1 if self.axes == "b d h w" else -1])

    def map(self, output: Any, function: Callable[[Tensor], Tensor]) -> Any:
        """Return the output with its tokens put through a function."""
        changed = function(self.tokens(output))
        return (changed, *output[1:]) if self.in_tuple else changed

    def replace(self, output: Any, mask: Tensor, mask_token: Tensor, grid: Grid) -> Any:
        """Return the output with the mask token where patches are hidden.

        Args:
            output: what the module returned, in this layout.
            mask: ``(B, N)`` bool over the patch grid.
            mask_token: ``(D,)``.
            grid: patch rows and columns of this very input.

        Raises:
            ValueError: an output whose token grid is not a multiple of the patch grid.
        """
        tokens = self.tokens(output)
        size = self._token_grid(tokens, grid)
        if size != grid:
            mask = upsample(mask, grid, size)
        is_flat = self.axes == "b n d"
        flat = tokens if is_flat else rearrange(tokens, f"{self.axes} -> b (h w) d")
        replaced = replace_tokens(flat, mask, mask_token)
        if not is_flat:
            replaced = rearrange(replaced, f"b (h w) d -> {self.axes}", h=size[0])
        return (replaced, *output[1:]) if self.in_tuple else replaced

    def _token_grid(self, tokens: Tensor, grid: Grid) -> Grid:
        if self.axes == "b h w d":
            return tokens.shape[1], tokens.shape[2]
        if self.axes == "b d h w":
            return tokens.shape[2], tokens.shape[3]
        if self.tokens_per_patch is None:
            found = _grid_of(tokens.shape[1], grid)
        else:
            found = (grid[0] * self.tokens_per_patch[0], grid[1] * self.tokens_per_patch[1])
        if found is None or found[0] * found[1] != tokens.shape[1]:
            raise ValueError(
                f"the model made {tokens.shape[1]} tokens of an image with a grid of "
                f"{grid[0]}x{grid[1]} patches, which does not fit its stem. Wrap the model again "
                "if its input size was changed, or use apply='pixel'."
            )
        return found


def upsample(mask: Tensor, grid: Grid, size: Grid) -> Tensor:
    """Bring a mask from the patch grid to a finer grid of tokens.

    A token is hidden where its centre lies in a hidden patch (SimMIM does so for Swin).

    >>> upsample(torch.tensor([[True, False]]), (1, 2), (2, 4)).reshape(2, 4)
    tensor([[ True,  True, False, False],
            [ True,  True, False, False]])

    Args:
        mask: ``(B, N)`` bool over ``grid``.
        grid: rows and columns of patches.
        size: rows and columns of tokens.
    """
    cells = rearrange(mask, "b (h w) -> b h w", h=grid[0])
    for dim, (patches, tokens) in enumerate(zip(grid, size, strict=True), start=1):
        if tokens % patches == 0:
            cells = cells.repeat_interleave(tokens // patches, dim=dim)
        else:
            centres = (2 * torch.arange(tokens, device=mask.device) + 1) * patches
            cells = cells.index_select(dim, centres // (2 * tokens))
    return cells.flatten(1)


def find_layout(output: Any, grid: Grid) -> Layout | None:
    """Recognise the layout of patch tokens in a module's output, or return None.

    Args:
        output: what the module returned for one image.
        grid: patch rows and columns of that image; there may be more tokens than patches.
    """
    in_tuple = isinstance(output, (tuple, list)) and len(output) > 0
    tokens = output[0] if in_tuple else output
    if not isinstance(tokens, Tensor):
        return None
    shape = tuple(tokens.shape)
    if len(shape) == 3:
        size = _grid_of(shape[1], grid)
        return None if size is None else Layout("b n d", in_tuple, _ratio(size, grid))
    if len(shape) != 4:
        return None
    # Channels last, or first: the two axes with the proportions of the patch grid are the rows
    # and columns. An exact match wins over mere proportions.
    for fits in (_equal, _alike):
        if fits(shape[1:3], grid):
            return Layout("b h w d", in_tuple, _ratio(shape[1:3], grid))
        if fits(shape[2:4], grid):
            return Layout("b d h w", in_tuple, _ratio(shape[2:4], grid))
    return None


def _equal(size: tuple[int, ...], grid: Grid) -> bool:
    return size == grid


def _alike(size: tuple[int, ...], grid: Grid) -> bool:
    """Whether a token grid covers the same image: as many tokens per patch in both directions."""
    return size[0] * grid[1] == size[1] * grid[0] and size[0] > grid[0]


def _grid_of(tokens: int, grid: Grid) -> Grid | None:
    """Return the token grid with the proportions of the patch grid, or None."""
    rows = math.isqrt(tokens * grid[0] // grid[1]) if grid[1] else 0
    if rows and tokens % rows == 0 and rows * grid[1] == tokens // rows * grid[0]:
        return rows, tokens // rows
    return None


def _ratio(size: tuple[int, ...], grid: Grid) -> Grid | None:
    if size[0] % grid[0] or size[1] % grid[1]:
        return None
    return size[0] // grid[0], size[1] // grid[1]
