"""How a mask changes the input: a learned token, a dropped token, or filled pixels."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Application: TypeAlias = Literal["token", "drop", "pixel"]
"""``token``: a learned token replaces the patch embedding, before the position embedding (iBOT).
``drop``: the token is removed, after the position embedding (MAE, MSN). ``pixel``: the patch is
filled in the image."""
Fill: TypeAlias = Literal["zero", "mean", "noise", "blur"]
APPLICATIONS: tuple[str, ...] = get_args(Application)
FILLS: tuple[str, ...] = get_args(Fill)


def check_mask(mask: Tensor, batch: int, grid: tuple[int, int]) -> None:
    """Refuse a mask that is not a ``(B, N)`` bool tensor for this batch and grid.

    Raises:
        ValueError: wrong type, dtype or shape.
    """
    patches = grid[0] * grid[1]
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"a mask must be a bool tensor, True where a patch is hidden; got {came}. "
            "Convert it with mask.bool()."
        )
    if tuple(mask.shape) != (batch, patches):
        raise ValueError(
            f"the mask must be (B, N) = ({batch}, {patches}) for a grid of {grid[0]}x{grid[1]} "
            f"patches, prefix tokens left out; got {tuple(mask.shape)}."
        )


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


def mask_pixels(
    images: Tensor,
    mask: Tensor,
    patch_size: int | tuple[int, int],
    fill: Fill = "zero",
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill the hidden patches of images; works in front of any network at all.

    >>> images, mask = torch.ones(1, 3, 4, 4), torch.tensor([[True, False, False, False]])
    >>> mask_pixels(images, mask, patch_size=2)[0, 0]
    tensor([[0., 0., 1., 1.],
            [0., 0., 1., 1.],
            [1., 1., 1., 1.],
            [1., 1., 1., 1.]])

    Args:
        images: ``(B, C, H, W)`` floats.
        mask: ``(B, N)`` bool, True = hidden, row-major over the patch grid.
        patch_size: pixels per patch, one int or (height, width).
        fill: ``"zero"`` writes 0, which after the usual normalisation is the mean colour of the
            data set, not black; ``"mean"`` each image's mean colour; ``"noise"`` normal noise with
            each image's mean and standard deviation per channel; ``"blur"`` the image averaged
            over three patches in each direction.
        generator: source of the noise; None is torch's global generator.

    Returns:
        ``(B, C, H, W)``; visible patches are untouched.

    Raises:
        ValueError: misshapen images or mask, patches that do not divide the image, unknown fill.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"images must be (B, C, H, W) floats; got {tuple(images.shape)} {images.dtype}."
        )
    grid = patch_grid((images.shape[2], images.shape[3]), patch_size)
    check_mask(mask, images.shape[0], grid)
    hidden = rearrange(mask, "b (h w) -> b 1 h w", h=grid[0])
    size = (images.shape[2] // grid[0], images.shape[3] // grid[1])
    hidden = hidden.repeat_interleave(size[0], dim=2).repeat_interleave(size[1], dim=3)
    return torch.where(hidden, _filling(images, size, fill, generator), images)


def _filling(
    images: Tensor, size: tuple[int, int], fill: Fill, generator: torch.Generator | None
) -> Tensor:
    match fill:
        case "zero":
            return images.new_zeros(())
        case "mean":
            return images.mean(dim=(2, 3), keepdim=True)
        case "noise":
            device = images.device if generator is None else generator.device
            noise = torch.randn(
                images.shape, generator=generator, device=device, dtype=images.dtype
            ).to(images.device)
            std, mean = torch.std_mean(images, dim=(2, 3), keepdim=True)
            return mean + std * noise
        case "blur":
            window = (2 * size[0] + 1, 2 * size[1] + 1)
            return F.avg_pool2d(images, window, 1, size, count_include_pad=False)
    raise ValueError(f"fill must be one of {', '.join(FILLS)}; got {fill!r}.")


def replace_tokens(tokens: Tensor, mask: Tensor, mask_token: Tensor) -> Tensor:
    """Put the mask token where patches are hidden: ``(B, N, D)``, ``(B, N)``, ``(D,)``.

    Zhou et al., 2022 (iBOT); the position embedding is added afterwards, by the model.
    """
    return torch.where(mask[..., None], mask_token.to(tokens.dtype), tokens)


def visible_indices(mask: Tensor, visible: int | None = None) -> Tensor:
    """Return the indices of the visible patches of each row, ascending: ``(B, N_visible)`` int64.

    >>> visible_indices(torch.tensor([[True, False, False], [False, True, False]]))
    tensor([[1, 2],
            [0, 2]])

    Args:
        mask: ``(B, N)`` bool, True = hidden; every row must hide the same number of patches.
        visible: that number of visible patches, where it is known. ``None`` counts, which makes
            the host wait for an accelerator and breaks a compiled graph.

    Raises:
        ValueError: rows that hide different numbers of patches (only checked when counting), or
            rows that hide all.
    """
    if visible is None:
        counts = mask.sum(dim=1)
        least, most = (int(counts.min()), int(counts.max())) if len(counts) else (0, 0)
        if least != most:
            raise ValueError(
                f"dropping tokens needs the same number of hidden patches in every row, but rows "
                f"hide from {least} to {most}. Use masker.exactly(ratio), or apply='token'."
            )
        visible = mask.shape[1] - most
    if not visible:
        raise ValueError(
            "dropping would leave no patch at all: the mask hides every one. Use a smaller ratio."
        )
    # A stable sort of False < True lists the visible patches first, in order.
    return mask.to(torch.uint8).argsort(dim=1, stable=True)[:, :visible]


def drop_tokens(tokens: Tensor, keep: Tensor, prefix: int = 0) -> Tensor:
    """Keep the prefix tokens and the patches in ``keep``: ``(B, P + N, D)`` to ``(B, P + K, D)``.

    Args:
        tokens: prefix tokens, then patch tokens.
        keep: ``(B, K)`` indices among the patches, as ``visible_indices`` gives them.
        prefix: number of prefix tokens, P.
    """
    index = keep[..., None].expand(-1, -1, tokens.shape[-1])
    kept = tokens[:, prefix:].gather(1, index)
    return torch.cat([tokens[:, :prefix], kept], dim=1) if prefix else kept
