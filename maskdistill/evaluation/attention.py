"""How well the class token's attention finds the object."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


class AttentionJaccard(NamedTuple):
    """Mean intersection over union of attention and object, over images, in [0, 1].

    Attributes:
        best_head: of each image's best head, as DINO reports it.
        mean_over_heads: of each head by itself, averaged.
        head_mean: of the attention averaged over heads.
    """

    best_head: float
    mean_over_heads: float
    head_mean: float


def keep_mass(attention: Tensor, mass: float = 0.6) -> Tensor:
    """Mark the fewest patches that hold at least this share of the attention.

    >>> keep_mass(torch.tensor([0.5, 0.3, 0.2]), mass=0.6)
    tensor([ True,  True, False])

    Args:
        attention: ``(..., N)``, non-negative.
        mass: share to keep, in (0, 1].

    Returns:
        ``(..., N)`` bool. (Caron et al., 2021, with 0.6.)
    """
    value, order = attention.sort(dim=-1, descending=True)
    before = value.cumsum(dim=-1) - value
    kept = before < mass * value.sum(dim=-1, keepdim=True)
    return torch.zeros_like(kept).scatter(-1, order, kept)


def attention_jaccard(
    attention: Tensor, masks: Tensor, grid: tuple[int, int], *, mass: float = 0.6
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
        mass: share of the attention that counts as the object.

    Raises:
        ValueError: shapes that do not fit, or an image without an object.
    """
    if attention.ndim != 3 or attention.shape[-1] != grid[0] * grid[1]:
        raise ValueError(
            f"attention must be (B, heads, N) with N = {grid[0] * grid[1]} for a grid of "
            f"{grid[0]}x{grid[1]}; got {tuple(attention.shape)}."
        )
    if masks.ndim != 3 or masks.dtype != torch.bool or len(masks) != len(attention):
        raise ValueError(
            f"masks must be (B, H, W) bool with B = {len(attention)}; got {tuple(masks.shape)} "
            f"{masks.dtype}."
        )
    if not masks.flatten(1).any(dim=1).all():
        raise ValueError("every mask must mark an object; at least one is empty.")
    heads = _overlap(attention, masks, grid, mass)
    mean = _overlap(attention.mean(dim=1, keepdim=True), masks, grid, mass)
    return AttentionJaccard(
        float(heads.amax(dim=1).mean()), float(heads.mean()), float(mean.mean())
    )


def _overlap(attention: Tensor, masks: Tensor, grid: tuple[int, int], mass: float) -> Tensor:
    """Return intersection over union per image and map: ``(B, maps)``."""
    kept = rearrange(keep_mass(attention, mass), "b m (h w) -> b m h w", h=grid[0]).float()
    kept = F.interpolate(kept, size=masks.shape[1:], mode="nearest") > 0.5
    objects = masks[:, None]
    union = (kept | objects).flatten(2).sum(dim=-1)
    return (kept & objects).flatten(2).sum(dim=-1) / union
