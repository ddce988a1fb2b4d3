"""How far the attention stays where it was when the image is occluded or noisy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maskdistill.applying import check_choice, check_mask
from maskdistill.data import normalize
from maskdistill.evaluation.attention import keep_mass
from maskdistill.evaluation.pixels import check_pixels, generator_of
from maskdistill.evaluation.robustness import (
    OCCLUSION_FILLS,
    OcclusionFill,
    OcclusionKind,
    attention_maps,
    occlude,
    occlusion_mask,
)
from maskdistill.models import MaskedViT
from maskdistill.models.probing import evaluating


class AttentionStability(NamedTuple):
    """Agreement of the attention to two versions of each image, averaged over images.

    Attributes:
        cosine: cosine similarity of the two maps, in [0, 1].
        overlap: intersection over union of the fewest patches that hold the mass, in [0, 1].
    """

    cosine: float
    overlap: float


def compare_attention(
    clean: Tensor, changed: Tensor, hidden: Tensor | None = None, *, mass: float = 0.6
) -> AttentionStability:
    """Compare two attention maps of each image over the patches that both show.

    >>> clean = torch.tensor([[0.6, 0.2, 0.1, 0.1]])
    >>> changed = torch.tensor([[0.0, 0.6, 0.3, 0.1]])
    >>> hidden = torch.tensor([[True, False, False, False]])
    >>> compare_attention(clean, changed, hidden).overlap  # {1, 2} against {1}, of patches 1 to 3
    0.5

    Heads are averaged first. Where patches are hidden both maps lose them and are brought to the
    sum 1 again: the clean image's attention to what is now hidden says nothing about stability.

    Args:
        clean: ``(B, N)`` or ``(B, heads, N)``, non-negative.
        changed: the same shape.
        hidden: ``(B, N)`` bool, True = hidden in the changed image; None is nothing.
        mass: share of the attention that counts as looked at, in (0, 1].

    Returns:
        Means over images. Random maps overlap too: compare with the random-initialised model.

    Raises:
        ValueError: shapes that do not match, NaN, or rows that hide all patches.
    """
    if clean.shape != changed.shape or clean.ndim not in (2, 3) or not clean.numel():
        raise ValueError(
            "clean and changed must be attention of one shape, (B, N) or (B, heads, N); got "
            f"{tuple(clean.shape)} and {tuple(changed.shape)}."
        )
    if not 0 < mass <= 1:
        raise ValueError(f"mass must be a share of the attention in (0, 1]; got {mass!r}.")
    maps = [part.float() for part in (clean, changed)]
    if not all(bool(torch.isfinite(part).all()) for part in maps):
        raise ValueError("the attention holds NaN or infinite numbers; has training diverged?")
    if clean.ndim == 3:
        maps = [part.mean(dim=1) for part in maps]
    seen = torch.ones_like(maps[0], dtype=torch.bool)
    if hidden is not None:
        check_mask(hidden, len(clean), (1, clean.shape[-1]))
        seen = ~hidden.to(clean.device)
        if not bool(seen.any(dim=1).all()):
            raise ValueError(
                "some images show no patch at all, so there is no attention to compare; use a "
                "smaller ratio."
            )
    a, b = (torch.where(seen, part, 0.0) for part in maps)
    cosine = F.cosine_similarity(a, b, dim=1)
    kept_a, kept_b = keep_mass(a, mass) & seen, keep_mass(b, mass) & seen
    union = (kept_a | kept_b).sum(dim=1).clamp_min(1)
    overlap = (kept_a & kept_b).sum(dim=1) / union
    return AttentionStability(float(cosine.mean()), float(overlap.mean()))


def attention_stability(
    vit: MaskedViT,
    images: Tensor,
    change: Callable[[Tensor, int], Tensor],
    hidden: Tensor | None = None,
    *,
    mass: float = 0.6,
    batch_size: int = 256,
) -> AttentionStability:
    """Compare the attention to images with that to the same images changed in any way.

    >>> def noisy(pixels, first):
    ...     return corrupt(pixels, "gaussian_noise", 3, first=first)
    >>> attention_stability(vit, images, noisy).cosine  # doctest: +SKIP
    0.93

    Args:
        vit: a model with attention.
        images: ``(n, 3, H, W)`` uint8.
        change: a function of a batch of them and the number of its first image, which returns
            pixels of the same shape, from 0 to 255.
        hidden: ``(n, N)`` bool, the patches that the change hides; None is nothing.
        mass: share of the attention that counts as looked at.
        batch_size: images per forward.

    Raises:
        ValueError: images that are not uint8 pixels, or a model without such an attention.
    """
    check_pixels(images)
    clean = attention_maps(vit, images, batch_size=batch_size)
    return compare_attention(clean, _changed(vit, images, change, batch_size), hidden, mass=mass)


def occlusion_stability(
    vit: MaskedViT,
    images: Tensor,
    *,
    kinds: Sequence[OcclusionKind] = ("random",),
    ratios: Sequence[float] = (0.1, 0.3, 0.5, 0.7),
    fill: OcclusionFill = "black",
    attention: Tensor | None = None,
    mass: float = 0.6,
    seed: int = 0,
    batch_size: int = 256,
) -> dict[OcclusionKind, dict[float, AttentionStability]]:
    """Compare the attention before and after patches are hidden, over the patches still seen.

    >>> occlusion_stability(vit, images)["random"][0.5]  # doctest: +SKIP
    AttentionStability(cosine=0.96, overlap=0.71)

    Args:
        vit: a model with attention.
        images: ``(n, 3, H, W)`` uint8.
        kinds: which patches go first.
        ratios: shares of patches to hide, in [0, 1).
        fill: ``"black"``, ``"mean"`` or ``"noise"``; dropped tokens leave no map to compare.
        attention: ``(n, N)``, for the guided kinds; None takes the model's own on clean images.
        mass: share of the attention that counts as looked at.
        seed: of the draws.
        batch_size: images per forward; no matter for the result.

    Returns:
        By kind and ratio.

    Raises:
        ValueError: ``"drop"``, and what `occlusion_mask` and `compare_attention` refuse.
    """
    check_pixels(images)
    check_choice("fill", fill, tuple(name for name in OCCLUSION_FILLS if name != "drop"))
    grid = vit.grid(images.shape[2], images.shape[3])
    clean = attention_maps(vit, images, batch_size=batch_size)
    guide = clean if attention is None else attention
    results: dict[OcclusionKind, dict[float, AttentionStability]] = {}
    for kind in kinds:
        results[kind] = {}
        for ratio in ratios:
            generator = generator_of(seed, "occlusion", kind)
            mask = occlusion_mask(
                kind, ratio, grid, len(images), attention=guide, generator=generator
            )

            def hide(pixels: Tensor, first: int, mask: Tensor = mask) -> Tensor:
                shown = mask[first : first + len(pixels)].to(pixels.device)
                return occlude(pixels, shown, vit.patch_size, fill, seed=seed, first=first)

            changed = _changed(vit, images, hide, batch_size)
            results[kind][ratio] = compare_attention(clean, changed, mask, mass=mass)
    return results


@torch.no_grad()
def _changed(
    vit: MaskedViT, images: Tensor, change: Callable[[Tensor, int], Tensor], batch_size: int
) -> Tensor:
    """Return the head-mean attention to the changed images, ``(n, N)`` on the CPU."""
    device = next(vit.parameters()).device
    maps = []
    with evaluating(vit):
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size].to(device)
            changed = change(batch, start)
            if changed.shape != batch.shape:
                raise ValueError(
                    f"the change must return pixels of the same shape, {tuple(batch.shape)}; got "
                    f"{tuple(changed.shape)}."
                )
            maps.append(vit.attention(normalize(changed.to(device))).float().mean(dim=1))
    return torch.cat(maps).cpu()
