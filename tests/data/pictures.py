"""Pictures for the tests of the views."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maskdistill.data import Crops, Scenes


def gradient(width: int = 80, height: int = 60) -> Image.Image:
    """Red grows to the right and green downwards, so a crop's colours tell where it lies."""
    x = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    y = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))


def scenes(count: int, size: int = 96, seed: int = 0) -> Tensor:
    """Return ``(count, 3, size, size)`` uint8."""
    return torch.from_numpy(Scenes(count, size, seed=seed).images).permute(0, 3, 1, 2).contiguous()


def pictures(count: int = 6) -> Tensor:
    """Return ``(3 * count, 3, 64, 64)``: scenes, noise, and flat colours with the extremes."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (count, 3, 64, 64), generator=generator)
    flat = torch.randint(0, 256, (count, 3, 1, 1), generator=generator).repeat(1, 1, 64, 64)
    flat[0], flat[1] = 0, 255
    return torch.cat([scenes(count, 64), noise.byte(), flat.byte()])


def to_pillow(x: Tensor) -> Image.Image:
    return Image.fromarray(x.permute(1, 2, 0).numpy())


def collate_crops(samples: Sequence[Crops]) -> Crops:
    """Stack the crops of several images, view by view."""
    views = zip(*(sample.images for sample in samples), strict=True)
    return Crops(
        [torch.stack(view) for view in views],
        torch.stack([sample.boxes for sample in samples]),
        torch.stack([sample.flipped for sample in samples]),
    )
