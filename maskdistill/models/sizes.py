"""Images of another size than a model was built for: which arguments let it take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from maskdistill.applying import Fill, mask_pixels
from maskdistill.models.layouts import Grid
from maskdistill.models.probing import empty_image, evaluating, model_name

# What lets a family take images of several sizes, most usual first; the last needs nothing.
SIZE_ARGUMENTS: tuple[dict[str, Any], ...] = (
    {"dynamic_img_size": True},
    {"strict_img_size": False},
    {},
)


def explain(
    error: Exception, model: nn.Module, built_for: Grid | None, size: tuple[int, ...]
) -> None:
    """Raise a better error for a forward that failed on images of another size.

    Raises:
        ValueError: the size is another one, and an empty image of that size fails as well; else
            nothing is raised, since the size is not to blame.
    """
    if built_for is None or size == built_for or isinstance(error, torch.OutOfMemoryError):
        return
    if len(size) != 2 or _takes(model, (size[0], size[1])):
        return
    one_size = "give all views one size (local crops as large as global ones)"
    if getattr(model, "dynamic_img_size", False):
        way = "Its sizes must be multiples of its patch"
    elif hasattr(model, "dynamic_img_size"):
        way = f"Build it with dynamic_img_size=True, or {one_size}"
    elif "Swin" in type(model).__name__:
        way = f"Build it with strict_img_size=False, or {one_size}"
    else:
        way = f"Its kind takes one size only: {one_size}, or choose another model"
    raise ValueError(
        f"{model_name(model)} was built for images of {built_for[0]}x{built_for[1]} pixels and "
        f"does not take {'x'.join(map(str, size))}. {way}. (It says: {str(error)[:150]})"
    ) from error


def _takes(model: nn.Module, size: Grid) -> bool:
    try:
        with evaluating(model), torch.no_grad():
            model(empty_image(model, size))
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError):
        return False
    return True


def fill(images: Tensor, mask: Tensor, grid: Grid, patch_size: Grid, filling: Fill) -> Tensor:
    """Fill hidden patches, leaving alone what lies beyond the last whole patch.

    A model whose patches do not divide its images leaves that rest out (SigLIP: 384 pixels in
    patches of 14).
    """
    rows, columns = grid[0] * patch_size[0], grid[1] * patch_size[1]
    if (rows, columns) == tuple(images.shape[-2:]):
        return mask_pixels(images, mask, patch_size, filling)
    filled = images.clone()
    inside = images[..., :rows, :columns]
    filled[..., :rows, :columns] = mask_pixels(inside, mask, patch_size, filling)
    return filled
