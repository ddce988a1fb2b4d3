"""Embeddings of a data set, from a frozen backbone, computed once and kept."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from maskdistill.data.augment import MEAN, STD, normalize, resize_for_evaluation
from maskdistill.evaluation.feature_cache import FeatureCache
from maskdistill.models import MaskedViT
from maskdistill.models.probing import evaluating

Images = Dataset[tuple[Image.Image, int]]
Precision = Literal["float32", "float16"]
Statistics = tuple[Sequence[float], Sequence[float]]

PROTOCOL = "1: bicubic, shorter side to size * 256 / 224, centre; MaskedViT.embed or the call"
"""How an image becomes features; it is part of the cache's key, and changes with what it says."""

_HELD = 32  # batches of features on the device between two waits for it


class _Prepared(Dataset[tuple[Tensor, int]]):
    """A data set of images as uint8 tensors of one size."""

    def __init__(self, images: Images, size: int) -> None:
        self.images, self.size = images, size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        return resize_for_evaluation(image, self.size), label

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    images: Images,
    image_size: int,
    *,
    indices: Sequence[int] | None = None,
    batch_size: int = 256,
    workers: int = 0,
    precision: Precision = "float32",
    statistics: Statistics = (MEAN, STD),
    cache: str | os.PathLike[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """Embed images, resized and centre-cropped as in DINO's evaluation.

    >>> features, labels = extract_features(backbone, images, 64)  # doctest: +SKIP
    >>> features.shape, labels.shape  # doctest: +SKIP
    (torch.Size([10000, 192]), torch.Size([10000]))

    With ``cache``, features that were computed before are read instead: those of the same weights,
    images, indices, size, precision and statistics, whatever the batch size. It goes by the content
    of the weights, not by a name, so a backbone that was trained on is another one. The images go
    by their ``fingerprint``, a string, where the data set has one, else by its ``labels`` and 64 of
    the chosen images.

    Args:
        backbone: a ``MaskedViT``, or a network that gives ``(B, D)``; runs in evaluation mode, and
            is put back afterwards.
        images: of (RGB image, label) pairs.
        image_size: pixels of a side.
        indices: which images; None is all.
        batch_size: images per forward.
        workers: loader processes.
        precision: ``"float16"`` stores half, and on CUDA also computes under autocast.
        statistics: mean and standard deviation of the three colours, of pixels in [0, 1];
            ImageNet's, unless the backbone was trained with others (``pretrained_cfg`` of a timm
            model says so).
        cache: a folder for features; made if it is not there. None keeps nothing.

    Returns:
        ``(n, D)`` features, float32 or float16, and ``(n,)`` int64 labels, on the CPU.

    Raises:
        ValueError: no images, a network that gives no embeddings, numbers too large for float16,
            or a data set that a cache cannot tell from others.
    """
    if precision not in ("float32", "float16"):
        raise ValueError(f"precision must be 'float32' or 'float16'; got {precision!r}.")
    count = len(images) if indices is None else len(indices)  # type: ignore[arg-type]
    if not count:
        raise ValueError("there are no images to embed; give a data set and indices with some.")
    device = next(backbone.parameters(), torch.empty(0)).device
    half_on_device = precision == "float16" and device.type == "cuda"
    kept: FeatureCache | None = None
    if cache is not None:
        colours = [[float(value) for value in values] for values in statistics]
        settings = (PROTOCOL, image_size, precision, half_on_device, colours)
        kept = FeatureCache.of(Path(cache), backbone, images, indices, settings)
        found = kept.read(count)
        if found is not None:
            return found
    chosen = images if indices is None else Subset(images, list(indices))
    loader = DataLoader(
        _Prepared(chosen, image_size),
        batch_size=batch_size,
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )
    embed = backbone.embed if isinstance(backbone, MaskedViT) else backbone
    usual = statistics == (MEAN, STD)
    mean, std = (torch.tensor(list(v), device=device).view(3, 1, 1) for v in statistics)
    store = torch.float16 if precision == "float16" else torch.float32
    overflow = torch.zeros((), dtype=torch.bool, device=device)
    held: list[Tensor] = []
    features, labels = [], []
    with evaluating(backbone), torch.autocast("cuda", torch.float16, enabled=half_on_device):
        for batch, label in loader:
            pixels = batch.to(device, non_blocking=True)
            inputs = normalize(pixels) if usual else (pixels / 255 - mean) / std
            full = _checked(embed(inputs), len(batch))
            held.append(full.to(store))
            overflow |= (held[-1].isinf() & full.isfinite()).any()
            labels.append(label)
            if len(held) == _HELD:  # not after each batch, which would make the host wait
                features.append(torch.cat(held).cpu())
                held = []
    if held:
        features.append(torch.cat(held).cpu())
    if overflow:
        raise ValueError(
            "some features are beyond 65504, the largest number of float16; use "
            "precision='float32'."
        )
    result = torch.cat(features), torch.cat(labels)
    if kept is not None:
        kept.write(*result)
    return result


def _checked(output: object, batch: int) -> Tensor:
    if isinstance(output, Tensor) and output.ndim == 2 and len(output) == batch:
        return output
    came = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise ValueError(
        f"the backbone must give one embedding per image, ({batch}, D); it gave {came}. Wrap it: "
        "MaskedViT(model), or MaskedViT(model, 'pixel') where there is no patch embedding."
    )


def raw_pixels(images: Images, indices: Sequence[int], size: int = 16) -> tuple[Tensor, Tensor]:
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


def check_labelled(name: str, features: Tensor, labels: Tensor) -> None:
    """Refuse features and labels that no classifier should be given.

    >>> check_labelled("train_", torch.zeros(2, 8), torch.tensor([0, 1]))

    Args:
        name: what the arguments' names begin with, for the message.
        features: ``(n, D)``.
        labels: ``(n,)``, whole numbers.

    Raises:
        ValueError: empty, misshapen or non-finite features, or labels that are none.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1] or not features.numel():
        raise ValueError(
            f"{name}features must be (n, D) with n >= 1 labels; got "
            f"{tuple(features.shape)} and {tuple(labels.shape)}."
        )
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"{name}labels must be whole numbers, one class per image; got {labels.dtype}."
        )
    # In parts, so that a large bank does not need a second array of its size.
    finite = torch.stack([torch.isfinite(part).all() for part in features.split(65_536)]).all()
    if not finite:
        raise ValueError(f"{name}features hold NaN or infinite numbers; has training diverged?")


def check_split(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor
) -> None:
    """Refuse training and test features that do not belong together.

    Raises:
        ValueError: what `check_labelled` refuses, other widths, or no class in common.
    """
    check_labelled("train_", train_features, train_labels)
    check_labelled("test_", test_features, test_labels)
    widths = train_features.shape[1], test_features.shape[1]
    if widths[0] != widths[1]:
        raise ValueError(
            f"training features have {widths[0]} dimensions and test features {widths[1]}; both "
            "must be of one backbone."
        )
    here, there = train_labels.unique().cpu(), test_labels.unique().cpu()
    if not torch.isin(there, here).any():
        raise ValueError(
            f"the labels have no class in common: {_first(here)} in training and {_first(there)} "
            "in the test. Are both numbered alike? For new classes use few_shot."
        )


def _first(classes: Tensor) -> str:
    shown = ", ".join(map(str, cast(list[int], classes[:3].tolist())))
    return shown + (", ..." if len(classes) > 3 else "")
