"""The shapes in which a patch embedding hands over its tokens, and one way to write into each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from einops import rearrange
from torch import Tensor

from maskdistill.applying import check_mask, replace_tokens


@dataclass(frozen=True)
class Layout:
    """Where tokens lie in the output of a patch embedding.

    Attributes:
        axes: ``"b n d"``, ``"b h w d"`` or ``"b d h w"``.
        in_tuple: whether the tokens are the first of a tuple, as in XCiT or MViTv2.
    """

    axes: str
    in_tuple: bool = False

    def replace(self, output: Any, mask: Tensor, mask_token: Tensor, grid: tuple[int, int]) -> Any:
        """Return the patch embedding's output with the mask token where patches are hidden.

        Args:
            output: what the patch embedding returned, in this layout.
            mask: ``(B, N)`` bool.
            mask_token: ``(D,)``.
            grid: patch rows and columns of this very input.
        """
        tokens: Tensor = output[0] if self.in_tuple else output
        check_mask(mask, tokens.shape[0], grid)
        is_flat = self.axes == "b n d"
        flat = tokens if is_flat else rearrange(tokens, f"{self.axes} -> b (h w) d")
        replaced = replace_tokens(flat, mask, mask_token)
        if not is_flat:
            replaced = rearrange(replaced, f"b (h w) d -> {self.axes}", h=grid[0])
        return (replaced, *output[1:]) if self.in_tuple else replaced


def find_layout(output: Any, grid: tuple[int, int]) -> Layout | None:
    """Recognise the layout of a patch embedding's output, or return None.

    Args:
        output: what the patch embedding returned for one image.
        grid: patch rows and columns of that image.
    """
    in_tuple = isinstance(output, (tuple, list)) and len(output) > 0
    tokens = output[0] if in_tuple else output
    if not isinstance(tokens, Tensor):
        return None
    shape = tuple(tokens.shape)
    if len(shape) == 3 and shape[1] == grid[0] * grid[1]:
        return Layout("b n d", in_tuple)
    if len(shape) == 4 and shape[1:3] == grid:
        return Layout("b h w d", in_tuple)
    if len(shape) == 4 and shape[2:] == grid:
        return Layout("b d h w", in_tuple)
    return None
