"""The random numbers of augmentation: drawn apart from being used, and by no generator.

A number is a hash of its address: seed, epoch, image, view, and which number of the view it is. So
a crop does not depend on what was drawn before it, in which process, or in which batch, and a whole
batch is drawn at once. The hash is SplitMix64 (Steele, Lea and Flood, 2014), in integers, which
every device and version computes alike; all draws are made on the CPU.
"""

from __future__ import annotations

import hashlib
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

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


class Draws(NamedTuple):
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


class ViewRates(NamedTuple):
    """What is drawn for each of V views.

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


def draw_views(keys: Tensor, sizes: Tensor, rates: ViewRates) -> Draws:
    """Draw every view of a batch of images.

    >>> rates = ViewRates(torch.tensor([[0.4, 1.0]]), torch.ones(1), torch.zeros(1), (0.1, 2.0))
    >>> draws = draw_views(torch.arange(5), torch.tensor([[375, 500]] * 5), rates)
    >>> draws.box.shape, draws.sigma.shape
    (torch.Size([5, 1, 4]), torch.Size([5, 1]))

    Args:
        keys: ``(B,)`` int64, from `image_keys`.
        sizes: ``(B, 2)`` int64: height and width of each image in pixels.
        rates: what to draw for each view.
    """
    views = len(rates.blur)
    lanes = _STRIDE * torch.arange(views)[:, None] + torch.arange(_PER_VIEW) + 1
    u = _uniform(_mix(keys[:, None, None] + lanes * _GOLDEN))  # (B, V, numbers)
    areas, ratios, rest = u.split([_ATTEMPTS, _ATTEMPTS, _PER_VIEW - 2 * _ATTEMPTS], dim=-1)
    x, y, flip, jitter, *factors, order, grey, blur, radius, solarize = rest.unbind(-1)
    spread = torch.tensor(JITTER, dtype=torch.float64)
    shifts = (2 * torch.stack(factors, dim=-1) - 1) * spread
    shifts[..., :HUE] += 1
    low, high = rates.radius
    return Draws(
        box=_boxes(areas, ratios, x, y, sizes, rates.scale.double()),
        flip=flip < FLIP_RATE,
        jitter=jitter < JITTER_RATE,
        factors=shifts.float(),
        order=_ORDERS[(order * len(_ORDERS)).long()],
        grey=grey < GREY_RATE,
        sigma=((low + (high - low) * radius) * (blur < rates.blur)).float(),
        solarize=solarize < rates.solarize,
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
    drawn = torch.stack([left, top, w, h], dim=-1)
    return torch.where(fits.any(dim=-1)[..., None], drawn, centre).long()


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
