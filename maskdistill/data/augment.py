"""DINO's multi-crop augmentation, which also hands over where each crop lies in its image."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from maskdistill.data.colour import colour_, colours_of
from maskdistill.data.draws import Draws, ViewRates, draw_views
from maskdistill.data.resampling import cut, cut_batch

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""ImageNet's colour statistics, by which every input is normalised."""

Picture = Image.Image | Tensor
"""An image to cut: a Pillow image, or a uint8 tensor ``(3, H, W)``."""


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

    >>> from maskdistill.data import Scenes
    >>> crops = MultiCrop(64, 32, local_crops=6)(Scenes(1, 96)[0][0])
    >>> [tuple(crop.shape) for crop in crops.images[:3]], tuple(crops.boxes.shape)
    ([(3, 64, 64), (3, 64, 64), (3, 32, 32)], (8, 4))

    Random resized crop (bicubic), mirror with probability 0.5, colour jitter (0.4, 0.4, 0.2, 0.1)
    with 0.8, grey with 0.2; blur of radius 0.1 to 2 pixels with 1.0, 0.1 and 0.5 on the first
    global, the second global and the local crops; solarisation with 0.2 on the second global one
    (Caron et al., 2021; blur after Grill et al., 2020). A crop depends on its image and the image's
    key alone (see `maskdistill.data.draws`), whether it is cut alone, in a batch or on a device.

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

    def __call__(self, image: Picture) -> Crops:
        """Return all views of one image; its key comes from torch's global generator."""
        key = torch.randint(torch.iinfo(torch.int64).max, (1,))
        crops = self.cut([image], key)
        return Crops([view[0] for view in crops.images], crops.boxes[0], crops.flipped[0])

    def draw(self, keys: Tensor, sizes: Tensor) -> Draws:
        """Draw how the images of these keys are cut and coloured.

        >>> transform = MultiCrop(64, 32, local_crops=6)
        >>> transform.draw(torch.tensor([5, 6]), torch.tensor([[48, 64], [96, 96]])).box.shape
        torch.Size([2, 8, 4])

        Args:
            keys: ``(B,)`` int64, from `maskdistill.data.draws.image_keys`.
            sizes: ``(B, 2)`` int64: height and width of each image in pixels.
        """
        return draw_views(keys, sizes, self._rates)

    def cut(self, images: Sequence[Picture], keys: Tensor) -> Crops:
        """Return all views of a batch of images of any sizes, on the CPU.

        >>> images = torch.zeros(2, 3, 48, 64, dtype=torch.uint8)
        >>> MultiCrop(32, 16, local_crops=2).cut(list(images), torch.tensor([5, 6])).images[2].shape
        torch.Size([2, 3, 16, 16])

        Args:
            images: B images.
            keys: ``(B,)`` int64, which decide everything random.

        Raises:
            ValueError: a tensor that is not uint8 ``(3, H, W)``, or an image without pixels.
        """
        pixels = [as_pixels(image) for image in images]
        sizes = torch.tensor([image.shape[1:] for image in pixels])
        draws = self.draw(keys, sizes)
        boxes, flips = draws.box.tolist(), draws.flip.tolist()
        views: list[Tensor] = []
        for some, size in self._groups:
            crops = torch.empty(
                some.stop - some.start, len(pixels), 3, size, size, dtype=torch.uint8
            )
            for i, image in enumerate(pixels):
                for j in range(some.start, some.stop):
                    cut(image, boxes[i][j], flips[i][j], size, crops[j - some.start, i])
            colour_(crops.flatten(0, 1), colours_of(draws, some))
            views += crops.unbind()
        return Crops(views, _shares(draws.box, sizes), draws.flip)

    def cut_resident(self, canvas: Tensor, sizes: Tensor, keys: Tensor) -> Crops:
        """Return all views of a batch of images that lie in a device's memory.

        Args:
            canvas: ``(B, H, W, 3)`` uint8; images that are smaller lie in the upper left corner.
            sizes: ``(B, 2)`` int64: height and width of each, on the CPU.
            keys: ``(B,)`` int64, on the CPU.

        Returns:
            The crops, boxes and flips on the canvas's device; the same as `cut`'s to about two grey
            levels.
        """
        draws, device = self.draw(keys, sizes), canvas.device
        boxes, flips = (_to(values, device) for values in (draws.box, draws.flip))
        views: list[Tensor] = []
        for some, size in self._groups:
            crops = cut_batch(canvas, boxes[:, some], flips[:, some], size)
            colour_(crops.flatten(0, 1), colours_of(draws, some))
            views += crops.unbind()
        return Crops(views, _to(_shares(draws.box, sizes), device), flips)

    @functools.cached_property
    def _rates(self) -> ViewRates:
        local = self.local_crops
        radius = self.global_size / 224 if self.blur_scale is None else self.blur_scale
        return ViewRates(
            scale=torch.tensor([self.global_scale] * 2 + [self.local_scale] * local),
            blur=torch.tensor([1.0, 0.1] + [0.5] * local),
            solarize=torch.tensor([0.0, 0.2] + [0.0] * local),
            radius=(0.1 * radius, 2.0 * radius),
        )

    @property
    def _groups(self) -> list[tuple[slice, int]]:
        """The views of each size, which are worked on together."""
        groups = [(slice(0, 2), self.global_size)]
        if self.local_crops:
            groups.append((slice(2, 2 + self.local_crops), self.local_size))
        return groups


def as_pixels(image: Picture) -> Tensor:
    """Return an image as a uint8 tensor ``(3, H, W)``, its channels side by side in memory.

    Raises:
        ValueError: a tensor that is not uint8 ``(3, H, W)``, or an image without pixels.
    """
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.dim() != 3 or len(image) != 3:
            raise ValueError(
                f"an image must be a uint8 tensor (3, H, W), not {image.dtype} "
                f"{tuple(image.shape)}; pass what was decoded, before it is normalised."
            )
        pixels = image
    else:
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        pixels = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
    if not pixels.numel():
        raise ValueError(f"an image must have pixels; this one is {tuple(pixels.shape)}.")
    return pixels


def _shares(box: Tensor, sizes: Tensor) -> Tensor:
    """Turn boxes in pixels (left, top, width, height) into edges as shares of the image."""
    edges = torch.cat([box[..., :2], box[..., :2] + box[..., 2:]], dim=-1)
    return edges / sizes.flip(-1).repeat(1, 2)[:, None]


def _to(values: Tensor, device: torch.device) -> Tensor:
    # From pinned memory the copy does not make the host wait.
    pinned = values.pin_memory() if device.type == "cuda" else values
    return pinned.to(device, non_blocking=True)


def normalize(images: Tensor) -> Tensor:
    """Turn uint8 images ``(..., 3, H, W)`` into floats, normalised by ImageNet's statistics."""
    shift, scale = _statistics(images.device)
    pixels = images.float()
    if pixels is images:  # floats already, which are not ours to change
        pixels = images.clone()
    return pixels.mul_(scale).add_(shift)


@functools.cache  # moving them to an accelerator in every step would make the host wait
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    return (-mean / std).float().to(device), (1 / (255 * std)).float().to(device)


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
