"""What is left of the accuracy and of the attention when images are occluded or shuffled.

The classifier is fitted on clean images and never again. What is hidden from image *i* depends on
the seed and on *i* alone, not on the batch size or the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from maskdistill.data import normalize
from maskdistill.data.crops import MEAN
from maskdistill.evaluation.attention import keep_mass
from maskdistill.evaluation.features import Classifier, accuracy, check_pixels, generator_of
from maskdistill.masking import AttentionGuidedMasker, Masker, RandomMasker
from maskdistill.masking.mask import PatchMask, check_mask
from maskdistill.masking.ratios import rounded_down
from maskdistill.models import MaskedViT
from maskdistill.models.probing import evaluating
from maskdistill.models.tokens import check_choice, mask_pixels

OcclusionKind: TypeAlias = Literal["random", "salient", "background"]
"""``random``: any patches. ``salient``: the most attended first. ``background``: the least attended
first."""
OcclusionFill: TypeAlias = Literal["black", "mean", "noise", "drop"]
"""``black``: pixels 0 before normalisation (Naseer et al., 2021). ``mean``: the data set's mean
colour, which is 0 after normalisation. ``noise``: normal noise with each image's mean and
deviation. ``drop``: the tokens are removed, so that no pixel stands in for them."""
KINDS: tuple[OcclusionKind, ...] = get_args(OcclusionKind)
OCCLUSION_FILLS: tuple[OcclusionFill, ...] = get_args(OcclusionFill)
TENTHS = tuple(tenth / 10 for tenth in range(10))
"""Naseer et al.'s ratios: 0 to 0.9."""


class OcclusionCurve(NamedTuple):
    """Accuracy against the share of patches that is hidden.

    Attributes:
        ratios: shares of patches that were to be hidden, ascending.
        hidden: numbers of patches that were, floor(ratio * N).
        accuracies: top-1 accuracy at each ratio, in [0, 1].
        clean: accuracy with nothing hidden.
        area: under the accuracies by the trapezoid rule, divided by the range of ratios: the mean
            accuracy along the curve, in [0, 1].
        retention: each accuracy as a share of the clean one; NaN where that is 0.
    """

    ratios: tuple[float, ...]
    hidden: tuple[int, ...]
    accuracies: tuple[float, ...]
    clean: float
    area: float
    retention: tuple[float, ...]


def attention_maps(vit: MaskedViT, images: Tensor, *, batch_size: int = 256) -> Tensor:
    """Return the last attention averaged over heads: what ``"salient"`` is measured by.

    Args:
        vit: the model whose attention counts.
        images: ``(n, 3, H, W)`` uint8.
        batch_size: images per forward.

    Returns:
        ``(n, N)`` float32 on the CPU, for the patches of this model.

    Raises:
        ValueError: images that are not uint8 pixels, or a model without such an attention.
    """
    return _changed_maps(vit, images, lambda pixels, first: pixels, batch_size)


@torch.no_grad()
def _changed_maps(
    vit: MaskedViT, images: Tensor, change: Callable[[Tensor, int], Tensor], batch_size: int
) -> Tensor:
    """Return the head-mean attention to changed images, ``(n, N)`` on the CPU."""
    check_pixels(images)
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


def occlusion_mask(
    kind: OcclusionKind,
    ratio: float,
    grid: tuple[int, int],
    batch: int,
    *,
    attention: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a mask of each image: which of its patches are hidden.

    >>> occlusion_mask("random", 0.3, (14, 14), 8).sum(dim=1).unique()
    tensor([58])
    >>> attention = torch.tensor([[0.1, 0.6, 0.2, 0.1]])
    >>> occlusion_mask("salient", 0.5, (2, 2), 1, attention=attention)
    tensor([[False,  True,  True, False]])

    The maskers are ``RandomMasker`` and ``AttentionGuidedMasker``, with the protocol's rounding:
    floor(ratio * N), so that tenths hide i * N // 10 patches (Naseer et al., 2021). With equally
    seeded generators, what ``"random"`` hides at a ratio it also hides at every greater one.

    Args:
        kind: ``"random"``, ``"salient"`` (most attended first) or ``"background"`` (least attended
            first).
        ratio: share of patches to hide, in [0, 1].
        grid: patch rows and columns; N patches.
        batch: number of images.
        attention: ``(B, N)`` or ``(B, heads, N)``, for the guided kinds; any saliency will do.
        generator: source of the draw, and of the choice between equally attended patches.

    Returns:
        ``(B, N)`` bool, True = hidden, on the device of the attention, else of the generator.

    Raises:
        ValueError: an unknown kind, a ratio out of range, or attention missing or misshapen.
    """
    check_choice("kind", kind, KINDS)
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must be a share of patches in [0, 1]; got {ratio!r}.")
    patches = grid[0] * grid[1]
    share = rounded_down(ratio * patches) / patches
    if kind == "random":
        return RandomMasker(share)(batch, grid, generator=generator)
    if attention is None:
        raise ValueError(
            f"{kind!r} occlusion goes by attention: give attention=attention_maps(guide, images), "
            "of one guide for all models that are compared."
        )
    masker: Masker = AttentionGuidedMasker(share, hide="most" if kind == "salient" else "least")
    return masker(batch, grid, generator=generator, attention=attention)


def occlude(
    images: Tensor,
    mask: Tensor,
    patch_size: int | tuple[int, int],
    fill: OcclusionFill = "black",
    *,
    seed: int = 0,
    first: int = 0,
) -> Tensor:
    """Fill hidden patches of pixels that are not normalised yet.

    >>> images = torch.full((1, 3, 4, 4), 200, dtype=torch.uint8)
    >>> occlude(images, torch.tensor([[True, False, False, False]]), 2)[0, 0]
    tensor([[  0.,   0., 200., 200.],
            [  0.,   0., 200., 200.],
            [200., 200., 200., 200.],
            [200., 200., 200., 200.]])

    Args:
        images: ``(B, 3, H, W)``, uint8 or floats from 0 to 255.
        mask: ``(B, N)`` bool, True = hidden.
        patch_size: pixels per patch, one int or (height, width).
        fill: ``"black"``, ``"mean"`` or ``"noise"``.
        seed: of the noise.
        first: number of the first of these images in its data set: each image's noise depends on
            the seed and its number alone.

    Returns:
        ``(B, 3, H, W)`` float32 from 0 to 255, for ``normalize``; noise goes beyond those bounds.

    Raises:
        ValueError: an unknown fill, ``"drop"``, which is no matter of pixels, or a mask that does
            not fit.
    """
    check_choice("fill", fill, OCCLUSION_FILLS)
    pixels = images.float()
    if fill == "drop":
        raise ValueError(
            "fill='drop' removes tokens and fills no pixels; hand the mask to a "
            "MaskedViT(..., apply='drop'), or use occluded_features."
        )
    if fill == "noise":
        parts = [
            mask_pixels(
                pixels[i : i + 1], mask[i : i + 1], patch_size, "noise",
                generator=generator_of(seed, "occlusion noise", first + i),
            )
            for i in range(len(pixels))
        ]  # fmt: skip
        return torch.cat(parts)
    filled = mask_pixels(pixels, mask, patch_size, "zero")
    if fill == "black":
        return filled
    # What the visible patches keep of a plain image is 1, of the hidden ones 0.
    visible = mask_pixels(torch.ones_like(pixels), mask, patch_size, "zero")
    return filled + (1 - visible) * _mean_colour(pixels.device)


@torch.no_grad()
def occluded_features(
    vit: MaskedViT,
    images: Tensor,
    masks: Tensor | None = None,
    *,
    fill: OcclusionFill = "black",
    seed: int = 0,
    batch_size: int = 256,
) -> Tensor:
    """Embed images of which patches are hidden.

    >>> occluded_features(vit, images, masks, fill="drop").shape  # doctest: +SKIP
    torch.Size([1000, 192])

    Args:
        vit: in front of any network for pixel fills; with ``apply="drop"`` for ``"drop"``.
        images: ``(n, 3, H, W)`` uint8, as `evaluation_images` gives them.
        masks: ``(n, N)`` bool, True = hidden; None hides nothing.
        fill: what takes the place of hidden patches.
        seed: of the noise.
        batch_size: images per forward; no matter for the result.

    Returns:
        ``(n, D)`` float32 on the model's device.

    Raises:
        ValueError: images that are not uint8 pixels, masks of another size, an unknown fill, or
            ``"drop"`` with a model that does not drop or rows that hide different numbers.
    """
    check_choice("fill", fill, OCCLUSION_FILLS)
    check_pixels(images)
    grid = vit.grid(images.shape[2], images.shape[3])
    device = next(vit.parameters()).device
    dropped = None
    if masks is not None:
        check_mask(masks, len(images), grid)
        dropped = _dropped(vit, masks) if fill == "drop" else None
    features = []
    with evaluating(vit):
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            batch, mask = images[rows].to(device), None
            if masks is not None and dropped is not None:
                mask = PatchMask(masks[rows].to(device), dropped)
            elif masks is not None:
                hidden = masks[rows].to(device)
                batch = occlude(batch, hidden, vit.patch_size, fill, seed=seed, first=start)
            features.append(vit.embed(normalize(batch), mask))
    return torch.cat(features).float()


def occlusion_curve(
    vit: MaskedViT,
    classify: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    kinds: Sequence[OcclusionKind] = ("random",),
    ratios: Sequence[float] = TENTHS,
    fill: OcclusionFill = "black",
    attention: Tensor | None = None,
    per_image: bool = True,
    seed: int = 0,
    batch_size: int = 256,
) -> dict[OcclusionKind, OcclusionCurve]:
    """Measure the accuracy as more and more patches are hidden.

    >>> classify = knn_classifier(train_features, train_labels)  # doctest: +SKIP
    >>> curve = occlusion_curve(vit, classify, images, labels)["random"]  # doctest: +SKIP
    >>> curve.area, curve.retention[5]  # doctest: +SKIP
    (0.412, 0.83)

    Naseer et al., 2021 ("Intriguing Properties of Vision Transformers"), with its defaults: random
    patches, black before normalisation, 0 to 90 % in tenths.

    Args:
        vit: as for `occluded_features`.
        classify: from features to labels, fitted on *clean* images: `knn_classifier`,
            `linear_classifier`, or a function of your own.
        images: ``(n, 3, H, W)`` uint8, as `evaluation_images` gives them.
        labels: ``(n,)``.
        kinds: which patches go first.
        ratios: shares of patches to hide, ascending, at least two, in [0, 1).
        fill: what takes their place.
        attention: ``(n, N)`` or ``(n, heads, N)``, for ``"salient"`` and ``"background"``, such as
            `attention_maps` of one guide for all models that are compared.
        per_image: draw random patches anew for each image; False takes one draw for all of them,
            as the original does for each batch.
        seed: of the draws.
        batch_size: images per forward; no matter for the result.

    Returns:
        One curve per kind.

    Raises:
        ValueError: labels that do not match, ratios that do not ascend, and what `occlusion_mask`
            and `occluded_features` refuse.
    """
    check_pixels(images, labels)
    ratios = tuple(float(ratio) for ratio in ratios)
    ascending = len(ratios) >= 2 and list(ratios) == sorted(set(ratios))
    if not ascending or not 0 <= ratios[0] < ratios[-1] < 1:
        raise ValueError(
            f"ratios must be at least two, ascending, from 0 to less than 1; got {ratios}."
        )
    check_choice("fill", fill, OCCLUSION_FILLS)
    rows, columns = grid = vit.grid(images.shape[2], images.shape[3])
    hidden = tuple(rounded_down(ratio * rows * columns) for ratio in ratios)

    def accuracy_of(masks: Tensor | None) -> float:
        features = occluded_features(
            vit, images, masks, fill=fill, seed=seed, batch_size=batch_size
        )
        return accuracy(classify(features), labels)

    # Before anything runs: what is missing is said at once, and not after half of the curves.
    for kind in kinds:
        occlusion_mask(kind, ratios[0], grid, len(images), attention=attention)
    clean, curves = accuracy_of(None), {}
    for kind in kinds:
        found = []
        for ratio, count in zip(ratios, hidden, strict=True):
            one = kind == "random" and not per_image
            masks = occlusion_mask(
                kind, ratio, grid, 1 if one else len(images),
                attention=attention, generator=generator_of(seed, "occlusion", kind),
            )  # fmt: skip
            found.append(accuracy_of(masks.expand(len(images), -1)) if count else clean)
        places = torch.tensor(ratios, dtype=torch.float64)
        area = torch.trapezoid(torch.tensor(found, dtype=torch.float64), places)
        curves[kind] = OcclusionCurve(
            ratios, hidden, tuple(found), clean,
            area=float(area) / (ratios[-1] - ratios[0]),
            retention=tuple(value / clean if clean else float("nan") for value in found),
        )  # fmt: skip
    return curves


def _dropped(vit: MaskedViT, masks: Tensor) -> int:
    """Return how many patches every row hides, for a model that drops them."""
    if vit.apply_mask != "drop":
        raise ValueError(
            f"fill='drop' needs a model that drops tokens, but this one has apply="
            f"{vit.apply_mask!r}. Wrap it again: MaskedViT(vit.unwrap(), apply='drop')."
        )
    counts = (~masks).sum(dim=1)
    least, most = int(counts.min()), int(counts.max())
    if least != most or not least:
        raise ValueError(
            "dropping tokens needs rows that show the same number of patches, at least one; these "
            f"show from {least} to {most}."
        )
    return masks.shape[1] - least


@functools.cache  # moving it to an accelerator for every batch would make the host wait
def _mean_colour(device: torch.device) -> Tensor:
    return 255 * torch.tensor(MEAN, device=device).view(3, 1, 1)


def shuffle_patches(
    images: Tensor, pieces: int, *, generator: torch.Generator | None = None
) -> Tensor:
    """Cut each image into pieces x pieces tiles and put them back in random order.

    >>> images = torch.arange(16.0).view(1, 1, 4, 4)
    >>> shuffled = shuffle_patches(images, 2, generator=torch.Generator().manual_seed(2))
    >>> shuffled[0, 0]
    tensor([[ 2.,  3., 10., 11.],
            [ 6.,  7., 14., 15.],
            [ 0.,  1.,  8.,  9.],
            [ 4.,  5., 12., 13.]])

    Naseer et al., 2021. Every order is as likely as any other, also that of the image itself: with
    2x2 tiles, one image in 24 stays as it is.

    Args:
        images: ``(B, C, H, W)``, of any dtype.
        pieces: tiles along a side; must divide height and width.
        generator: source of the orders, one for each image.

    Raises:
        ValueError: tiles that do not divide the image.
    """
    _check_pieces(images, pieces)
    device = images.device if generator is None else generator.device
    order = torch.rand(len(images), pieces**2, generator=generator, device=device).argsort(dim=1)
    return _reordered(images, order.to(images.device))


@torch.no_grad()
def shuffle_curve(
    vit: MaskedViT,
    classify: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    pieces: Sequence[int] = (2, 4, 8, 16),
    seed: int = 0,
    batch_size: int = 256,
) -> dict[int, float]:
    """Measure the accuracy on images whose tiles are in disorder: what is left without shape.

    >>> shuffle_curve(vit, classify, images, labels)  # doctest: +SKIP
    {1: 0.71, 2: 0.64, 4: 0.41, 8: 0.22, 16: 0.12}

    Args:
        vit: a model; its patches need not be the tiles.
        classify: from features to labels, fitted on clean images.
        images: ``(n, 3, H, W)`` uint8.
        labels: ``(n,)``.
        pieces: tiles along a side, each a divisor of height and width.
        seed: of the orders.
        batch_size: images per forward; no matter for the result.

    Returns:
        Top-1 accuracy in [0, 1] by tiles along a side; that of 1 is the clean accuracy.

    Raises:
        ValueError: labels that do not match, or tiles that do not divide the image.
    """
    check_pixels(images, labels)
    for count in pieces:
        _check_pieces(images, count)
    found = {}
    for count in sorted({1, *pieces}):
        shuffled = shuffle_patches(images, count, generator=generator_of(seed, "shuffle", count))
        features = occluded_features(vit, shuffled, batch_size=batch_size)
        found[count] = accuracy(classify(features), labels)
    return found


def _check_pieces(images: Tensor, pieces: int) -> None:
    if pieces < 1 or images.ndim != 4 or images.shape[2] % pieces or images.shape[3] % pieces:
        raise ValueError(
            f"pieces must divide the images (B, C, H, W) into whole tiles along both sides; got "
            f"pieces={pieces!r} for images of {tuple(images.shape)}."
        )


def _reordered(images: Tensor, order: Tensor) -> Tensor:
    """Put tile ``order[b, i]`` of image b at place i."""
    side = round(order.shape[1] ** 0.5)
    tiles = rearrange(images, "b c (r h) (s w) -> b (r s) c h w", r=side, s=side)
    rows = torch.arange(len(images), device=images.device)[:, None]
    return rearrange(tiles[rows, order], "b (r s) c h w -> b c (r h) (s w)", r=side)


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

    >>> def darker(pixels, first):
    ...     return 0.5 * pixels
    >>> attention_stability(vit, images, darker).cosine  # doctest: +SKIP
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
    clean = attention_maps(vit, images, batch_size=batch_size)
    changed = _changed_maps(vit, images, change, batch_size)
    return compare_attention(clean, changed, hidden, mass=mass)


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

            changed = _changed_maps(vit, images, hide, batch_size)
            results[kind][ratio] = compare_attention(clean, changed, mask, mass=mass)
    return results
