"""Cutting crops out of images and resizing them, as Pillow's bicubic filter does.

Two ways to the same picture: one crop at a time by torch's own kernel for 8-bit images, which is
the fastest on a CPU, and all crops of a batch at once by matrix products, for an accelerator. They
differ by a grey level or two.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_MEMORY = 1 << 28  # bytes of intermediate results at once


def cut(image: Tensor, box: list[int], flip: bool, size: int, out: Tensor) -> None:
    """Cut one crop out of an 8-bit image on the CPU and resize it.

    >>> out = torch.empty(3, 4, 4, dtype=torch.uint8)
    >>> cut(torch.full((3, 9, 16), 7, dtype=torch.uint8), [2, 0, 8, 8], True, 4, out)
    >>> out.unique()
    tensor([7], dtype=torch.uint8)

    Args:
        image: ``(3, H, W)`` uint8; fastest when its channels lie together in memory, as decoders
            put them.
        box: left, top, width and height of the crop in pixels.
        flip: mirror it left to right.
        size: pixels of a side of the result.
        out: ``(3, size, size)`` uint8, where to put it.
    """
    left, top, width, height = box
    crop = image[None, :, top : top + height, left : left + width]
    if (height, width) != (size, size):
        crop = F.interpolate(crop, size=(size, size), mode="bicubic", antialias=True)
    out.copy_(crop[0].flip(-1) if flip else crop[0])


def cut_batch(images: Tensor, boxes: Tensor, flips: Tensor, size: int) -> Tensor:
    """Cut V crops out of each of B images at once, on any device.

    >>> images = torch.full((2, 20, 30, 3), 7, dtype=torch.uint8)
    >>> boxes = torch.tensor([[[0, 0, 8, 8], [3, 2, 16, 12]]] * 2)
    >>> cut_batch(images, boxes, torch.zeros(2, 2, dtype=torch.bool), 4).shape
    torch.Size([2, 2, 3, 4, 4])

    Each axis is resampled by a matrix per crop: Pillow's filter (a cubic with a = -0.5, widened as
    far as the crop shrinks), whose taps outside the crop are dropped and the others scaled to a sum
    of one.

    Args:
        images: ``(B, H, W, 3)`` uint8; smaller images lie in the upper left corner.
        boxes: ``(B, V, 4)`` integers: left, top, width and height in pixels.
        flips: ``(B, V)`` bool.
        size: pixels of a side of the results.

    Returns:
        ``(V, B, 3, size, size)`` uint8.
    """
    batch, height, width, _ = images.shape
    views = boxes.shape[1]
    out = images.new_empty(views, batch, 3, size, size)
    # The image in float, the rows' products (and a copy of them in another order), the results.
    each = 4 * 3 * (height * width + 2 * height * views * size + 2 * views * size * size)
    chunk = max(1, _MEMORY // each)
    for start in range(0, batch, chunk):
        some = slice(start, start + chunk)
        box = boxes[some].to(torch.float32)
        across = _weights(box[..., 0], box[..., 2], width, size)
        across = torch.where(flips[some, :, None, None], across.flip(-2), across)
        down = _weights(box[..., 1], box[..., 3], height, size)
        x = images[some].permute(0, 3, 1, 2).float().flatten(1, 2)  # (b, 3 H, W)
        x = torch.bmm(x, across.flatten(1, 2).mT).round_().clamp_(0, 255)  # (b, 3 H, V S)
        x = x.view(-1, 3, height, views, size).permute(0, 3, 2, 1, 4).flatten(-2).flatten(0, 1)
        x = torch.bmm(down.flatten(0, 1), x).round_().clamp_(0, 255)  # (b V, S, 3 S)
        x = x.view(-1, views, size, 3, size).permute(1, 0, 3, 2, 4)
        out[:, some] = x.to(torch.uint8)
    return out


def _weights(first: Tensor, length: Tensor, inputs: int, outputs: int) -> Tensor:
    """Return the matrices that resample pixels ``first .. first + length`` of ``inputs``.

    Args:
        first: ``(B, V)``.
        length: ``(B, V)``.
        inputs: pixels of the image.
        outputs: pixels of the crop.

    Returns:
        ``(B, V, outputs, inputs)`` float32.
    """
    first, length = first[..., None, None], length[..., None, None]
    scale = length / outputs
    centre = (torch.arange(outputs, device=first.device)[:, None] + 0.5) * scale
    at = torch.arange(inputs, device=first.device) - first + 0.5  # in the crop's own pixels
    weights = _cubic((at - centre) / scale.clamp(min=1))
    weights = weights * ((at > 0) & (at < length))
    return weights / weights.sum(dim=-1, keepdim=True)


def _cubic(x: Tensor) -> Tensor:
    """Evaluate the cubic convolution kernel with a = -0.5 (Keys, 1981)."""
    x = x.abs().clamp(max=2)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, far)
