"""Colour jitter, grey, blur and solarisation of many crops at once, each with its own numbers.

Pixels are kept as whole numbers in float32 and cut to them after every operation, as Pillow does.
Brightness, contrast, saturation, grey and solarisation are Pillow's to the last bit. The hue is
turned without Pillow's passage through 8 bits of hue and saturation, and the blur, whose kernel is
Pillow's, is rounded once instead of six times.

A crop's result is the same bit by bit whatever its neighbours in the batch are, and however many
threads work: every pixel goes through the same operations in the same order, sums over pixels are
sums of whole numbers, and there are no matrix products.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maskdistill.data.draws import CONTRAST, HUE, SATURATION, Draws

_LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # Pillow's weights; sums of them are exact
_CHUNK = {"cpu": 1 << 17, "other": 1 << 26}  # numbers at once: what a core's cache holds; 256 MiB
_ALONE = 1 << 16  # numbers of a crop that is blurred by itself on a CPU
_PASSES = 3  # Pillow's blur is three box blurs
_NEGLIGIBLE = 4e-3  # weight of the blur's tails that no grey level notices


class Colours(NamedTuple):
    """The part of `Draws` that colours N crops, row by row, on the CPU."""

    jitter: Tensor
    factors: Tensor
    order: Tensor
    grey: Tensor
    sigma: Tensor
    solarize: Tensor

    def of(self, rows: Tensor) -> Colours:
        """Return some rows."""
        return Colours(*(values[rows] for values in self))


def colours_of(draws: Draws, views: slice) -> Colours:
    """Return the colours of some views, ``(V * B, ...)``, the batch within the views."""
    fields = (draws.jitter, draws.factors, draws.order, draws.grey, draws.sigma, draws.solarize)
    return Colours(*(values[:, views].transpose(0, 1).flatten(0, 1) for values in fields))


def colour_(images: Tensor, colours: Colours) -> Tensor:
    """Colour crops in place.

    >>> crops = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    >>> halves = torch.tensor([[0.5, 1.0, 1.0, 0.0]] * 2)
    >>> order = torch.arange(4, dtype=torch.uint8).repeat(2, 1)
    >>> first, none = torch.tensor([True, False]), torch.tensor([False, False])
    >>> colour_(crops, Colours(first, halves, order, none, torch.zeros(2), none))[:, 0, 0, 0]
    tensor([ 50, 100], dtype=torch.uint8)

    Args:
        images: ``(N, 3, H, W)`` uint8, contiguous, on any device.
        colours: N rows.

    Returns:
        ``images``.
    """
    where_hue = (colours.order == HUE).int().argmax(dim=1)
    # Sorted by where the hue's turn comes, the crops that turn theirs lie together at every step.
    # Next come those without jitter, and last those that keep all their colours.
    place = torch.where(colours.jitter, where_hue, 4)
    place[~(colours.jitter | colours.grey | (colours.sigma > 0))] = 5
    by_blur = colours.sigma.argsort(stable=True)  # kernels of a length together
    place, rows = place[by_blur].sort(stable=True)
    rows = by_blur[rows]
    worked = int((place < 5).sum())
    places = place.tolist()
    taps = torch.zeros(len(rows), 1)
    blurred = colours.sigma.nonzero()[:, 0]
    if len(blurred):
        sides = blur_taps(colours.sigma[blurred].double()).float()
        taps = sides.new_zeros(len(rows), sides.shape[1])
        taps[blurred] = sides
    chunk = max(1, _CHUNK["cpu" if images.device.type == "cpu" else "other"] // images[0].numel())
    for start in range(0, worked, chunk):
        stop = min(start + chunk, worked)
        some = rows[start:stop]
        x = _take(images, some).float()
        work = colours.of(some)
        jittered = int(work.jitter.sum())
        if jittered:
            _jitter(x[:jittered], work, places[start : start + jittered])
        if len(grey := work.grey.nonzero()[:, 0]):
            _put(x, grey, luma(_take(x, grey)).expand(-1, 3, -1, -1))
        if len(blurred := work.sigma.nonzero()[:, 0]):
            _put(x, blurred, blur(_take(x, blurred), taps[some[blurred]]))
        _put(images, some, _to_bytes(x))
    if len(some := colours.solarize.nonzero()[:, 0]):
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


def _jitter(x: Tensor, colours: Colours, place: list[int]) -> None:
    """Run the four operations on each crop in its own order; `place` is the hue's, ascending."""
    for turn in range(4):
        start, stop = bisect_left(place, turn), bisect_left(place, turn + 1)
        for rows in (slice(0, start), slice(stop, len(x))):
            if rows.start < rows.stop:
                operation = colours.order[rows, turn].long()
                factor = colours.factors[rows].gather(1, operation[:, None])[:, 0]
                blend_(x[rows], operation, factor)
        if start < stop:
            rotate_hue_(x[start:stop], colours.factors[start:stop, HUE])


def blend_(x: Tensor, operation: Tensor, factor: Tensor) -> None:
    """Change brightness, contrast or saturation, in place: blend with black, a grey, or the greys.

    Args:
        x: ``(n, 3, H, W)`` whole numbers from 0 to 255.
        operation: ``(n,)``: which of the three, on the CPU.
        factor: ``(n,)``: the share of ``x``, 0 or more; 1 changes nothing. On the CPU.
    """
    weights = _rows(factor, x)
    kinds = set(operation.tolist())
    if kinds & {CONTRAST, SATURATION}:
        grey = luma(x)
        if CONTRAST in kinds:
            # Sums of rows are whole and below 2^24, so exact; a sum of all might not be.
            total = grey.sum(dim=-1, keepdim=True).double().sum(dim=-2, keepdim=True)
            mean = (total / grey[0].numel()).add_(0.5).floor_().float()
            if len(kinds) > 1:
                mean *= _rows((operation == CONTRAST).float(), x)
        if kinds == {CONTRAST}:
            grey = mean
        elif kinds != {SATURATION}:
            grey *= _rows((operation == SATURATION).float(), x)
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
    p = torch.rsub(p, 2).copysign_(blue - green).add_(_rows(6 * turns, x))
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
    weights: list[Any] = [_rows(tap, x) for tap in taps[:, : reach + 1].unbind(dim=1)]
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


def _rows(values: Tensor, x: Tensor) -> Tensor:
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
