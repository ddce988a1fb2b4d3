"""How well the attention finds the object."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


class AttentionJaccard(NamedTuple):
    """Mean intersection over union of attention and object, over images, in [0, 1].

    Attributes:
        best_head: of each image's best head, chosen on the truth, as DINO reports it.
        mean_over_heads: of each head by itself, averaged.
        head_mean: of the attention averaged over heads.
    """

    best_head: float
    mean_over_heads: float
    head_mean: float


class PointingGame(NamedTuple):
    """Share of images whose attention is greatest on the object, in [0, 1].

    Attributes:
        best_head: where any head's maximum is a hit.
        mean_over_heads: of each head by itself, averaged.
        head_mean: of the attention averaged over heads.
    """

    best_head: float
    mean_over_heads: float
    head_mean: float


class PerImage(NamedTuple):
    """A score of each image, ``(B,)``, under the names of its mean over images.

    Attributes:
        best_head: of the image's best head, chosen on the truth.
        mean_over_heads: of each head by itself, averaged.
        head_mean: of the attention averaged over heads.
    """

    best_head: Tensor
    mean_over_heads: Tensor
    head_mean: Tensor


def keep_mass(attention: Tensor, mass: float = 0.6) -> Tensor:
    """Mark the fewest patches that hold at least this share of the attention, the first of equals.

    >>> keep_mass(torch.tensor([0.5, 0.3, 0.2]), mass=0.6)
    tensor([ True,  True, False])

    Args:
        attention: ``(..., N)``, non-negative.
        mass: share to keep, in (0, 1].

    Returns:
        ``(..., N)`` bool. (Caron et al., 2021, with 0.6.)

    Raises:
        ValueError: a mass outside (0, 1].
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass must be in (0, 1], a share of the attention; got {mass!r}.")
    value, order = attention.sort(dim=-1, descending=True, stable=True)
    before = value.cumsum(dim=-1) - value
    kept = before < mass * value.sum(dim=-1, keepdim=True)
    return torch.zeros_like(kept).scatter(-1, order, kept)


def attention_jaccard(
    attention: Tensor,
    masks: Tensor,
    grid: tuple[int, int],
    *,
    mass: float = 0.6,
    ignore: Tensor | None = None,
    chunk: int = 256,
) -> AttentionJaccard:
    """Compare attention maps with object masks, pixel by pixel.

    >>> attention = torch.tensor([[[0.7, 0.1, 0.1, 0.1]]])  # one image, one head, 2x2 patches
    >>> mask = torch.tensor([[[True, False], [False, False]]])
    >>> attention_jaccard(attention, mask, (2, 2)).best_head
    1.0

    Args:
        attention: ``(B, heads, N)``, as ``MaskedViT.attention`` gives it.
        masks: ``(B, H, W)`` bool, True on the object, of the very images that the model saw.
        grid: patch rows and columns; each map is enlarged to the mask's pixels by repetition.
        mass: share of the attention that counts as the object: 0.6 in DINO (Caron et al., 2021),
            0.9 in Naseer et al. (2021), whose numbers are of another quantity.
        ignore: ``(B, H, W)`` bool, True on void pixels, which are left out of intersection and
            union (VOC's borders, 255); None is none.
        chunk: images at a time, which bounds the memory.

    Raises:
        ValueError: shapes that do not fit, numbers that are no attention, or an image without an
            object.
    """
    each = jaccard_per_image(attention, masks, grid, mass=mass, ignore=ignore, chunk=chunk)
    return AttentionJaccard(*(float(score.mean()) for score in each))


def jaccard_per_image(
    attention: Tensor,
    masks: Tensor,
    grid: tuple[int, int],
    *,
    mass: float = 0.6,
    ignore: Tensor | None = None,
    chunk: int = 256,
) -> PerImage:
    """Return what ``attention_jaccard`` averages, of each image; the arguments are the same.

    >>> attention = torch.tensor([[[0.7, 0.1, 0.1, 0.1]], [[0.1, 0.7, 0.1, 0.1]]])
    >>> mask = torch.tensor([[[True, False], [False, False]]])
    >>> jaccard_per_image(attention, mask.expand(2, 2, 2), (2, 2)).head_mean
    tensor([1., 0.])
    """
    check_attention(attention, grid)
    check_masks(masks, len(attention), ignore)
    scores = []
    for start in range(0, len(attention), chunk):
        part = slice(start, start + chunk)
        maps = _with_mean(attention[part])
        void = None if ignore is None else ignore[part].to(maps.device)
        scores.append(_overlap(maps, masks[part].to(maps.device), grid, mass, void))
    return _by_head(torch.cat(scores))


def pointing_game(
    attention: Tensor,
    masks: Tensor,
    grid: tuple[int, int],
    *,
    tolerance: float = 0,
    chunk: int = 16,
) -> PointingGame:
    """Return how often the point of greatest attention lies on the object.

    >>> attention = torch.tensor([[[0.1, 0.7, 0.1, 0.1]]])  # one image, one head, 2x2 patches
    >>> mask = torch.tensor([[[True, False], [False, False]]])
    >>> pointing_game(attention, mask, (2, 2)).head_mean
    0.0
    >>> pointing_game(attention, mask, (2, 2), tolerance=1).head_mean
    1.0

    The point is the centre of the patch with the greatest attention, the first one of equals
    (Zhang et al., 2016: top-down neural attention by excitation backprop).

    Args:
        attention: ``(B, heads, N)``.
        masks: ``(B, H, W)`` bool, True on the object.
        grid: patch rows and columns.
        tolerance: pixels by which the point may miss the object; the original has 15, in images of
            about 500 pixels. 0 is a hit on the object itself.
        chunk: images at a time, which bounds the memory.

    Raises:
        ValueError: as ``attention_jaccard``, or a negative tolerance.
    """
    check_attention(attention, grid)
    check_masks(masks, len(attention), None)
    if tolerance < 0:
        raise ValueError(f"tolerance must be >= 0 pixels; got {tolerance!r}.")
    height, width = masks.shape[1:]
    hits = []
    for start in range(0, len(attention), chunk):
        part = slice(start, start + chunk)
        peak = _with_mean(attention[part]).argmax(dim=-1)
        objects = masks[part].to(peak.device)
        # The middle of a patch, in pixels; at a whole number it is the pixel after it.
        y = (((peak // grid[1]) + 0.5) * height / grid[0]).long().clamp(max=height - 1)
        x = (((peak % grid[1]) + 0.5) * width / grid[1]).long().clamp(max=width - 1)
        if tolerance == 0:
            hit = objects.flatten(1).gather(1, y * width + x)
        else:
            rows = torch.arange(height, device=peak.device)
            columns = torch.arange(width, device=peak.device)
            away = (rows - y[..., None]).square()[..., None] + (
                (columns - x[..., None]).square()[..., None, :]
            )
            hit = ((away <= tolerance**2) & objects[:, None]).flatten(2).any(dim=-1)
        hits.append(hit.float())
    return PointingGame(*(float(score.mean()) for score in _by_head(torch.cat(hits))))


# --- Parts


def check_attention(attention: Tensor, grid: tuple[int, int]) -> None:
    """Refuse what is no ``(B, heads, N)`` attention over this grid, in a sentence."""
    if attention.ndim != 3 or attention.shape[-1] != grid[0] * grid[1]:
        raise ValueError(_wanted(attention, grid))
    if not attention.numel():
        raise ValueError(f"attention must hold at least one image; got {tuple(attention.shape)}.")
    if not bool((torch.isfinite(attention) & (attention >= 0)).all()):
        raise ValueError(
            "attention holds NaN, infinite or negative numbers; has training diverged?"
        )


def _wanted(attention: Tensor, grid: tuple[int, int]) -> str:
    return (
        f"attention must be (B, heads, N) with N = {grid[0] * grid[1]} for a grid of "
        f"{grid[0]}x{grid[1]}; got {tuple(attention.shape)}."
    )


def check_masks(masks: Tensor, count: int, ignore: Tensor | None) -> None:
    """Refuse what are no object masks of so many images, in a sentence."""
    if masks.ndim != 3 or masks.dtype != torch.bool or len(masks) != count:
        raise ValueError(
            f"masks must be (B, H, W) bool with B = {count}; got {tuple(masks.shape)} "
            f"{masks.dtype}."
        )
    if not count:
        raise ValueError("masks must be of at least one image; got none.")
    if ignore is not None and (ignore.shape != masks.shape or ignore.dtype != torch.bool):
        raise ValueError(
            f"ignore must be bool and of the masks' shape {tuple(masks.shape)}; got "
            f"{tuple(ignore.shape)} {ignore.dtype}."
        )
    # Chunk by chunk: of a thousand images, a copy of all masks is hundreds of megabytes.
    for start in range(0, count, 256):
        part = masks[start : start + 256]
        if ignore is not None:
            part = part & ~ignore[start : start + 256].to(part.device)
        if not part.flatten(1).any(dim=1).all():
            raise ValueError(
                "every mask must mark an object; at least one is empty"
                + (" outside the void pixels." if ignore is not None else ".")
            )


def _with_mean(attention: Tensor) -> Tensor:
    """Add the mean over heads as a last map: ``(B, heads + 1, N)`` float32."""
    maps = attention.float()
    return torch.cat([maps, maps.mean(dim=1, keepdim=True)], dim=1)


def _by_head(scores: Tensor) -> PerImage:
    """Name the scores ``(B, heads + 1)`` of maps made by ``_with_mean``."""
    heads, mean = scores[:, :-1], scores[:, -1]
    return PerImage(heads.amax(dim=1), heads.mean(dim=1), mean)


def _overlap(
    maps: Tensor, masks: Tensor, grid: tuple[int, int], mass: float, ignore: Tensor | None
) -> Tensor:
    """Return intersection over union per image and map: ``(B, maps)``.

    A map is the same all over a patch, so that counting each patch's pixels once is enough.
    """
    kept = rearrange(keep_mass(maps, mass), "b m (h w) -> b m h w", h=grid[0]).float()
    valid = torch.ones_like(masks[:1]) if ignore is None else ~ignore
    inside = _pixels_per_patch(masks & valid, grid)
    pixels = _pixels_per_patch(valid, grid)
    intersection = (kept * inside[:, None]).sum(dim=(-2, -1))
    union = (kept * (pixels - inside)[:, None]).sum(dim=(-2, -1)) + inside.sum(
        dim=(-2, -1)
    ).unsqueeze(1)
    return intersection / union


def _pixels_per_patch(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Count the marked pixels of each patch: ``(B, H, W)`` to ``(B, rows, columns)`` float32."""
    to_row, to_column = (
        F.one_hot(torch.arange(size, device=masks.device) * cells // size, cells).float()
        for size, cells in zip(masks.shape[1:], grid, strict=True)
    )
    return to_row.T @ masks.float() @ to_column
