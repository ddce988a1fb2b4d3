"""Figures of what is hidden: the views of a policy, and the draws of a masker."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from maskdistill.masking import Masker
from maskdistill.plotting.pixels import masked_pixels
from maskdistill.plotting.style import (
    BLUE,
    DPI,
    ORANGE,
    PAGE,
    accent,
    bare,
    grey,
    inches,
    ink,
    new_figure,
    wrapped,
)
from maskdistill.policies import ViewMasks, ViewPolicy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANEL = 0.82
"""Inches of a view's side."""
_WHOLE = 2.3
"""Views' sides that the whole image is wide."""


def plot_view_masks(
    image: Tensor,
    crops: Sequence[Tensor],
    masks: ViewMasks,
    policy: ViewPolicy,
    patch_size: int,
    *,
    boxes: Tensor | None = None,
) -> Figure:
    """Plot all views of one image as each role sees them under a policy.

    >>> figure = plot_view_masks(image, crops, masks, policy, 8, boxes=boxes)  # doctest: +SKIP
    >>> figure.savefig("masks.png")  # doctest: +SKIP

    Hidden patches are striped. With boxes the whole image shows where each crop lies: global ones
    with a blue line, local ones with an orange dashed one, and their numbers. More views than a
    page is wide, six, take several rows per role.

    Args:
        image: ``(3, H, W)`` uint8, the whole image.
        crops: ``(1, 3, h, w)`` uint8, the views of this one image, global crops first.
        masks: drawn for these crops.
        policy: that drew them, for the caption.
        patch_size: pixels of a side of a patch.
        boxes: ``(1, V, 4)`` floats, left, top, right, bottom of each crop as shares of the image's
            width and height, as ``MultiCrop`` gives them.

    Raises:
        ValueError: crops or masks of no or several images, boxes of another shape, a mask or crop
            that does not fit the patches.
    """
    _check_one_image(crops, masks)
    if boxes is not None and tuple(boxes.shape) != (1, len(crops), 4):
        raise ValueError(
            f"boxes must be (1, V, 4) = (1, {len(crops)}, 4), one per crop; got "
            f"{tuple(boxes.shape)}."
        )
    lines = -(-len(crops) // int(PAGE / _PANEL - _WHOLE))
    columns = -(-len(crops) // lines)
    width = _PANEL * (columns + _WHOLE)
    said = wrapped(_masked_cells(policy), width, 8)
    height = 2 * _PANEL + 0.62 + (lines - 1) * (2 * _PANEL + 0.68)
    figure = new_figure(width, height + 0.14 * said.count("\n"))
    places = figure.add_gridspec(2 * lines, columns + 1, width_ratios=[_WHOLE, *[1] * columns])
    whole = bare(figure.add_subplot(places[:, 0]))
    whole.imshow(_sharp(image, None, (1, 1), _WHOLE))
    whole.set_title("image" if boxes is None else "image and its crops", fontsize=7.5, pad=3)
    if boxes is not None:
        _outline_crops(whole, boxes[0], policy.global_crops)
    for row, (role, views) in enumerate([("student", masks.student), ("teacher", masks.teacher)]):
        for view, crop in enumerate(crops):
            line, column = divmod(view, columns)
            axis = bare(figure.add_subplot(places[row * lines + line, column + 1]))
            axis.set_box_aspect(1)
            if column == 0:
                axis.set_ylabel(f"{role} sees", fontsize=7.5, labelpad=3)
            if row == 0 or lines > 1:
                axis.set_title(view_name(view, policy.global_crops), fontsize=7.5, pad=3)
            _view(axis, crop[0], views[view] if view < len(views) else "not seen", patch_size)
    figure.suptitle(said, fontsize=8)
    return figure


def _check_one_image(crops: Sequence[Tensor], masks: ViewMasks) -> None:
    if not crops:
        raise ValueError("crops must have at least one view; got none.")
    for view, crop in enumerate(crops):
        if crop.ndim != 4 or tuple(crop.shape[:2]) != (1, 3):
            raise ValueError(
                f"crops must be (1, 3, h, w), the views of one image; got {tuple(crop.shape)} for "
                f"view {view}. Of several images, give crop[i:i + 1] and the masks of the same."
            )
    for mask in (*masks.student, *masks.teacher):
        if mask is not None and len(mask) != 1:
            raise ValueError(f"masks must be those of one image; got {tuple(mask.shape)}.")


def _view(axis: Any, crop: Tensor, mask: Tensor | Literal["not seen"] | None, patch: int) -> None:
    """Plot what a role sees of a view."""
    if isinstance(mask, str):
        axis.text(
            0.5, 0.5, mask, ha="center", va="center", fontsize=7, color=grey(),
            transform=axis.transAxes,
        )  # fmt: skip
        return
    grid = (crop.shape[1] // patch, crop.shape[2] // patch)
    axis.imshow(_sharp(crop, None if mask is None else mask[0], grid, 1))
    share = "clean" if mask is None else f"{float(mask.float().mean()):.0%} hidden"
    axis.set_xlabel(share, fontsize=7, labelpad=2, color=grey() if mask is None else ink())


def _sharp(image: Tensor, mask: Tensor | None, grid: tuple[int, int], panels: float) -> Any:
    """Return the pixels of a panel, about twice as fine as it is shown."""
    return masked_pixels(image, mask, grid, size=int(2 * panels * _PANEL * DPI))


def _outline_crops(axis: Any, boxes: Tensor, global_crops: int) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import Normal, Stroke

    left, right = axis.get_xlim()
    bottom, top = axis.get_ylim()
    taken: list[tuple[float, float]] = []
    for view, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        is_global = view < global_crops
        colour = BLUE if is_global else ORANGE
        x0, x1 = (left + x * (right - left) for x in (x0, x1))
        y0, y1 = (top + y * (bottom - top) for y in (y0, y1))
        axis.add_patch(
            Rectangle(
                (x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.3,
                linestyle="-" if is_global else (0, (3, 1.2)), clip_on=False,
                path_effects=[Stroke(linewidth=2.3, foreground="black", alpha=0.7), Normal()],
            )
        )  # fmt: skip
        corners = [(x, y) for y in (y0, y1) for x in (x0, x1)]
        x, y = max(
            corners, key=lambda at: min((math.dist(at, other) for other in taken), default=0)
        )
        taken.append((x, y))
        number = view + 1 if is_global else view - global_crops + 1
        axis.annotate(
            str(number), (x, y), xytext=(3 if x == x0 else -3, -3 if y == y0 else 3),
            textcoords="offset points", fontsize=6, weight="bold",
            ha="left" if x == x0 else "right", va="top" if y == y0 else "bottom",
            color="white" if is_global else "black",
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.2},
        )  # fmt: skip


def plot_masker(
    masker: Masker,
    grid: tuple[int, int] = (14, 14),
    *,
    pictures: Tensor | None = None,
    samples: int = 5000,
    batch: int = 50,
    progress: float | Sequence[float] = 0.0,
    generator: torch.Generator | None = None,
    **signals: Tensor,
) -> Figure:
    """Plot what a masker hides: some draws, how often each patch is hidden, and how many are.

    >>> figure = plot_masker(md.BlockMasker(0.4))  # doctest: +SKIP
    >>> figure.savefig("blocks.png")  # doctest: +SKIP

    Without pictures eight draws are shown. With one picture they lie over it, and the picture and
    the first signal per patch take the places of two. With four, each has one draw below it.

    Args:
        masker: what to draw from.
        grid: patch rows and columns.
        pictures: ``(1, 3, H, W)`` or ``(4, 3, H, W)`` uint8, with sides that the grid divides.
        samples: draws for the map of how often each patch is hidden, and for the histogram.
        batch: of them, how many are drawn in one call; it matters to maskers whose images depend on
            each other, ``shared`` or with a ``Stratified`` ratio.
        progress: of training, in [0, 1]; or one for each draw that is shown, of which the last
            holds for the map and the histogram.
        generator: source of every random number; None is torch's global generator.
        **signals: what the masker needs, ``(S, ...)`` for S images, those of the pictures first;
            the samples take turns over them.

    Raises:
        ValueError: pictures or a progress of another number or shape, no samples.
    """
    if samples < 1 or batch < 1:
        raise ValueError(
            f"samples and batch must be at least 1 draw; got samples={samples!r} and "
            f"batch={batch!r}."
        )
    count = 0 if pictures is None else len(pictures)
    if count not in (0, 1, 4):
        raise ValueError(f"pictures must be 1 or 4 images, or None; got {count}.")
    per_patch = next((name for name, s in signals.items() if s.ndim == 2), None)
    before = {0: 0, 1: 1 if per_patch is None else 2, 4: 4}[count]
    moments = [progress] * (8 - before) if isinstance(progress, (int, float)) else list(progress)
    if len(moments) != 8 - before:
        raise ValueError(f"progress must be one number or {8 - before}; got {progress!r}.")

    def draw(start: int, rows: int, moment: float) -> Tensor:
        turn = torch.arange(start, start + rows)
        those: dict[str, Any] = {name: s[turn % len(s)] for name, s in signals.items()}
        return masker(rows, grid, generator=generator, progress=moment, **those).cpu()

    drawn = [draw(start, batch, moments[-1]) for start in range(0, samples, batch)]
    hidden = torch.cat(drawn)[:samples].float()
    # In one call where they share their progress: rows that depend on each other are to show it.
    same = len(set(moments)) == 1
    masks = (
        draw(0, len(moments), moments[0])
        if same
        else torch.cat([draw(i, 1, moment) for i, moment in enumerate(moments)])
    )

    sheet = _MaskerSheet(grid)
    for place in range(count):
        sheet.panel(place, _patched(pictures[place], grid), None, "image")  # type: ignore[index]
    if count == 1 and per_patch is not None:
        sheet.heat(1, signals[per_patch][0].cpu().float(), per_patch)
    for index, (mask, moment) in enumerate(zip(masks, moments, strict=True)):
        picture = None if pictures is None else pictures[index % count]
        title = f"{float(mask.float().mean()):.0%} hidden" if same else f"progress {moment:.1f}"
        sheet.panel(before + index, picture, mask, title)
    sheet.chance(hidden.mean(dim=0))
    sheet.histogram(hidden.mean(dim=1))
    return sheet.figure


_CHANCE = "P(hidden) of each patch"


class _MaskerSheet:
    """The page of ``plot_masker``, laid out in whole pixels so that patches are equally large."""

    def __init__(self, grid: tuple[int, int]) -> None:
        self.grid = grid
        self.gap, self.head, self.margin = 16, 34, 12
        patch = max(196 // max(grid), 1)
        self.cell = (patch * grid[0], patch * grid[1])
        # Cells narrower than their titles stand in columns as wide as those.
        self.column = max(self.cell[1], int(DPI * inches("100% hidden", 8)))
        patch = max(308 // max(grid), 1)
        self.map = (patch * grid[0], patch * grid[1])
        self.title = int(DPI * inches(_CHANCE, 9)) + 1
        # Beside the map are its bar, 24 pixels wide, and the bar's numbers; the title spans both.
        self.beside = max(self.map[1], self.title - self.gap - 24 - 40) + self.gap + 24 + 96
        histogram = int(DPI * inches("share hidden, 5,000 draws", 9)) + 14
        self.width = 2 * self.margin + max(4 * self.column + 3 * self.gap, self.beside + histogram)
        self.below = self.margin + 2 * (self.cell[0] + self.head) + self.gap + self.head
        self.height = self.below + max(self.map[0], 240) + self.margin
        self.figure = new_figure(self.width / DPI, self.height / DPI, "none")

    def _axis(self, left: int, top: int, width: int, height: int) -> Any:
        """Return an axis at a place in pixels from the upper left corner."""
        bottom = self.height - top - height
        return self.figure.add_axes(
            (left / self.width, bottom / self.height, width / self.width, height / self.height)
        )

    def _cell(self, place: int, title: str) -> Any:
        (height, width), (row, column) = self.cell, divmod(place, 4)
        left = self.margin + column * (self.column + self.gap) + (self.column - width) // 2
        top = self.margin + self.head + row * (height + self.head)
        axis = bare(self._axis(left, top, width, height))
        room = (self.column + self.gap) / DPI - 0.04
        axis.set_title(title, fontsize=8 * min(1, room / inches(title, 8)), pad=3)
        return axis

    def panel(self, place: int, picture: Tensor | None, mask: Tensor | None, title: str) -> None:
        """Plot an image and what is hidden of it in one of the eight places."""
        # As many pixels as the place has, so that stripes and edges are whole.
        pixels = masked_pixels(picture, mask, self.grid, size=self.cell)
        self._cell(place, title).imshow(pixels, aspect="auto")

    def heat(self, place: int, signal: Tensor, title: str) -> None:
        """Plot a signal per patch in one of the eight places, from its least to its greatest."""
        values = rearrange(signal, "(h w) -> h w", h=self.grid[0]).numpy()
        self._cell(place, title).imshow(
            values, cmap="inferno", interpolation="nearest", aspect="auto"
        )

    def chance(self, chance: Tensor) -> None:
        """Plot how often each patch is hidden, with its colour bar."""
        height, width = self.map
        axis = bare(self._axis(self.margin, self.below, width, height))
        spans = self.title > width + 4  # the title is over the bar too
        axis.set_title(_CHANCE, fontsize=9, pad=4, loc="left" if spans else "center")
        values = rearrange(chance, "(h w) -> h w", h=self.grid[0]).numpy()
        image = axis.imshow(
            values, cmap="viridis", vmin=0, vmax=1, interpolation="nearest", aspect="auto"
        )
        bar = self._axis(self.margin + width + self.gap, self.below, 24, max(height, 60))
        every = 1 if height >= 130 else 2 if height >= 80 else 4  # numbers that there is room for
        self.figure.colorbar(image, cax=bar, ticks=[0, 0.25, 0.5, 0.75, 1][::every])
        bar.tick_params(labelsize=8, length=2, pad=2)
        bar.set_yticklabels(["0", ".25", ".5", ".75", "1"][::every])
        if spans:
            bar.get_yticklabels()[-1].set_va("top")

    def histogram(self, share: Tensor) -> None:
        """Plot how much of an image is hidden, over all samples."""
        left = self.margin + self.beside
        axis = self._axis(
            left, self.below, self.width - left - self.margin - 14, max(self.map[0], 240) - 112
        )
        counts, edges = np.histogram(share.numpy(), bins=50, range=(0, 1))
        axis.bar(edges[:-1], counts / len(share), width=0.02, align="edge", color=accent())
        axis.set_title(f"share hidden, {len(share):,} draws", fontsize=9, pad=4)
        axis.set_xlim(0, 1)
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", ".25", ".5", ".75", "1"])
        axis.set_yticks([])
        axis.tick_params(labelsize=8, length=2, pad=2)
        axis.spines[["top", "right", "left"]].set_visible(False)
        low, mean, high = (float(x) for x in (share.min(), share.mean(), share.max()))
        spread = f"mean {mean:.1%}\nleast {low:.1%}, most {high:.1%}"
        axis.set_xlabel(f"always {mean:.1%}" if low == high else spread, fontsize=9)


def _patched(image: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return an image, if the grid divides it."""
    if image.ndim != 3 or image.shape[1] % grid[0] or image.shape[2] % grid[1]:
        raise ValueError(
            f"image must be (3, H, W) with sides that the grid {grid[0]}x{grid[1]} divides; "
            f"got {tuple(image.shape)}."
        )
    return image


def view_name(view: int, global_crops: int) -> str:
    """Return what a view is called in figures: global or local, and its number from 1."""
    return f"global {view + 1}" if view < global_crops else f"local {view - global_crops + 1}"


def _masked_cells(policy: ViewPolicy) -> str:
    cells = {
        "student global": policy.student_global,
        "student local": policy.student_local,
        "teacher global": policy.teacher_global,
    }
    masked = [f"{name}: {masker!r}" for name, masker in cells.items() if masker is not None]
    return "; ".join(masked) or "no view is masked"
