"""Multi-crop augmentation of DINO: how crops are sampled, cut out, resized and recoloured.

    crops = MultiCrop(64, 32, local_crops=6)(image)      # one image
    crops = transform.cut(images, image_keys(seed, epochs, indices))   # a batch

What is random about a crop is a hash of its address: seed, epoch, image, view, and which number of
the view it is. So a crop does not depend on what was sampled before it, in which process, or in
which batch. The hash is SplitMix64 (Steele, Lea and Flood, 2014), in integers, which every device
and version computes alike, always on the CPU.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

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
    with 0.8, grey with 0.2; blur of radius 0.1 to 2 pixels, at 224 pixels a side, with 1.0, 0.1 and
    0.5 on the first global, the second global and the local crops; solarisation with 0.2 on the
    second global one (Caron et al., 2021; blur after Grill et al., 2020). A crop depends on its
    image and the image's key alone, whether it is cut alone, in a batch or on a device.

    Args:
        global_size: pixels of the global crops' sides; 224 in the paper.
        local_size: pixels of the local crops' sides; 96 in the paper.
        local_crops: number of local crops.
        global_scale: least and greatest share of the image's area in a global crop.
        local_scale: the same for local crops.
    """

    global_size: int
    local_size: int
    local_crops: int = 8
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.4)

    def __call__(self, image: Picture) -> Crops:
        """Return all views of one image; its key comes from torch's global generator."""
        key = torch.randint(torch.iinfo(torch.int64).max, (1,))
        crops = self.cut([image], key)
        return Crops([view[0] for view in crops.images], crops.boxes[0], crops.flipped[0])

    def sample(self, keys: Tensor, sizes: Tensor) -> CropParameters:
        """Sample how the images of these keys are cut and coloured.

        >>> transform = MultiCrop(64, 32, local_crops=6)
        >>> transform.sample(torch.tensor([5, 6]), torch.tensor([[48, 64], [96, 96]])).box.shape
        torch.Size([2, 8, 4])

        Args:
            keys: ``(B,)`` int64, from `image_keys`.
            sizes: ``(B, 2)`` int64: height and width of each image in pixels.
        """
        return sample_crops(keys, sizes, self._distribution)

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
        parameters = self.sample(keys, sizes)
        boxes, flips = parameters.box.tolist(), parameters.flip.tolist()
        views: list[Tensor] = []
        for group, size in self._groups:
            crops = torch.empty(
                group.stop - group.start, len(pixels), 3, size, size, dtype=torch.uint8
            )
            for i, image in enumerate(pixels):
                for j in range(group.start, group.stop):
                    cut(image, boxes[i][j], flips[i][j], size, crops[j - group.start, i])
            colour_(crops.flatten(0, 1), parameters.stacked(group))
            views += crops.unbind()
        return Crops(views, _shares(parameters.box, sizes), parameters.flip)

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
        parameters, device = self.sample(keys, sizes), canvas.device
        boxes, flips = (to_device(x, device) for x in (parameters.box, parameters.flip))
        views: list[Tensor] = []
        for group, size in self._groups:
            crops = cut_batch(canvas, boxes[:, group], flips[:, group], size)
            colour_(crops.flatten(0, 1), parameters.stacked(group))
            views += crops.unbind()
        return Crops(views, to_device(_shares(parameters.box, sizes), device), flips)

    @functools.cached_property
    def _distribution(self) -> CropDistribution:
        local = self.local_crops
        radius = self.global_size / 224  # the paper's is of crops of 224 pixels
        return CropDistribution(
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


def _shares(box: Tensor, sizes: Tensor) -> Tensor:
    """Turn boxes in pixels (left, top, width, height) into edges as shares of the image."""
    edges = torch.cat([box[..., :2], box[..., :2] + box[..., 2:]], dim=-1)
    return edges / sizes.flip(-1).repeat(1, 2)[:, None]


# --- whole images


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


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Move a tensor from the CPU without making the host wait, where that can be."""
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
    if not crop:
        return as_pixels(image.resize((size, size), Image.Resampling.BICUBIC))
    short = round(size * 256 / 224)
    wide, high = (int(short * side / min(image.size)) for side in image.size)
    left, top = round((wide - size) / 2), round((high - size) / 2)
    image = image.resize((wide, high), Image.Resampling.BICUBIC)
    return as_pixels(image.crop((left, top, left + size, top + size)))


# --- parameters: what is random about a crop

RATIO = (3 / 4, 4 / 3)
"""Least and greatest width / height of a crop."""
JITTER = (0.4, 0.4, 0.2, 0.1)
"""How far brightness, contrast and saturation stray from 1, and the hue from 0, in turns."""
FLIP_RATE, JITTER_RATE, GREY_RATE = 0.5, 0.8, 0.2
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

_ATTEMPTS = 10
# The numbers of one view: area and ratio of each attempt, place (2), mirror, jitter, its four
# factors, its order, grey, blur, its radius, solarisation.
_PER_VIEW = 2 * _ATTEMPTS + 13
_STRIDE = 64  # between views, so that another number may be added without moving the others
_ORDERS = torch.tensor(list(itertools.permutations(range(4))), dtype=torch.uint8)

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FACTORS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that differs wherever any part differs.

    >>> derive_seed(0, "masks", 1) == derive_seed(0, "masks", 1) != derive_seed(0, "masks", 2)
    True
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def image_keys(seed: int, epochs: Tensor, indices: Tensor) -> Tensor:
    """Return the key of each image in its epoch: all that its crops depend on.

    >>> image_keys(0, torch.tensor([0, 0, 1]), torch.tensor([3, 4, 3])).unique().shape
    torch.Size([3])

    Args:
        seed: of the run.
        epochs: ``(B,)`` int64.
        indices: ``(B,)`` int64, of the images in their data set.

    Returns:
        ``(B,)`` int64.
    """
    of_epoch = _mix(derive_seed(seed, "crops") + (epochs + 1) * _GOLDEN)
    return _mix(of_epoch + (indices + 1) * _GOLDEN)


class CropParameters(NamedTuple):
    """How the V views of B images are cut and coloured. All tensors lie on the CPU.

    Attributes:
        box: ``(B, V, 4)`` int64: left, top, width and height in pixels of the image.
        flip: ``(B, V)`` bool: mirrored left to right.
        jitter: ``(B, V)`` bool: whether the colours are jittered.
        factors: ``(B, V, 4)`` float32: of brightness, contrast and saturation; and the hue's shift
            in turns.
        order: ``(B, V, 4)`` uint8: which of those four comes first, second, third and last.
        grey: ``(B, V)`` bool.
        sigma: ``(B, V)`` float32: the blur's standard deviation in pixels of the crop; 0 is none.
        solarize: ``(B, V)`` bool.
    """

    box: Tensor
    flip: Tensor
    jitter: Tensor
    factors: Tensor
    order: Tensor
    grey: Tensor
    sigma: Tensor
    solarize: Tensor

    def stacked(self, views: slice) -> CropParameters:
        """Return those of some views, ``(V * B, ...)``: all images' first view, then the second."""
        return CropParameters(*(x[:, views].transpose(0, 1).flatten(0, 1) for x in self))

    def rows(self, rows: Tensor) -> CropParameters:
        """Return some rows."""
        return CropParameters(*(x[rows] for x in self))


class CropDistribution(NamedTuple):
    """What the parameters of V views are sampled from, besides the constants above.

    Attributes:
        scale: ``(V, 2)``: least and greatest share of the image's area.
        blur: ``(V,)``: probability of blur.
        solarize: ``(V,)``: probability of solarisation.
        radius: least and greatest standard deviation of the blur, in pixels.
    """

    scale: Tensor
    blur: Tensor
    solarize: Tensor
    radius: tuple[float, float]


def sample_crops(keys: Tensor, sizes: Tensor, distribution: CropDistribution) -> CropParameters:
    """Sample the parameters of every view of a batch of images.

    Args:
        keys: ``(B,)`` int64, from `image_keys`.
        sizes: ``(B, 2)`` int64: height and width of each image in pixels.
        distribution: of each view.
    """
    views = len(distribution.blur)
    lanes = _STRIDE * torch.arange(views)[:, None] + torch.arange(_PER_VIEW) + 1
    u = _uniform(_mix(keys[:, None, None] + lanes * _GOLDEN))  # (B, V, numbers)
    areas, ratios, rest = u.split([_ATTEMPTS, _ATTEMPTS, _PER_VIEW - 2 * _ATTEMPTS], dim=-1)
    x, y, flip, jitter, *factors, order, grey, blur, radius, solarize = rest.unbind(-1)
    spread = torch.tensor(JITTER, dtype=torch.float64)
    shifts = (2 * torch.stack(factors, dim=-1) - 1) * spread
    shifts[..., :HUE] += 1
    low, high = distribution.radius
    return CropParameters(
        box=_boxes(areas, ratios, x, y, sizes, distribution.scale.double()),
        flip=flip < FLIP_RATE,
        jitter=jitter < JITTER_RATE,
        factors=shifts.float(),
        order=_ORDERS[(order * len(_ORDERS)).long()],
        grey=grey < GREY_RATE,
        sigma=((low + (high - low) * radius) * (blur < distribution.blur)).float(),
        solarize=solarize < distribution.solarize,
    )


def _boxes(
    areas: Tensor, ratios: Tensor, x: Tensor, y: Tensor, sizes: Tensor, scale: Tensor
) -> Tensor:
    """Choose boxes as torchvision's RandomResizedCrop does: ten attempts, then the centre."""
    height, width = sizes[:, None, None, 0], sizes[:, None, None, 1]  # (B, 1, 1)
    low, high = scale[:, None, 0], scale[:, None, 1]  # (V, 1)
    area = (height * width) * (low + (high - low) * areas)
    log_low, log_high = torch.tensor(RATIO, dtype=torch.float64).log().tolist()
    ratio = (log_low + (log_high - log_low) * ratios).exp()
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(dim=-1, keepdim=True)  # 0 if none fits: replaced below
    w, h = w.gather(-1, first)[..., 0], h.gather(-1, first)[..., 0]
    height, width = height[..., 0].double(), width[..., 0].double()
    left, top = (x * (width - w + 1)).floor(), (y * (height - h + 1)).floor()
    # An image so narrow that none fitted: all of it, but for what makes it narrower than RATIO.
    whole_w = torch.minimum(width, (height * RATIO[1]).round())
    whole_h = torch.minimum(height, (width / RATIO[0]).round())
    centre = torch.stack(
        [((width - whole_w) / 2).floor(), ((height - whole_h) / 2).floor(), whole_w, whole_h], -1
    )
    sampled = torch.stack([left, top, w, h], dim=-1)
    return torch.where(fits.any(dim=-1)[..., None], sampled, centre).long()


def _uniform(bits: Tensor) -> Tensor:
    """Turn 64 random bits into a number in [0, 1)."""
    return _shift(bits, 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's output function; the products wrap."""
    x = (x ^ _shift(x, 30)) * _FACTORS[0]
    x = (x ^ _shift(x, 27)) * _FACTORS[1]
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    # torch has no unsigned shift: shift, and clear the copies of the sign.
    return (x >> by) & ((1 << (64 - by)) - 1)


# --- resampling: boxes of images to crops of one size

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


# --- colours

_LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # Pillow's weights; sums of them are exact
_CHUNK = {"cpu": 1 << 17, "other": 1 << 26}  # numbers at once: what a core's cache holds; 256 MiB
_ALONE = 1 << 16  # numbers of a crop that is blurred by itself on a CPU
_PASSES = 3  # Pillow's blur is three box blurs
_NEGLIGIBLE = 4e-3  # weight of the blur's tails that no grey level notices


def colour_(images: Tensor, parameters: CropParameters) -> Tensor:
    """Colour crops in place.

    Args:
        images: ``(N, 3, H, W)`` uint8, contiguous, on any device.
        parameters: N rows, as `CropParameters.stacked` gives them; box and flip are not read.

    Returns:
        ``images``.
    """
    where_hue = (parameters.order == HUE).int().argmax(dim=1)
    # Sorted by where the hue's turn comes, the crops that turn theirs lie together at every step.
    # Next come those without jitter, and last those that keep all their parameters.
    place = torch.where(parameters.jitter, where_hue, 4)
    place[~(parameters.jitter | parameters.grey | (parameters.sigma > 0))] = 5
    by_blur = parameters.sigma.argsort(stable=True)  # kernels of a length together
    place, rows = place[by_blur].sort(stable=True)
    rows = by_blur[rows]
    worked = int((place < 5).sum())
    places = place.tolist()
    taps = torch.zeros(len(rows), 1)
    blurred = parameters.sigma.nonzero()[:, 0]
    if len(blurred):
        sides = blur_taps(parameters.sigma[blurred].double()).float()
        taps = sides.new_zeros(len(rows), sides.shape[1])
        taps[blurred] = sides
    chunk = max(1, _CHUNK["cpu" if images.device.type == "cpu" else "other"] // images[0].numel())
    for start in range(0, worked, chunk):
        stop = min(start + chunk, worked)
        some = rows[start:stop]
        x = _take(images, some).float()
        work = parameters.rows(some)
        jittered = int(work.jitter.sum())
        if jittered:
            _jitter(x[:jittered], work, places[start : start + jittered])
        if len(grey := work.grey.nonzero()[:, 0]):
            _put(x, grey, luma(_take(x, grey)).expand(-1, 3, -1, -1))
        if len(blurred := work.sigma.nonzero()[:, 0]):
            _put(x, blurred, blur(_take(x, blurred), taps[some[blurred]]))
        _put(images, some, _to_bytes(x))
    if len(some := parameters.solarize.nonzero()[:, 0]):
        x = _take(images, some)
        _put(images, some, x ^ ((x >> 7) * 255))  # 255 - x from 128 on
    return images


def luma(x: Tensor) -> Tensor:
    """Return the brightness of whole-numbered pixels, as whole numbers.

    Args:
        x: ``(n, 3, H, W)``.

    Returns:
        ``(n, 1, H, W)``.
    """
    red, green, blue = x.split(1, dim=1)
    grey: Tensor = red * _LUMA[0]
    grey.add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])
    return grey.add_(0.5).floor_()


def _jitter(x: Tensor, parameters: CropParameters, place: list[int]) -> None:
    """Run the four operations on each crop in its own order; `place` is the hue's, ascending."""
    for turn in range(4):
        start, stop = bisect_left(place, turn), bisect_left(place, turn + 1)
        for rows in (slice(0, start), slice(stop, len(x))):
            if rows.start < rows.stop:
                operation = parameters.order[rows, turn].long()
                factor = parameters.factors[rows].gather(1, operation[:, None])[:, 0]
                blend_(x[rows], operation, factor)
        if start < stop:
            rotate_hue_(x[start:stop], parameters.factors[start:stop, HUE])


def blend_(x: Tensor, operation: Tensor, factor: Tensor) -> None:
    """Change brightness, contrast or saturation, in place: blend with black, a grey, or the greys.

    Args:
        x: ``(n, 3, H, W)`` whole numbers from 0 to 255.
        operation: ``(n,)``: which of the three, on the CPU.
        factor: ``(n,)``: the share of ``x``, 0 or more; 1 changes nothing. On the CPU.
    """
    weights = _per_crop(factor, x)
    kinds = set(operation.tolist())
    if kinds & {CONTRAST, SATURATION}:
        grey = luma(x)
        if CONTRAST in kinds:
            # Sums of rows are whole and below 2^24, so exact; a sum of all might not be.
            total = grey.sum(dim=-1, keepdim=True).double().sum(dim=-2, keepdim=True)
            mean = (total / grey[0].numel()).add_(0.5).floor_().float()
            if len(kinds) > 1:
                mean *= _per_crop((operation == CONTRAST).float(), x)
        if kinds == {CONTRAST}:
            grey = mean
        elif kinds != {SATURATION}:
            grey *= _per_crop((operation == SATURATION).float(), x)
            if CONTRAST in kinds:
                grey += mean
        x.sub_(grey).mul_(weights).add_(grey)
    else:
        x.mul_(weights)
    if float(factor.max()) > 1:  # else it lies between the two
        x.clamp_(0, 255)
    x.floor_()  # Pillow cuts off what is behind the point


def rotate_hue_(x: Tensor, turns: Tensor) -> None:
    """Turn the hue of HSV in place; value and saturation stay.

    With the hue p in sixths of a turn from cyan, red is least + chroma * clamp(abs(p) - 1, 0, 1),
    and green and blue are greatest - chroma * clamp(abs(p ± 1) - 1, 0, 1). Conversely, abs(p) is
    2 - (green + blue - red - least) / chroma, and the sign is that of blue - green: no branches.

    Args:
        x: ``(n, 3, H, W)`` whole numbers from 0 to 255.
        turns: ``(n,)``, from -0.5 to 0.5.
    """
    red, green, blue = x.split(1, dim=1)
    least = torch.minimum(torch.minimum(red, green), blue)
    greatest = torch.maximum(torch.maximum(red, green), blue)
    chroma = greatest - least
    p = (green + blue).sub_(red).sub_(least).div_(chroma.clamp(min=1))
    p = torch.rsub(p, 2).copysign_(blue - green).add_(_per_crop(6 * turns, x))
    p.sub_(p.div(6).round_(), alpha=6)  # back into [-3, 3]
    torch.abs(p, out=red)
    torch.add(p, 1, out=green).abs_()
    torch.sub(p, 1, out=blue).abs_()
    x.clamp_(1, 2).mul_(chroma)
    red.add_(least.sub_(chroma))
    greatest.add_(chroma)
    torch.sub(greatest, green, out=green)
    torch.sub(greatest, blue, out=blue)
    x.add_(0.5).floor_()


def blur(x: Tensor, taps: Tensor) -> Tensor:
    """Blur crops by kernels that are symmetric and separable, continuing the edges outwards.

    Args:
        x: ``(n, 3, H, W)``.
        taps: ``(n, R + 1)``, from `blur_taps`.

    Returns:
        ``(n, 3, H, W)``, rounded to whole numbers.
    """
    # Alone, a crop fits the cache, has no more taps than it needs, and takes them as plain numbers.
    alone = x.device.type == "cpu" and x[0].numel() >= _ALONE
    if alone and len(x) > 1:
        return torch.cat([blur(*one) for one in zip(x.split(1), taps.split(1), strict=True)])
    reach = int(taps.any(dim=0).sum()) - 1
    weights: list[Any] = [_per_crop(tap, x) for tap in taps[:, : reach + 1].unbind(dim=1)]
    if alone:
        weights = taps[0, : reach + 1].tolist()
    for dim in (-1, -2):
        size = x.shape[dim]
        padding = (reach, reach, 0, 0) if dim == -1 else (0, 0, reach, reach)
        wide = F.pad(x, padding, mode="replicate")
        x = wide.narrow(dim, reach, size) * weights[0]
        pair = torch.empty_like(x)
        for i in range(1, reach + 1):
            before, after = (wide.narrow(dim, reach + side, size) for side in (-i, i))
            torch.add(before, after, out=pair)
            if alone:
                x.add_(pair, alpha=weights[i])
            else:
                x.add_(pair.mul_(weights[i]))
    return x.add_(0.5).floor_()


def blur_taps(sigma: Tensor) -> Tensor:
    """Return one side of the kernel that Pillow's GaussianBlur makes of three box blurs.

    Its variance is sigma squared, also where a Gaussian would fall between the pixels. Tails that
    no grey level shows are dropped.

    >>> taps = blur_taps(torch.tensor([1.0], dtype=torch.float64))
    >>> [round(tap, 3) for tap in taps[0].tolist()]
    [0.407, 0.236, 0.056, 0.005]

    Args:
        sigma: ``(n,)`` float64, more than 0.

    Returns:
        ``(n, R + 1)``: the middle tap, the one beside it, and so on, up to the last that any needs.
    """
    variance = sigma**2 / _PASSES
    inner = (((12 * variance + 1).sqrt() - 1) / 2).floor()  # whole taps on each side of the box
    edge = (2 * inner + 1) * (inner * (inner + 1) - 3 * variance)
    edge = edge / (6 * (variance - (inner + 1) ** 2))  # the weight of one more, in parts of a tap
    reach = int(inner.max()) + 1
    at = torch.arange(-reach, reach + 1).abs()
    box = (inner[:, None] - at + 1).clamp(0, 1) + edge[:, None] * (at == inner[:, None] + 1)
    box = box / (2 * (inner + edge) + 1)[:, None]
    kernel = box
    for _ in range(_PASSES - 1):  # each kernel with its own box: a group per row
        kernel = F.conv1d(kernel[None], box[:, None], padding=2 * reach, groups=len(box))[0]
    taps = kernel[:, kernel.shape[1] // 2 :]
    tails = taps.flip(1).cumsum(1).flip(1)
    taps = taps * (2 * tails > _NEGLIGIBLE)
    taps = taps[:, : int((taps > 0).any(dim=0).sum())]
    return taps / (2 * taps.sum(dim=1, keepdim=True) - taps[:, :1])


def _per_crop(values: Tensor, x: Tensor) -> Tensor:
    """Move one number per crop to the crops' device, shaped to work on them."""
    return values.to(x.device, non_blocking=True).view(-1, 1, 1, 1)


def _take(x: Tensor, rows: Tensor) -> Tensor:
    if len(rows) == 1:  # large crops come alone: a slice, which is no copy
        return x[int(rows) : int(rows) + 1]
    return x.index_select(0, rows.to(x.device, non_blocking=True))


def _put(x: Tensor, rows: Tensor, values: Tensor) -> None:
    if len(rows) <= 8:  # copies of whole crops
        for row, value in zip(rows.tolist(), values, strict=True):
            x[row] = value
    else:
        x.index_copy_(0, rows.to(x.device, non_blocking=True), values)


def _to_bytes(x: Tensor) -> Tensor:
    # On a CPU, by way of int16 it is four times as fast.
    return x.to(torch.int16).to(torch.uint8) if x.device.type == "cpu" else x.to(torch.uint8)
