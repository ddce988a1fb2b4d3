"""DINO's multi-crop augmentation, which also hands over where each crop lies in its image."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import ColorJitter, InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as TF

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""ImageNet's colour statistics, by which every input is normalised."""

_JITTER = ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)


class Crops(NamedTuple):
    """The views of one image, or of a batch of images.

    Attributes:
        images: one uint8 tensor per crop, ``(3, H, W)`` or ``(B, 3, H, W)``, global crops first.
        boxes: ``(V, 4)`` or ``(B, V, 4)`` floats: left, top, right, bottom of each crop, as shares
            of the image's width and height.
        flipped: ``(V,)`` or ``(B, V)`` bool: whether the crop was mirrored, after cutting.
    """

    images: list[Tensor]
    boxes: Tensor
    flipped: Tensor


@dataclass(frozen=True)
class MultiCrop:
    """Cuts two global and several local crops out of an image, each augmented as in DINO.

    >>> crops = MultiCrop(64, 32, local_crops=6)(image)  # doctest: +SKIP
    >>> [tuple(c.shape) for c in crops.images[:3]]  # doctest: +SKIP
    [(3, 64, 64), (3, 64, 64), (3, 32, 32)]

    Random resized crop (bicubic), mirror with probability 0.5, colour jitter (0.4, 0.4, 0.2, 0.1)
    with 0.8, grey with 0.2; blur of radius 0.1 to 2 pixels with 1.0, 0.1 and 0.5 on the first
    global, the second global and the local crops; solarisation with 0.2 on the second global one
    (Caron et al., 2021; blur after Grill et al., 2020). Every number comes from torch's global
    generator, as in torchvision.

    Args:
        global_size: pixels of the global crops' sides; 224 in the paper.
        local_size: pixels of the local crops' sides; 96 in the paper.
        local_crops: number of local crops.
        global_scale: least and greatest share of the image's area in a global crop.
        local_scale: the same for local crops.
        blur_scale: factor on the blur's radius, which is meant for crops of 224 pixels; None takes
            global_size / 224.
    """

    global_size: int
    local_size: int
    local_crops: int = 8
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.4)
    blur_scale: float | None = None

    def __call__(self, image: Image.Image) -> Crops:
        """Return all views of one RGB image."""
        images, boxes, flips = [], [], []
        for view in range(2 + self.local_crops):
            whole = view < 2
            blur, solarize = ((1.0, 0.0), (0.1, 0.2), (0.5, 0.0))[min(view, 2)]
            crop, box, flipped = self._crop(
                image,
                self.global_size if whole else self.local_size,
                self.global_scale if whole else self.local_scale,
            )
            images.append(TF.pil_to_tensor(self._colour(crop, blur, solarize)))
            boxes.append(box)
            flips.append(flipped)
        return Crops(images, torch.tensor(boxes), torch.tensor(flips))

    def _crop(
        self, image: Image.Image, size: int, scale: tuple[float, float]
    ) -> tuple[Image.Image, tuple[float, float, float, float], bool]:
        top, left, height, width = RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3])
        crop = TF.resized_crop(
            image, top, left, height, width, [size, size], InterpolationMode.BICUBIC
        )
        flipped = _happens(0.5)
        if flipped:
            crop = TF.hflip(crop)
        w, h = image.size
        return crop, (left / w, top / h, (left + width) / w, (top + height) / h), flipped

    def _colour(self, crop: Image.Image, blur: float, solarize: float) -> Image.Image:
        if _happens(0.8):
            crop = _JITTER(crop)
        if _happens(0.2):
            crop = TF.rgb_to_grayscale(crop, num_output_channels=3)
        if _happens(blur):
            scale = self.global_size / 224 if self.blur_scale is None else self.blur_scale
            crop = _blur(crop, float(torch.empty(1).uniform_(0.1, 2.0)) * scale)
        if _happens(solarize):
            crop = TF.solarize(crop, 128)
        return crop


def _happens(p: float) -> bool:
    return bool(torch.rand(1) < p)


def _blur(image: Image.Image, radius: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


def normalize(images: Tensor) -> Tensor:
    """Turn uint8 images ``(..., 3, H, W)`` into floats, normalised by ImageNet's statistics."""
    mean, std = _statistics(images.device)
    return (images.float() / 255 - mean) / std


@functools.cache  # moving them to an accelerator in every step would make the host wait
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
    return mean, std


def resize_for_evaluation(image: Image.Image, size: int, *, crop: bool = True) -> Tensor:
    """Return an image as a uint8 tensor ``(3, size, size)``, the same each time.

    Args:
        image: RGB.
        size: pixels of a side.
        crop: resize the shorter side to size * 256 / 224 and cut out the centre, as DINO's
            evaluation does; False squeezes the whole image into the square.
    """
    if crop:
        image = TF.resize(image, [round(size * 256 / 224)], InterpolationMode.BICUBIC)
        image = TF.center_crop(image, [size])
    else:
        image = TF.resize(image, [size, size], InterpolationMode.BICUBIC)
    pixels: Tensor = TF.pil_to_tensor(image)
    return pixels


def collate_crops(samples: Sequence[Crops]) -> Crops:
    """Stack the crops of several images, view by view."""
    views = zip(*(sample.images for sample in samples), strict=True)
    return Crops(
        [torch.stack(view) for view in views],
        torch.stack([sample.boxes for sample in samples]),
        torch.stack([sample.flipped for sample in samples]),
    )
