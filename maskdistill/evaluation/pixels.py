"""Images as pixels, before normalisation: what the measurements of robustness start from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from maskdistill.data import derive_seed, resize_for_evaluation


def evaluation_images(
    images: Dataset[tuple[Image.Image, int]],
    image_size: int,
    *,
    indices: Sequence[int] | None = None,
    crop: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return images as a tensor of pixels, resized as in DINO's evaluation, and their labels.

    >>> from maskdistill.data import Scenes
    >>> pixels, labels = evaluation_images(Scenes(12, 48), 32)
    >>> pixels.shape, pixels.dtype, labels.shape
    (torch.Size([12, 3, 32, 32]), torch.uint8, torch.Size([12]))

    Args:
        images: of (RGB image, label) pairs.
        image_size: pixels of a side.
        indices: which images; None is all.
        crop: cut out the centre; False squeezes the whole image into the square.

    Returns:
        ``(n, 3, image_size, image_size)`` uint8, not normalised, and ``(n,)`` int64.

    Raises:
        ValueError: no images.
    """
    chosen = range(len(images)) if indices is None else indices  # type: ignore[arg-type]
    if not len(chosen):
        raise ValueError("there must be at least one image to evaluate; none came.")
    pairs = [images[int(i)] for i in chosen]
    pixels = [resize_for_evaluation(image, image_size, crop=crop) for image, _ in pairs]
    return torch.stack(pixels), torch.tensor([int(label) for _, label in pairs])


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Return the share of predictions that are right, wherever the two tensors lie."""
    return float((predicted == labels.to(predicted.device)).double().mean())


def check_pixels(images: Tensor, labels: Tensor | None = None) -> None:
    """Refuse images that are not uint8 pixels, or labels that do not match them.

    Raises:
        ValueError: says what came.
    """
    if images.ndim != 4 or images.dtype != torch.uint8 or images.shape[1] != 3 or not len(images):
        raise ValueError(
            "images must be pixels before normalisation, (n, 3, H, W) uint8 with n >= 1, as "
            f"evaluation_images gives them; got {tuple(images.shape)} {images.dtype}."
        )
    if labels is not None and tuple(labels.shape) != (len(images),):
        raise ValueError(
            f"labels must be (n,), one per image; got {tuple(labels.shape)} for "
            f"{len(images)} images."
        )


def generator_of(seed: int, *parts: int | str) -> torch.Generator:
    """Return a generator on the CPU for one purpose, the same each time."""
    return torch.Generator().manual_seed(derive_seed(seed, *parts))
