"""What a mask is: its grid of patches, its shape, and the number of patches that it hides."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PatchMask:
    """A mask together with the number of patches that each of its rows hides.

    >>> mask = PatchMask(torch.tensor([[True, False], [False, True]]), count=1)
    >>> mask[:1].mask
    tensor([[ True, False]])

    Dropping tokens needs that number on the host. A policy knows it before it draws, so nobody has
    to wait for an accelerator, and a compiled graph has no break, where the two travel together.

    Attributes:
        mask: ``(B, N)`` bool, True = hidden.
        count: hidden patches of every row; None where rows differ, or where nobody counted.
    """

    mask: Tensor
    count: int | None = None

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, rows: slice) -> PatchMask:
        return PatchMask(self.mask[rows], self.count)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PatchMask:
        """Return the mask on a device."""
        return PatchMask(self.mask.to(device, non_blocking=non_blocking), self.count)

    def pin_memory(self) -> PatchMask:
        """Return the mask in pinned memory."""
        return PatchMask(self.mask.pin_memory(), self.count)


def with_count(mask: Tensor | PatchMask) -> PatchMask:
    """Return a mask with its count, which is not known of a plain tensor."""
    return mask if isinstance(mask, PatchMask) else PatchMask(mask)


def patch_grid(image_size: tuple[int, int], patch_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return the patch grid (H, W) of an image of (height, width) pixels.

    >>> patch_grid((224, 160), 16)
    (14, 10)

    Raises:
        ValueError: patches that do not divide the image.
    """
    patch = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    if len(patch) != 2 or min(patch) < 1:
        raise ValueError(f"patch_size must be an int >= 1, or two of them; got {patch_size!r}.")
    height, width = image_size
    if height % patch[0] or width % patch[1] or not height or not width:
        raise ValueError(
            f"an image of {height}x{width} pixels does not divide into patches of "
            f"{patch[0]}x{patch[1]}; choose an image size that is a multiple of the patch size."
        )
    return height // patch[0], width // patch[1]


def check_mask(mask: Tensor, batch: int, grid: tuple[int, int]) -> None:
    """Refuse a mask that is not a ``(B, N)`` bool tensor for this batch and grid.

    Raises:
        ValueError: wrong type, dtype or shape.
    """
    patches = grid[0] * grid[1]
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        is_tensor = isinstance(mask, Tensor)
        hint = (
            "Convert it with mask.bool()." if is_tensor else "Of a policy's, take one: .student[i]."
        )
        raise ValueError(
            "a mask must be a bool tensor, True where a patch is hidden; got "
            f"{mask.dtype if is_tensor else type(mask).__name__}. {hint}"
        )
    if tuple(mask.shape) != (batch, patches):
        raise ValueError(
            f"the mask must be (B, N) = ({batch}, {patches}) for a grid of {grid[0]}x{grid[1]} "
            f"patches, prefix tokens left out; got {tuple(mask.shape)}."
        )
