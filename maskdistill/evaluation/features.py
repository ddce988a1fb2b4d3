"""Embeddings of a data set, from a frozen backbone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from maskdistill.data.augment import normalize, resize_for_evaluation
from maskdistill.models import MaskedViT
from maskdistill.models.probing import evaluating


class _Prepared(Dataset[tuple[Tensor, int]]):
    """A data set of images as uint8 tensors of one size."""

    def __init__(self, images: Dataset[tuple[Image.Image, int]], size: int) -> None:
        self.images, self.size = images, size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        return resize_for_evaluation(image, self.size), label

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    images: Dataset[tuple[Image.Image, int]],
    image_size: int,
    *,
    indices: Sequence[int] | None = None,
    batch_size: int = 256,
    workers: int = 0,
) -> tuple[Tensor, Tensor]:
    """Embed images, resized and centre-cropped as in DINO's evaluation.

    >>> features, labels = extract_features(backbone, images, 64)  # doctest: +SKIP
    >>> features.shape, labels.shape  # doctest: +SKIP
    (torch.Size([10000, 192]), torch.Size([10000]))

    Args:
        backbone: a ``MaskedViT``, or a network that gives ``(B, D)``; runs in evaluation mode, and
            is put back afterwards.
        images: of (RGB image, label) pairs.
        image_size: pixels of a side.
        indices: which images; None is all.
        batch_size: images per forward.
        workers: loader processes.

    Returns:
        ``(n, D)`` float32 features and ``(n,)`` int64 labels, on the CPU.
    """
    chosen: Dataset[tuple[Image.Image, int]] = images
    if indices is not None:
        chosen = Subset(images, list(indices))
    device = next(backbone.parameters()).device
    loader = DataLoader(_Prepared(chosen, image_size), batch_size=batch_size, num_workers=workers)
    features, labels = [], []
    embed = backbone.embed if isinstance(backbone, MaskedViT) else backbone
    with evaluating(backbone):
        for batch, label in loader:
            features.append(embed(normalize(batch.to(device))).float().cpu())
            labels.append(label)
    return torch.cat(features), torch.cat(labels)


def raw_pixels(
    images: Dataset[tuple[Image.Image, int]], indices: Sequence[int], size: int = 16
) -> tuple[Tensor, Tensor]:
    """Return images as flat vectors of their pixels: the floor that features must beat.

    Args:
        images: of (RGB image, label) pairs.
        indices: which images.
        size: pixels of a side after resizing.

    Returns:
        ``(n, 3 * size * size)`` float32, centred per pixel over the n images, and ``(n,)`` labels.
    """
    pairs = [images[i] for i in indices]
    pixels = torch.stack(
        [resize_for_evaluation(image, size, crop=False).flatten() for image, _ in pairs]
    )
    return pixels.float() / 255 - 0.5, torch.tensor([label for _, label in pairs])


def balanced_indices(labels: Sequence[int] | Tensor, limit: int) -> list[int]:
    """Choose at most ``limit`` images, as evenly over the classes as they allow, in a fixed way.

    >>> balanced_indices([0, 0, 0, 1, 1, 1], limit=4)
    [0, 1, 3, 4]
    """
    seen: dict[int, int] = {}
    turns = []
    for index, label in enumerate(torch.as_tensor(labels).tolist()):
        seen[label] = seen.get(label, 0) + 1
        turns.append((seen[label], index))
    return sorted(index for _, index in sorted(turns)[:limit])
