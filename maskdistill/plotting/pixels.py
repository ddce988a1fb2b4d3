"""Pixels of a mask or of attention over an image, for figures and for pages of one's own."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

Pixels: TypeAlias = NDArray[np.uint8]
Look: TypeAlias = Literal["overlay", "map"]
Interpolation: TypeAlias = Literal["nearest", "bilinear"]
LOOKS: tuple[str, ...] = get_args(Look)
INTERPOLATIONS: tuple[str, ...] = get_args(Interpolation)

# Two greys in stripes: of any image, one of the two stands out.
_STRIPES = np.array([[236, 237, 240], [128, 131, 141]], dtype=np.uint8)
_PLAIN = np.array([150, 153, 163], dtype=np.uint8)
_EDGE = np.array([66, 69, 79], dtype=np.uint8)
_VISIBLE = np.array([196, 221, 240], dtype=np.uint8)
_OUTLINE = np.array([86, 180, 233], dtype=np.uint8)  # Okabe and Ito's sky blue


def masked_pixels(
    image: Tensor | None,
    mask: Tensor | None,
    grid: tuple[int, int],
    *,
    size: int | tuple[int, int] | None = None,
) -> Pixels:
    """Return the pixels of an image whose hidden patches are striped.

    >>> image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    >>> mask = torch.tensor([True, False, False, False])
    >>> masked_pixels(image, mask, (2, 2), size=160).shape
    (160, 160, 3)

    The stripes are of a light and a darker grey, so that hidden patches stand out from dark and
    from light images alike, in colour and in grey print. Patches below 6 pixels are plain grey.

    Args:
        image: ``(3, H, W)`` uint8; None shows what is visible in pale blue.
        mask: ``(N,)`` bool, True = hidden; None hides nothing.
        grid: patch rows and columns; N patches.
        size: pixels of the longer side of the picture, or its (height, width); None is the image's
            size, or 16 pixels per patch. Images are enlarged by repetition.

    Returns:
        ``(h, w, 3)`` uint8, for ``imshow`` or ``PIL.Image.fromarray``.

    Raises:
        ValueError: an image that is no ``(3, H, W)`` uint8, or a mask that does not fit the grid.
    """
    height, width = shape = _shape(image, grid, size)
    pixels = np.empty((*shape, 3), np.uint8) if image is None else _enlarged(image, shape)
    if image is None:
        pixels[:] = _VISIBLE
    if mask is None:
        return pixels
    if mask.dtype != torch.bool or mask.numel() != grid[0] * grid[1]:
        raise ValueError(
            f"mask must be (N,) bool with N = {grid[0] * grid[1]} for a grid of "
            f"{grid[0]}x{grid[1]} patches; got {_kind(mask)}."
        )
    y, x = _cells(height, grid[0]), _cells(width, grid[1])
    hidden = _numpy(mask).reshape(grid)[np.ix_(y, x)]
    patch = min(height / grid[0], width / grid[1])
    if patch < 6:
        pixels[hidden] = _PLAIN
        return pixels
    band = max(2, round(min(patch / 4, max(shape) / 56)))
    stripe = (np.add.outer(np.arange(height), np.arange(width)) // band) % 2
    pixels[hidden] = _STRIPES[stripe[hidden]]
    if patch >= 10:
        thick = max(1, round(min(patch / 20, max(shape) / 150)))
        pixels[hidden & _borders(y, x, hidden, thick)] = _EDGE
    return pixels


def attention_pixels(
    image: Tensor | None,
    attention: Tensor,
    grid: tuple[int, int],
    *,
    scale: float | None = None,
    look: Look = "overlay",
    interpolation: Interpolation = "nearest",
    size: int | tuple[int, int] | None = None,
    outline: Tensor | None = None,
) -> Pixels:
    """Return the pixels of attention over an image.

    >>> image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    >>> attention_pixels(image, torch.rand(16), (4, 4), size=(96, 96)).shape
    (96, 96, 3)

    The colours are matplotlib's "inferno", whose lightness rises evenly with the attention. As an
    overlay they cover the darkened image the more, the more a patch is attended.

    Args:
        image: ``(3, H, W)`` uint8; None for a map alone.
        attention: ``(N,)``, finite and not negative, such as ``vit.attention(images)[0, head]``.
        grid: patch rows and columns; N patches.
        scale: attention that has the brightest colour; None is the map's own maximum.
        look: ``"overlay"`` over the image, or ``"map"``, the colours alone.
        interpolation: between patches: ``"nearest"`` shows each as it is; ``"bilinear"`` is
            smooth, and finer than what was measured.
        size: pixels of the longer side of the picture, or its (height, width); None is the image's
            size, or 16 pixels per patch.
        outline: ``(h, w)`` bool of any size, such as an object's mask; shown by its outline.

    Returns:
        ``(h, w, 3)`` uint8, for ``imshow`` or ``PIL.Image.fromarray``.

    Raises:
        ValueError: an image that is no ``(3, H, W)`` uint8, attention that does not fit the grid,
            is negative or not finite, a scale that is not positive, or an unknown choice.
    """
    check("look", look, LOOKS)
    check("interpolation", interpolation, INTERPOLATIONS)
    _check_attention(attention, grid)
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"scale must be a positive number, or None; got {scale!r}.")
    shape = _shape(image, grid, size)
    values = attention.detach().float().cpu().reshape(1, 1, *grid)
    if interpolation == "bilinear":
        values = F.interpolate(values, shape, mode="bilinear", align_corners=False)
        heat = values[0, 0].numpy()
    else:
        heat = values[0, 0].numpy()[np.ix_(_cells(shape[0], grid[0]), _cells(shape[1], grid[1]))]
    brightest = float(attention.max()) if scale is None else scale
    heat = np.clip(heat / (brightest or 1.0), 0, 1)
    colours = _colours()[(255 * heat).round().astype(np.uint8)]
    if look == "map" or image is None:
        pixels = (255 * colours).round().astype(np.uint8)
    else:
        below = 0.62 * _enlarged(image, shape).astype(np.float32) / 255
        # The lowest colours are black, which would say no more than the darkened image does.
        cover = 0.7 * np.sqrt(heat)[..., None]
        pixels = (255 * (below + cover * (colours - below))).round().astype(np.uint8)
    return pixels if outline is None else outlined_pixels(pixels, outline)


def outlined_pixels(pixels: Pixels, outline: Tensor) -> Pixels:
    """Return pixels with the outline of an object on them.

    >>> mask = torch.zeros(32, 32, dtype=torch.bool)
    >>> mask[8:24, 8:24] = True
    >>> picture = np.zeros((96, 96, 3), np.uint8)
    >>> outlined_pixels(picture, mask)[24, 24].tolist()
    [86, 180, 233]

    Args:
        pixels: ``(h, w, 3)`` uint8.
        outline: ``(H, W)`` bool, True on the object; of any size, and enlarged by repetition.

    Returns:
        ``(h, w, 3)`` uint8, a copy: sky blue within the object's border and black outside of it.

    Raises:
        ValueError: an outline that is no ``(H, W)`` bool.
    """
    if outline.ndim != 2 or outline.dtype != torch.bool:
        raise ValueError(f"outline must be (H, W) bool, True on the object; got {_kind(outline)}.")
    height, width = pixels.shape[:2]
    cells = np.ix_(_cells(height, outline.shape[0]), _cells(width, outline.shape[1]))
    inside: NDArray[np.bool_] = _numpy(outline)[cells]
    outlined: Pixels = pixels.copy()
    side = min(height, width)
    outlined[_grown(inside, max(1, round(side / 130))) & ~inside] = 0
    outlined[_grown(~inside, max(1, round(side / 80))) & inside] = _OUTLINE
    return outlined


def check(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a setting that is none of its choices.

    Raises:
        ValueError: names the choices.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")


def _check_attention(attention: Tensor, grid: tuple[int, int]) -> None:
    if attention.numel() != grid[0] * grid[1]:
        raise ValueError(
            f"attention must be (N,) with N = {grid[0] * grid[1]} for a grid of "
            f"{grid[0]}x{grid[1]} patches; got {tuple(attention.shape)}. Of vit.attention(images), "
            "(B, heads, N), take one image's head, or its mean over heads."
        )
    if not bool(torch.isfinite(attention).all()) or float(attention.min()) < 0:
        raise ValueError(
            "attention must be finite and not negative; got values from "
            f"{float(attention.min()):.3g} to {float(attention.max()):.3g}. Was it taken before "
            "the softmax?"
        )


def _shape(
    image: Tensor | None, grid: tuple[int, int], size: int | tuple[int, int] | None
) -> tuple[int, int]:
    """Return height and width of a picture."""
    if image is not None and (
        image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8 or not image.numel()
    ):
        raise ValueError(f"image must be (3, H, W) uint8, not normalised; got {_kind(image)}.")
    own = (16 * grid[0], 16 * grid[1]) if image is None else (image.shape[1], image.shape[2])
    if size is None:
        return own
    if (size if isinstance(size, int) else min(size)) < 1:
        raise ValueError(f"size must be pixels, at least 1; got {size!r}.")
    if isinstance(size, int):
        longer = max(own)
        size = (max(1, round(size * own[0] / longer)), max(1, round(size * own[1] / longer)))
    return size


def _enlarged(image: Tensor, shape: tuple[int, int]) -> Pixels:
    """Return ``(h, w, 3)``: enlarged by repetition, or reduced by averaging."""
    height, width = image.shape[1:]
    if shape[0] < height or shape[1] < width:
        small = F.interpolate(
            image[None].float().cpu(), shape, mode="bilinear", antialias=True, align_corners=False
        )
        image = small[0].round().clamp(0, 255).to(torch.uint8)
        height, width = shape
    pixels = _numpy(rearrange(image, "c h w -> h w c"))
    enlarged: Pixels = pixels[np.ix_(_cells(shape[0], height), _cells(shape[1], width))]
    return enlarged


def _cells(pixels: int, cells: int) -> NDArray[np.int64]:
    """Return for each pixel of a side the cell that its middle lies in."""
    return ((2 * np.arange(pixels) + 1) * cells) // (2 * pixels)


def _borders(
    y: NDArray[np.int64], x: NDArray[np.int64], hidden: NDArray[np.bool_], thick: int
) -> NDArray[np.bool_]:
    """Return the pixels on the upper and left sides of cells, and on all sides of the hidden."""
    rows, columns = (np.diff(cells, prepend=-1) > 0 for cells in (y, x))
    for step in range(1, thick):
        rows[step:] |= np.diff(y, prepend=-1)[:-step] > 0
        columns[step:] |= np.diff(x, prepend=-1)[:-step] > 0
    ends = _grown(np.pad(~hidden, thick, constant_values=True), thick)
    ends = ends[thick:-thick, thick:-thick]
    result: NDArray[np.bool_] = rows[:, None] | columns[None] | ends
    return result


def _grown(inside: NDArray[np.bool_], by: int) -> NDArray[np.bool_]:
    """Return a region with the pixels around it, in a square of ``by`` to each side."""
    for _ in range(2):  # rows, then columns
        padded = np.pad(inside, ((by, by), (0, 0)))
        shifted = [padded[step : step + len(inside)] for step in range(2 * by + 1)]
        inside = np.logical_or.reduce(shifted).T
    return inside


@cache
def _colours() -> NDArray[np.float32]:
    """Return the 256 colours of attention, ``(256, 3)`` in [0, 1]."""
    from matplotlib import colormaps

    colours: NDArray[np.float32] = colormaps["inferno"](np.arange(256))[:, :3].astype(np.float32)
    return colours


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _numpy(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy()
