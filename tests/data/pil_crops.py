"""The multi-crop pipeline on Pillow images, crop by crop: what the fast one is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from PIL import Image, ImageFilter
from torchvision.transforms import ColorJitter, InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as TF

from maskdistill.data import Crops, MultiCrop

JITTER = ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)


@dataclass
class PillowCrops:
    """facebookresearch/dino's DataAugmentationDINO, with boxes and counts of what was done."""

    like: MultiCrop
    done: dict[str, int] = field(
        default_factory=lambda: {"jitter": 0, "grey": 0, "blur": 0, "solarize": 0, "flip": 0}
    )

    def __call__(self, image: Image.Image) -> Crops:
        images, boxes, flips = [], [], []
        for view in range(2 + self.like.local_crops):
            whole = view < 2
            blur, solarize = ((1.0, 0.0), (0.1, 0.2), (0.5, 0.0))[min(view, 2)]
            size = self.like.global_size if whole else self.like.local_size
            scale = self.like.global_scale if whole else self.like.local_scale
            top, left, height, width = RandomResizedCrop.get_params(
                image, list(scale), [3 / 4, 4 / 3]
            )
            crop = TF.resized_crop(
                image, top, left, height, width, [size, size], InterpolationMode.BICUBIC
            )
            flips.append(self.happens("flip", 0.5))
            crop = TF.hflip(crop) if flips[-1] else crop
            images.append(TF.pil_to_tensor(self.colour(crop, blur, solarize)))
            w, h = image.size
            boxes.append((left / w, top / h, (left + width) / w, (top + height) / h))
        return Crops(images, torch.tensor(boxes), torch.tensor(flips))

    def colour(self, crop: Image.Image, blur: float, solarize: float) -> Image.Image:
        if self.happens("jitter", 0.8):
            crop = JITTER(crop)
        if self.happens("grey", 0.2):
            crop = TF.rgb_to_grayscale(crop, num_output_channels=3)
        if self.happens("blur", blur):
            radius = float(torch.empty(1).uniform_(0.1, 2.0)) * self.like.global_size / 224
            crop = crop.filter(ImageFilter.GaussianBlur(radius))
        if self.happens("solarize", solarize):
            crop = TF.solarize(crop, 128)
        return crop

    def happens(self, what: str, p: float) -> bool:
        happened = bool(torch.rand(1) < p)
        self.done[what] += happened
        return happened
