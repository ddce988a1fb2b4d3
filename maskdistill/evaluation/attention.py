"""How well the attention finds the object."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from maskdistill.evaluation.health import entropy
from maskdistill.models import MaskedViT
from maskdistill.models.probing import evaluating, model_name


class HeadScores(NamedTuple):
    """A score of the attention, averaged over images, in [0, 1].

    Attributes:
        best_head: of each image's best head, chosen on the truth, as DINO reports it.
        mean_over_heads: of each head by itself, averaged.
        head_mean: of the one map that is the average over heads.
    """

    best_head: float
    mean_over_heads: float
    head_mean: float


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
) -> HeadScores:
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
    return _mean_scores(each)


def jaccard_per_image(
    attention: Tensor,
    masks: Tensor,
    grid: tuple[int, int],
    *,
    mass: float = 0.6,
    ignore: Tensor | None = None,
    chunk: int = 256,
) -> dict[str, Tensor]:
    """Return what ``attention_jaccard`` averages, ``(B,)`` under each of its names.

    >>> attention = torch.tensor([[[0.7, 0.1, 0.1, 0.1]], [[0.1, 0.7, 0.1, 0.1]]])
    >>> mask = torch.tensor([[[True, False], [False, False]]])
    >>> jaccard_per_image(attention, mask.expand(2, 2, 2), (2, 2))["head_mean"]
    tensor([1., 0.])

    The arguments and errors are those of ``attention_jaccard``.
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
) -> HeadScores:
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
    return _mean_scores(_by_head(torch.cat(hits)))


# --- Parts


def check_attention(attention: Tensor, grid: tuple[int, int]) -> None:
    """Refuse what is no ``(B, heads, N)`` attention over this grid, in a sentence."""
    _check_patches(attention, grid, "(B, heads, N)", attention.ndim == 3)
    if not attention.numel():
        raise ValueError(f"attention must hold at least one image; got {tuple(attention.shape)}.")
    if not bool((torch.isfinite(attention) & (attention >= 0)).all()):
        raise ValueError(
            "attention holds NaN, infinite or negative numbers; has training diverged?"
        )


def _check_patches(attention: Tensor, grid: tuple[int, int], form: str, fits: bool = True) -> None:
    patches = grid[0] * grid[1]
    if not fits or attention.shape[-1] != patches:
        raise ValueError(
            f"attention must be {form} with N = {patches} for a grid of {grid[0]}x{grid[1]}; got "
            f"{tuple(attention.shape)}."
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


def _by_head(scores: Tensor) -> dict[str, Tensor]:
    """Name the scores ``(B, heads + 1)`` of maps made by ``_with_mean``."""
    heads, mean = scores[:, :-1], scores[:, -1]
    values = heads.amax(dim=1), heads.mean(dim=1), mean
    return dict(zip(HeadScores._fields, values, strict=True))


def _mean_scores(each: dict[str, Tensor]) -> HeadScores:
    return HeadScores(**{name: float(score.mean()) for name, score in each.items()})


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


def attention_entropy(attention: Tensor) -> Tensor:
    """Return how widely each map is spread: 0 on one patch, 1 evenly over all.

    >>> attention_entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    tensor([0., 1.])

    Entropy over ln N of the attention to the patches, which is made to sum to 1 first.

    Args:
        attention: ``(..., N)``, such as ``(B, heads, N)``; N is at least 2.

    Returns:
        ``(...)``, in [0, 1].

    Raises:
        ValueError: fewer than two patches.
    """
    if attention.ndim < 1 or attention.shape[-1] < 2:
        raise ValueError(
            f"attention must be (..., N) with N >= 2 patches; got {tuple(attention.shape)}."
        )
    share = entropy(_distribution(attention)) / math.log(attention.shape[-1])
    return share.clamp(0, 1)  # rounding


def head_diversity(attention: Tensor) -> Tensor:
    """Return how much the heads of an image differ: 0 all the same, 1 all on patches of their own.

    >>> head_diversity(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))  # one image, two heads
    tensor([1.])

    The Jensen-Shannon divergence in bits between the maps of two heads, each made to sum to 1,
    averaged over all pairs (the measure of Clark et al., 2019, section 6).

    Args:
        attention: ``(B, heads, N)``.

    Returns:
        ``(B,)``, in [0, 1]; 0 of a single head.
    """
    if attention.ndim != 3:
        raise ValueError(f"attention must be (B, heads, N); got {tuple(attention.shape)}.")
    shares = _distribution(attention)
    alone = entropy(shares)
    pairs = list(itertools.combinations(range(attention.shape[1]), 2))
    total = torch.zeros_like(alone[:, 0])
    for i, j in pairs:  # one at a time: all at once would hold (B, heads, heads, N)
        both = entropy((shares[:, i] + shares[:, j]) / 2)
        total += both - (alone[:, i] + alone[:, j]) / 2
    return (total / (max(1, len(pairs)) * math.log(2))).clamp(0, 1)


def attention_spread(
    attention: Tensor, grid: tuple[int, int], patch_size: int | tuple[int, int]
) -> Tensor:
    """Return how far the attention reaches around its own centre, in pixels.

    >>> attention_spread(torch.tensor([0.5, 0.0, 0.5]), (1, 3), 16)
    tensor(16.)

    The root mean square distance to the attention's centre of mass, each patch at its middle. A
    class token has no place, so its mean attention distance is not defined; this is what can be
    said of its row. For the measure of Dosovitskiy et al. see ``mean_attention_distance``.

    Args:
        attention: ``(..., N)``.
        grid: patch rows and columns.
        patch_size: pixels per patch, or (height, width).

    Returns:
        ``(...)``.
    """
    _check_patches(attention, grid, "(..., N)")
    shares, places = _distribution(attention), _places(grid, patch_size, attention.device)
    centre = shares @ places
    away = (places - centre.unsqueeze(-2)).square().sum(dim=-1)
    return (shares * away).sum(dim=-1).sqrt()


def mean_attention_distance(
    weights: Tensor, grid: tuple[int, int], patch_size: int | tuple[int, int]
) -> Tensor:
    """Return the mean distance between a patch and what it attends to, in pixels.

    >>> mean_attention_distance(torch.tensor([[0.5, 0.5], [0.0, 1.0]]), (1, 2), 16)
    tensor(4.)

    Distances between the patches' middles, weighted by the attention and averaged over all patches
    that ask (Dosovitskiy et al., 2021, appendix D.7).

    Args:
        weights: ``(..., N, N)`` attention of the patches (rows) to the patches (columns), without
            prefix tokens; rows are made to sum to 1.
        grid: patch rows and columns.
        patch_size: pixels per patch, or (height, width).

    Returns:
        ``(...)``.
    """
    patches = grid[0] * grid[1]
    if weights.ndim < 2 or weights.shape[-2:] != (patches, patches):
        raise ValueError(
            f"weights must be (..., N, N) with N = {patches} for a grid of {grid[0]}x{grid[1]}, "
            f"the attention of all patches to all; got {tuple(weights.shape)}."
        )
    places = _places(grid, patch_size, weights.device)
    return (_distribution(weights) * torch.cdist(places, places)).sum(dim=-1).mean(dim=-1)


@torch.no_grad()
def attention_distances(vit: MaskedViT, images: Tensor, *, batch_size: int = 32) -> Tensor:
    """Return the mean attention distance of every head of every block, in pixels.

    >>> import maskdistill as md
    >>> vit = md.MaskedViT(md.create_backbone("vit_tiny_patch16_224", 32, 8, depth=2))
    >>> attention_distances(vit, torch.zeros(4, 3, 32, 32)).shape
    torch.Size([2, 3])

    Args:
        vit: a ``MaskedViT`` around a plain ViT, with ``blocks[i].attn``.
        images: ``(B, 3, H, W)``, normalised.
        batch_size: images per forward.

    Returns:
        ``(blocks, heads)``, over the images (figure 7 of Dosovitskiy et al., 2021).

    Raises:
        ValueError: no images, or a model whose blocks do not let their attention be read.
    """
    if not len(images):
        raise ValueError("images must be (B, 3, H, W) with B >= 1; got none.")
    grid = vit.grid(images.shape[-2], images.shape[-1])
    blocks = list(vit.backbone.get_submodule("blocks").children()) if _has_blocks(vit) else []
    device = next(vit.parameters()).device
    sums: dict[int, Tensor] = {}

    def reader(index: int) -> Callable[[Tensor], None]:
        def read(weights: Tensor) -> None:
            patches = patch_weights(weights, grid, vit.prefix_tokens)
            distance = mean_attention_distance(patches, grid, vit.patch_size).sum(dim=0)
            sums[index] = sums[index] + distance if index in sums else distance

        return read

    with evaluating(vit), ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.enter_context(reading_weights(getattr(block, "attn", None), reader(index)))
        for part in images.split(batch_size):
            vit(part.to(device))
    if not sums or len(sums) != len(blocks):
        raise ValueError(
            f"{model_name(vit.backbone)}: the attention of its blocks could not be read. Choose a "
            "plain ViT with blocks[i].attn."
        )
    return torch.stack([sums[i] for i in range(len(blocks))]) / len(images)


# --- Reading the weights of an attention


@contextmanager
def reading_weights(attention: Any, read: Callable[[Tensor], None]) -> Iterator[None]:
    """Call ``read`` with the softmax weights ``(B, heads, T, T)`` of each forward of a module.

    timm passes them through ``attn_drop``, if it does not fuse; where there is none, nothing comes.
    """
    drop = getattr(attention, "attn_drop", None)
    if not isinstance(drop, nn.Module):
        yield
        return
    hook = drop.register_forward_pre_hook(lambda module, inputs: read(inputs[0]))
    fused = getattr(attention, "fused_attn", None)
    if fused:
        attention.fused_attn = False
    try:
        yield
    finally:
        hook.remove()
        if fused:
            attention.fused_attn = fused


def patch_weights(weights: Tensor, grid: tuple[int, int], prefix: int) -> Tensor:
    """Return the attention of patches to patches, ``(B, heads, N, N)``.

    Args:
        weights: ``(B, heads, T, T)``, where T is N, or N after that many prefix tokens.
        grid: patch rows and columns.
        prefix: class and register tokens of the model.

    Raises:
        ValueError: attention of or to anything else, such as windows.
    """
    patches = grid[0] * grid[1]
    tokens = weights.shape[-1]
    if weights.ndim != 4 or tokens != weights.shape[-2] or tokens - patches not in (0, prefix):
        raise ValueError(
            f"attention with the weights {tuple(weights.shape)} is not of all patches of a grid of "
            f"{grid[0]}x{grid[1]} to all. Choose a plain ViT."
        )
    return weights[:, :, tokens - patches :, tokens - patches :]


def _has_blocks(vit: MaskedViT) -> bool:
    return isinstance(getattr(vit.backbone, "blocks", None), (nn.Sequential, nn.ModuleList))


# --- Parts


def _distribution(attention: Tensor) -> Tensor:
    """Make the last dimension sum to 1; what has no mass stays 0."""
    values = attention.float()
    total = values.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return values / total


def _places(
    grid: tuple[int, int], patch_size: int | tuple[int, int], device: torch.device
) -> Tensor:
    """Return the middles of the patches, ``(N, 2)`` in pixels from the first one."""
    height, width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    rows = torch.arange(grid[0], device=device) * float(height)
    columns = torch.arange(grid[1], device=device) * float(width)
    return torch.cartesian_prod(rows, columns).reshape(-1, 2)
