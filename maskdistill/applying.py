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


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a setting that is none of its choices.

    Raises:
        ValueError: names the choices.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")


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
    >>> soft = torch.tensor([[0.5, 0.0, 0.0, 1.0]])
    >>> mask_pixels(images, soft, patch_size=2)[0, 0]
    tensor([[0.5000, 0.5000, 1.0000, 1.0000],
            [0.5000, 0.5000, 1.0000, 1.0000],
            [1.0000, 1.0000, 0.0000, 0.0000],
            [1.0000, 1.0000, 0.0000, 0.0000]])

    A soft mask m gives images * (1 - m) + filling * m, and passes gradients on to the network that
    made it (ADIOS: Shi et al., 2022, with ``"zero"``).

    Args:
        images: ``(B, C, H, W)`` floats.
        mask: ``(B, N)`` bool, True = hidden, row-major over the patch grid; or a soft one, floats
            in [0, 1] with 1 = hidden: ``(B, N)``, or ``(B, 1, H, W)`` with a value per pixel.
        patch_size: pixels per patch, one int or (height, width).
        fill: ``"zero"`` writes 0, which after the usual normalisation is the mean colour of the
            data set, not black; ``"mean"`` each image's mean colour; ``"noise"`` normal noise with
            each image's mean and standard deviation per channel; ``"blur"`` the image averaged
            over three patches in each direction.
        generator: source of the noise; None is torch's global generator.

    Returns:
        ``(B, C, H, W)`` of the images' dtype; visible patches are untouched.

    Raises:
        ValueError: misshapen images or mask, patches that do not divide the image, unknown fill, or
            a soft mask outside [0, 1], which is checked on the CPU only: to look at an accelerator
            would make the host wait.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"images must be (B, C, H, W) floats; got {tuple(images.shape)} {images.dtype}."
        )
    grid = patch_grid((images.shape[2], images.shape[3]), patch_size)
    soft = isinstance(mask, Tensor) and mask.is_floating_point()
    if soft:
        _check_soft_mask(mask, images, grid)
    else:
        check_mask(mask, images.shape[0], grid)
    size = (images.shape[2] // grid[0], images.shape[3] // grid[1])
    hidden = mask
    if mask.ndim == 2:
        hidden = rearrange(mask, "b (h w) -> b 1 h w", h=grid[0])
        hidden = hidden.repeat_interleave(size[0], dim=2).repeat_interleave(size[1], dim=3)
    filling = _filling(images, size, fill, generator)
    if not soft:
        return torch.where(hidden, filling, images)
    hidden = hidden.to(images.dtype)
    return images * (1 - hidden) + filling * hidden


def _check_soft_mask(mask: Tensor, images: Tensor, grid: tuple[int, int]) -> None:
    batch, _, height, width = images.shape
    patches = grid[0] * grid[1]
    if tuple(mask.shape) not in ((batch, patches), (batch, 1, height, width)):
        raise ValueError(
            f"a soft mask must be (B, N) = ({batch}, {patches}) or (B, 1, H, W) = "
            f"({batch}, 1, {height}, {width}); got {tuple(mask.shape)}."
        )
    if mask.device.type != "cpu" or torch.compiler.is_compiling() or not mask.numel():
        return
    low, high = (float(value) for value in mask.detach().aminmax())
    if not -0.01 <= low <= high <= 1.01:  # forgives rounding, also of bfloat16; refuses NaN
        raise ValueError(
            f"a soft mask must lie in [0, 1], 1 where all is hidden; got values from {low:g} to "
            f"{high:g}. Put logits through sigmoid or softmax first."
        )


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
        ValueError: rows that hide different numbers of patches, or another number than given
            (checked on the CPU, or when counting), or rows that hide all.
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
    elif mask.device.type == "cpu" and not torch.compiler.is_compiling():
        counted = (~mask).sum(dim=1)
        if bool((counted != visible).any()):
            raise ValueError(
                f"visible={visible} was given, but the rows of the mask leave from "
                f"{int(counted.min())} to {int(counted.max())} patches visible."
            )
    if visible < 0 or visible > mask.shape[1]:
        raise ValueError(f"visible must be from 1 to {mask.shape[1]}; got {visible}.")
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
