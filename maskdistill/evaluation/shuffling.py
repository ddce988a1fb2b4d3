"""Accuracy when the tiles of an image are in disorder: what features are worth without shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from maskdistill.evaluation.classifiers import Classifier
from maskdistill.evaluation.pixels import accuracy, check_pixels, generator_of
from maskdistill.evaluation.robustness import occluded_features
from maskdistill.models import MaskedViT


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
        generator = generator_of(seed, "shuffle", count)
        order = torch.rand(len(images), count**2, generator=generator).argsort(dim=1)
        parts = zip(images.split(batch_size), order.split(batch_size), strict=True)
        features = [
            occluded_features(vit, _reordered(part, rows.to(part.device)), batch_size=batch_size)
            for part, rows in parts
        ]
        found[count] = accuracy(classify(torch.cat(features)), labels)
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
