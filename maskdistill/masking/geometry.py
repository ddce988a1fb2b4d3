"""Masks that know where a crop lies in its image: one region for all views, and signals carried.

A crop's box is (left, top, right, bottom) as shares of the image's width and height; a flipped crop
was mirrored left to right after cutting. ``data.MultiCrop`` hands both over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from maskdistill.masking import constraints
from maskdistill.masking.base import Masker
from maskdistill.masking.context import MaskContext, full_precision

# Shares of a patch below this are rounding errors of float32, not area.
_DUST = 1e-4


@dataclass(frozen=True, repr=False)
class SceneMasker(Masker):
    """Hides one region of the image in every view that contains it.

    >>> import maskdistill as md
    >>> masker = md.SceneMasker(md.BlockMasker(0.4))
    >>> boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.5, 0.5]])  # one image, two views
    >>> flipped = torch.tensor([False, True])
    >>> first, second = masker(2, (7, 7), views=2, boxes=boxes, flipped=flipped)
    >>> bool((first.view(7, 7) == second.view(7, 7).flip(1)).all())
    True

    The region is drawn once per image, on a grid over the whole image, by any masker that needs no
    signal. A patch of a view is hidden where enough of its area lies in the region. How much of a
    view is hidden therefore varies. Within one step of a policy all views and both roles share the
    region: two ``SceneMasker`` with an equal ``masker`` and ``grid`` are one draw.

    Args:
        masker: draws the region.
        grid: rows and columns of the grid over the image on which it is drawn.
        cover: least share of a patch's area in the region for it to be hidden, in [0, 1]; 0 hides
            a patch that touches the region, 1 only one that lies in it entirely.
        views: ``"same"`` hides the region in every view; ``"complementary"`` hides the rest of the
            image in every second view of one size. Then with ``cover=1`` two global views never
            hide the same place, and with ``cover=0`` they never show the same place.

    The signals are ``boxes`` ``(B, 4)`` and ``flipped`` ``(B,)`` bool, which a policy passes on.

    Raises:
        ValueError: an argument out of range, a masker that needs signals, or misshapen signals.
    """

    masker: Masker
    grid: tuple[int, int] = (32, 32)
    cover: float = 0.5
    views: Literal["same", "complementary"] = "same"

    constraints = {
        "grid": constraints.sides,
        "cover": constraints.fixed_share,
        "views": constraints.one_of("same", "complementary"),
    }

    def check_parameters(self) -> None:
        if not isinstance(self.masker, Masker) or self.masker.needs:
            raise ValueError(
                "SceneMasker: masker must be a masker that needs no signal, for it draws on the "
                f"whole image; got {self.masker!r}."
            )

    @property
    def needs(self) -> frozenset[str]:
        """Where each crop lies, and whether it was mirrored."""
        return frozenset({"boxes", "flipped"})

    def draw(self, context: MaskContext) -> Tensor:
        boxes, flipped = _geometry(context)
        whole = context.replaced(batch=context.images, grid=self.grid, signals={}, views=1)
        scene = context.once(
            ("scene", self.masker, self.grid, context.images),
            lambda: self.masker.draw(whole),
        )
        if self.views == "same":
            rows = scene.repeat(context.views, 1)
        else:
            rows = torch.cat([~scene if v % 2 else scene for v in range(context.views)])
        region = rows.unflatten(1, self.grid).float()
        down, across = _overlaps(boxes, context.grid, self.grid)
        area = down.sum(dim=2)[:, :, None] * across.sum(dim=2)[:, None, :]
        # Nothing outside, or nothing inside, stays an exact zero in products of any precision.
        if self.cover > 0.5:
            outside = down @ (1 - region) @ across.transpose(1, 2)
            hidden = outside <= max(1 - self.cover, _DUST) * area
        else:
            inside = down @ region @ across.transpose(1, 2)
            hidden = inside >= max(self.cover, _DUST) * area
        return _unflip(hidden, flipped).flatten(1)


def carry_signal(
    signals: Sequence[Tensor],
    grids: Sequence[tuple[int, int]],
    boxes: Tensor,
    flipped: Tensor,
    box: Tensor,
    flip: Tensor,
    grid: tuple[int, int],
) -> Tensor:
    """Carry a signal of some views of an image onto another view of it, by place.

    >>> seen = torch.tensor([[0.0, 1.0, 2.0, 3.0]])                      # 2x2, of the whole image
    >>> whole = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]])
    >>> corner = torch.tensor([[0.5, 0.0, 1.0, 0.5]])
    >>> still = torch.tensor([[False]])
    >>> carry_signal([seen], [(2, 2)], whole, still, corner, still[:, 0], (1, 1))
    tensor([[1.]])

    Each patch of the new view gets the average of the signal over its area, over all views that
    show it. Where none does, it gets the average of the patches that are shown, so that nothing is
    claimed of it; a view that is not shown at all gets zeros.

    Args:
        signals: one tensor per source view, ``(B, N_v)`` or ``(B, heads, N_v)``, averaged over
            heads.
        grids: their patch grids.
        boxes: ``(B, V, 4)`` of the source views.
        flipped: ``(B, V)`` bool.
        box: ``(B, 4)`` of the view to carry to.
        flip: ``(B,)`` bool.
        grid: its patch grid, (H, W).

    Returns:
        ``(B, H * W)`` float32.

    Raises:
        ValueError: a signal that is not of floats, or does not fit its grid.
    """
    with full_precision(box.device):
        total = torch.zeros(len(box), *grid, dtype=torch.float32, device=box.device)
        shown = torch.zeros_like(total)
        for view, (signal, source) in enumerate(zip(signals, grids, strict=True)):
            number = signal.is_floating_point() or signal.dtype == torch.bool
            if not number or signal.ndim not in (2, 3) or signal.shape[-1] != source[0] * source[1]:
                raise ValueError(
                    "only one float per patch can be carried to another view, (B, N) or "
                    f"(B, heads, N) with N={source[0] * source[1]}, and no labels or vectors; "
                    f"got {tuple(signal.shape)} {signal.dtype}."
                )
            signal = signal.to(box.device)
            value = signal.float().mean(dim=1) if signal.ndim == 3 else signal.float()
            value = _unflip(value.unflatten(1, source), flipped[:, view])
            down, across = _overlaps(box, grid, source, boxes[:, view])
            # Per area of the image, so that views of different sizes count alike.
            size = (boxes[:, view, 2:] - boxes[:, view, :2]).prod(dim=1) / (source[0] * source[1])
            total += size[:, None, None] * (down @ value @ across.transpose(1, 2))
            shown += size[:, None, None] * down.sum(2)[:, :, None] * across.sum(2)[:, None, :]
        # A patch of this view is so large in the image.
        patch = (box[:, 2:] - box[:, :2]).prod(dim=1)[:, None, None] / (grid[0] * grid[1])
        known = shown > _DUST * patch
        value = torch.where(known, total / shown.clamp_min(torch.finfo(shown.dtype).tiny), 0.0)
        mean = value.sum(dim=(1, 2)) / known.sum(dim=(1, 2)).clamp_min(1)
        return _unflip(torch.where(known, value, mean[:, None, None]), flip).flatten(1)


def _overlaps(
    box: Tensor, grid: tuple[int, int], cells: tuple[int, int], inside: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Measure how far patches of a box overlap cells of another, along each side.

    Rectangles overlap by the product of what their sides do, so two small matrices say all:
    ``(B, H, h)`` and ``(B, W, w)``, in cells. ``inside`` is the box of the cells, by default the
    whole image.
    """
    matrices = []
    for side in (1, 0):  # rows lie along y, which is the box's second coordinate
        patches, count = grid[1 - side], cells[1 - side]
        ends = torch.linspace(0, 1, patches + 1, dtype=torch.float32, device=box.device)
        low, high = box[:, side, None], box[:, side + 2, None]
        edges = low + (high - low) * ends
        if inside is not None:
            start, end = inside[:, side, None], inside[:, side + 2, None]
            edges = (edges - start) / (end - start)
        edges = edges * count
        cell = torch.arange(count, device=box.device)
        upper = torch.minimum(edges[:, 1:, None], cell + 1)
        matrices.append((upper - torch.maximum(edges[:, :-1, None], cell)).clamp_min(0))
    return matrices[0], matrices[1]


def _unflip(values: Tensor, flipped: Tensor) -> Tensor:
    """Mirror the rows of ``(B, H, W)`` where ``flipped``; its own inverse."""
    return torch.where(flipped[:, None, None], values.flip(2), values)


def check_boxes(boxes: Tensor) -> None:
    """Refuse what is no box, where that can be seen without waiting for an accelerator."""
    if boxes.device.type != "cpu" or torch.compiler.is_compiling() or not boxes.numel():
        return
    start, end = boxes[..., :2], boxes[..., 2:]
    within = (boxes >= -1e-3) & (boxes <= 1 + 1e-3)  # NaN is not within
    if not (within.all() and (start < end).all()):
        worst = boxes.reshape(-1, 4)[~(within.all(-1) & (start < end).all(-1)).reshape(-1)][0]
        raise ValueError(
            "a box must be (left, top, right, bottom) as shares of the image's width and height, "
            f"in [0, 1] with left < right and top < bottom; got {worst.tolist()}. Divide pixels by "
            "the image's width and height."
        )


def _geometry(context: MaskContext) -> tuple[Tensor, Tensor]:
    boxes, flipped = context.signals["boxes"], context.signals["flipped"]
    if tuple(boxes.shape) != (context.batch, 4) or tuple(flipped.shape) != (context.batch,):
        raise ValueError(
            f"boxes must be (B, 4) and flipped (B,) with B={context.batch}, one row per row of "
            f"the mask; got {tuple(boxes.shape)} and {tuple(flipped.shape)}."
        )
    check_boxes(boxes)
    return boxes.to(context.device, torch.float32), flipped.to(context.device, torch.bool)
