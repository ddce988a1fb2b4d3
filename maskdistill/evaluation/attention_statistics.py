"""What attention is like, without any truth: how wide, how varied, how far."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from maskdistill.models import MaskedViT
from maskdistill.models.probing import evaluating, model_name


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
    entropy = _entropy(_distribution(attention)) / math.log(attention.shape[-1])
    return entropy.clamp(0, 1)  # rounding


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
    alone = _entropy(shares)
    pairs = list(itertools.combinations(range(attention.shape[1]), 2))
    total = torch.zeros_like(alone[:, 0])
    for i, j in pairs:  # one at a time: all at once would hold (B, heads, heads, N)
        both = _entropy((shares[:, i] + shares[:, j]) / 2)
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
    if attention.shape[-1] != grid[0] * grid[1]:
        raise ValueError(
            f"attention must be (..., N) with N = {grid[0] * grid[1]} for a grid of "
            f"{grid[0]}x{grid[1]}; got {tuple(attention.shape)}."
        )
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


def _entropy(shares: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(shares).sum(dim=-1)
    return entropy


def _places(
    grid: tuple[int, int], patch_size: int | tuple[int, int], device: torch.device
) -> Tensor:
    """Return the middles of the patches, ``(N, 2)`` in pixels from the first one."""
    height, width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    rows = torch.arange(grid[0], device=device) * float(height)
    columns = torch.arange(grid[1], device=device) * float(width)
    return torch.cartesian_prod(rows, columns).reshape(-1, 2)
