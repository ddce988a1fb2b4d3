"""Figures of masks, attention and training, returned and never shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from maskdistill.masking import Masker
from maskdistill.views import ViewMasks, ViewPolicy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colour-blind-safe (Okabe and Ito, 2008).
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
_HIDDEN = np.array([0.16, 0.16, 0.19], dtype=np.float32)
_VISIBLE = np.array([0.87, 0.88, 0.9], dtype=np.float32)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: no window, no global state, no backend to choose.
    figure = Figure(figsize=(width, height), layout="constrained", dpi=200)
    FigureCanvasAgg(figure)
    return figure


def _bare(axis: Any) -> Any:
    """Take ticks and frame away, for a picture."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    return axis


def plot_view_masks(
    image: Tensor, crops: Sequence[Tensor], masks: ViewMasks, policy: ViewPolicy, patch_size: int
) -> Figure:
    """Draw all views of one image as each role sees them under a policy.

    >>> figure = plot_view_masks(image, crops, masks, policy, 8)  # doctest: +SKIP
    >>> figure.savefig("masks.png")  # doctest: +SKIP

    Args:
        image: ``(3, H, W)`` uint8, the whole image.
        crops: ``(1, 3, h, w)`` uint8, the views of this one image, global crops first.
        masks: drawn for these crops.
        policy: that drew them, for the caption.
        patch_size: pixels of a side of a patch.
    """
    figure = _figure(1.15 * len(crops) + 2.3, 2.9)
    grid = figure.add_gridspec(2, len(crops) + 2)
    whole = _bare(figure.add_subplot(grid[:, :2]))
    whole.imshow(_pixels(image), interpolation="nearest")
    whole.set_title("image", fontsize=8)
    for row, (role, views) in enumerate([("student", masks.student), ("teacher", masks.teacher)]):
        for view, crop in enumerate(crops):
            axis = _bare(figure.add_subplot(grid[row, view + 2]))
            axis.set_box_aspect(1)
            if view == 0:
                axis.set_ylabel(role, fontsize=9)
            if row == 0:
                axis.set_title(_view_name(view, policy.global_crops), fontsize=8)
            if view >= len(views):
                axis.text(0.5, 0.5, "not seen", ha="center", va="center", fontsize=7, color=_GREY)
                continue
            mask = views[view]
            axis.imshow(_masked(crop[0], mask, patch_size), interpolation="nearest")
            share = "clean" if mask is None else f"{float(mask.float().mean()):.0%} hidden"
            axis.set_xlabel(share, fontsize=7, color=_GREY if mask is None else _ORANGE)
    figure.suptitle(_short(policy), fontsize=8)
    return figure


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
    """Draw what a masker hides: some draws, how often each patch is hidden, and how many are.

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
        ValueError: pictures or a progress of another number or shape.
    """
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

    sheet = _Sheet(grid)
    for place in range(count):
        sheet.panel(place, _patched(pictures[place], grid), "image")  # type: ignore[index]
    if count == 1 and per_patch is not None:
        sheet.heat(1, signals[per_patch][0].cpu().float(), per_patch)
    for index, (mask, moment) in enumerate(zip(masks, moments, strict=True)):
        picture = None if pictures is None else pictures[index % count]
        title = f"{float(mask.float().mean()):.0%} hidden" if same else f"progress {moment:.1f}"
        sheet.panel(before + index, _hide(mask, picture, grid), title)
    sheet.chance(hidden.mean(dim=0))
    sheet.histogram(hidden.mean(dim=1))
    return sheet.figure


class _Sheet:
    """The page of ``plot_masker``, laid out in whole pixels so that patches are equally large."""

    def __init__(self, grid: tuple[int, int]) -> None:
        self.grid = grid
        self.gap, self.head, self.margin = 16, 34, 12
        patch = max(196 // max(grid), 1)
        self.cell = (patch * grid[0], patch * grid[1])
        patch = max(308 // max(grid), 1)
        self.map = (patch * grid[0], patch * grid[1])
        self.width = 2 * self.margin + max(4 * self.cell[1] + 3 * self.gap, 560)
        self.below = self.margin + 2 * (self.cell[0] + self.head) + self.gap + self.head
        self.height = self.below + max(self.map[0], 240) + self.margin
        self.figure = _figure(self.width / 200, self.height / 200)
        self.figure.set_layout_engine("none")

    def _axis(self, left: int, top: int, width: int, height: int) -> Any:
        """Return an axis at a place in pixels from the upper left corner."""
        bottom = self.height - top - height
        return self.figure.add_axes(
            (left / self.width, bottom / self.height, width / self.width, height / self.height)
        )

    def _cell(self, place: int, title: str) -> Any:
        (height, width), (row, column) = self.cell, divmod(place, 4)
        left = self.margin + column * (width + self.gap)
        top = self.margin + self.head + row * (height + self.head)
        axis = _bare(self._axis(left, top, width, height))
        axis.set_title(title, fontsize=8, pad=3)
        return axis

    def panel(self, place: int, pixels: Any, title: str) -> None:
        """Draw pixels in one of the eight places."""
        self._cell(place, title).imshow(pixels, interpolation="nearest", aspect="auto")

    def heat(self, place: int, signal: Tensor, title: str) -> None:
        """Draw a signal per patch in one of the eight places, from its least to its greatest."""
        values = rearrange(signal, "(h w) -> h w", h=self.grid[0]).numpy()
        self._cell(place, title).imshow(
            values, cmap="inferno", interpolation="nearest", aspect="auto"
        )

    def chance(self, chance: Tensor) -> None:
        """Draw how often each patch is hidden, with its colour bar."""
        height, width = self.map
        axis = _bare(self._axis(self.margin, self.below, width, height))
        axis.set_title("P(hidden) of each patch", fontsize=9, pad=4)
        values = rearrange(chance, "(h w) -> h w", h=self.grid[0]).numpy()
        drawn = axis.imshow(
            values, cmap="viridis", vmin=0, vmax=1, interpolation="nearest", aspect="auto"
        )
        bar = self._axis(self.margin + width + self.gap, self.below, 24, height)
        self.figure.colorbar(drawn, cax=bar, ticks=[0, 0.25, 0.5, 0.75, 1])
        bar.tick_params(labelsize=8, length=2, pad=2)
        bar.set_yticklabels(["0", ".25", ".5", ".75", "1"])

    def histogram(self, share: Tensor) -> None:
        """Draw how much of an image is hidden, over all samples."""
        left = self.margin + self.map[1] + self.gap + 24 + 96
        axis = self._axis(
            left, self.below, self.width - left - self.margin - 14, max(self.map[0], 240) - 112
        )
        counts, edges = np.histogram(share.numpy(), bins=50, range=(0, 1))
        axis.bar(edges[:-1], counts / len(share), width=0.02, align="edge", color=_BLUE)
        axis.set_title(f"share hidden, {len(share):,} draws", fontsize=9, pad=4)
        axis.set_xlim(0, 1)
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", ".25", ".5", ".75", "1"])
        axis.set_yticks([])
        axis.tick_params(labelsize=8, length=2, pad=2)
        axis.spines[["top", "right", "left"]].set_visible(False)
        low, mean, high = (float(x) for x in (share.min(), share.mean(), share.max()))
        spread = f"mean {mean:.1%}\nleast {low:.1%}, most {high:.1%}"
        axis.set_xlabel(f"always {mean:.1%}" if low == high else spread, fontsize=9)


def plot_attention(
    images: Tensor,
    maps: Mapping[str, Tensor],
    grid: tuple[int, int],
    masks: Tensor | None = None,
) -> Figure:
    """Draw class-token attention over images, one row per model.

    >>> plot_attention(images, {"before": a, "after": b}, (8, 8))  # doctest: +SKIP

    Args:
        images: ``(B, 3, H, W)`` uint8; one column each.
        maps: title to ``(B, heads, N)`` attention; drawn averaged over heads, each map scaled to
            its own maximum.
        grid: patch rows and columns.
        masks: ``(B, H, W)`` bool object masks, drawn as outlines, where there are any.
    """
    count = len(images)
    figure = _figure(0.95 * count + 0.6, 1.05 * (len(maps) + 1))
    axes = figure.subplots(len(maps) + 1, count, squeeze=False)
    for row, title in enumerate(["image", *maps]):
        for column in range(count):
            axis = _bare(axes[row][column])
            pixels = _pixels(images[column])
            if row == 0:
                axis.imshow(pixels)
            else:
                attention = maps[title][column].float().mean(dim=0)
                heat = rearrange(attention / attention.max(), "(h w) -> h w", h=grid[0])
                height, width = pixels.shape[:2]
                axis.imshow(
                    heat.cpu().numpy(), cmap="inferno", vmin=0, vmax=1, interpolation="nearest",
                    extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                )  # fmt: skip
            if masks is not None:
                axis.contour(
                    masks[column].cpu().numpy(), levels=[0.5], colors="#56B4E9", linewidths=0.9
                )
        axes[row][0].set_ylabel(title, fontsize=8)
    caption = "attention averaged over heads, each map scaled to its own maximum"
    if masks is not None:
        caption += "; blue outline: object mask"
    figure.supxlabel(caption, fontsize=7, color=_GREY)
    return figure


def plot_curves(
    metrics: Sequence[Mapping[str, Any]],
    floors: Mapping[str, float] | None = None,
    uniform_loss: float | None = None,
) -> Figure:
    """Draw a run's loss, k-NN accuracy and signs of collapse over its steps.

    Args:
        metrics: lines of ``metrics.jsonl``, each with ``step`` and any numbers.
        floors: names and k-NN accuracies to beat, such as the random initialisation's.
        uniform_loss: ln(out_dim), where the loss ends on collapse.
    """
    figure = _figure(7.0, 2.3)
    loss, knn, spread = figure.subplots(1, 3)

    def series(name: str) -> tuple[list[float], list[float]]:
        lines = [line for line in metrics if name in line]
        return [line["step"] for line in lines], [line[name] for line in lines]

    few = "o" if len(series("loss")[0]) < 3 else None  # a line of one point shows nothing
    style: dict[str, Any] = {"linewidth": 1, "marker": few, "markersize": 3}
    loss.plot(*series("loss"), color=_BLUE, label="loss", **style)
    loss.plot(*series("teacher_entropy"), color=_GREEN, label="teacher entropy", **style)
    if uniform_loss is not None:
        loss.axhline(uniform_loss, color=_GREY, linewidth=0.8, linestyle=":", label="uniform")
    loss.set_ylabel("nats")
    steps, accuracy = series("knn")
    percent = [100 * value for value in accuracy]
    knn.plot(steps, percent, color=_BLUE, linewidth=1.2, marker="o", markersize=3, label="teacher")
    for dashes, (name, floor) in zip(("--", ":", "-."), (floors or {}).items(), strict=False):
        knn.axhline(100 * floor, color=_ORANGE, linewidth=0.9, linestyle=dashes, label=name)
    knn.set_ylim(0, 1.1 * max([*percent, *(100 * f for f in (floors or {}).values()), 1.0]))
    knn.set_ylabel("20-NN accuracy (%)")
    spread.plot(*series("feature_spread"), color=_BLUE, **style)
    spread.set_ylim(0, 1.02)
    spread.set_ylabel("feature spread")
    for axis in (loss, knn, spread):
        axis.set_xlabel("step")
        axis.xaxis.get_major_locator().set_params(nbins=4)
        axis.spines[["top", "right"]].set_visible(False)
        for item in (axis.xaxis.label, axis.yaxis.label, *axis.get_xticklabels()):
            item.set_fontsize(8)
        axis.tick_params(labelsize=7)
    for axis in (loss, knn):
        axis.legend(fontsize=6.5, facecolor="white", framealpha=0.9, edgecolor="none")
    return figure


def _pixels(image: Tensor) -> Any:
    """Turn ``(3, H, W)`` uint8 into an ``(H, W, 3)`` array of floats in [0, 1]."""
    return rearrange(image, "c h w -> h w c").cpu().numpy().astype(np.float32) / 255


def _masked(image: Tensor, mask: Tensor | None, patch_size: int) -> Any:
    pixels = _pixels(image)
    if mask is None:
        return pixels
    hidden = rearrange(mask[0], "(h w) -> h w", h=image.shape[1] // patch_size)
    hidden = hidden.repeat_interleave(patch_size, 0).repeat_interleave(patch_size, 1)
    return np.where(hidden.cpu().numpy()[..., None], _HIDDEN, pixels)


def _patched(image: Tensor, grid: tuple[int, int]) -> Any:
    """Return an image's pixels, if the grid divides them."""
    if image.ndim != 3 or image.shape[1] % grid[0] or image.shape[2] % grid[1]:
        raise ValueError(
            f"image must be (3, H, W) with sides that the grid {grid[0]}x{grid[1]} divides; "
            f"got {tuple(image.shape)}."
        )
    return _pixels(image)


def _hide(mask: Tensor, image: Tensor | None, grid: tuple[int, int]) -> Any:
    """Return the pixels of a mask, over an image if there is one."""
    hidden = rearrange(mask, "(h w) -> h w", h=grid[0]).numpy()[..., None]
    if image is None:
        return np.where(hidden, _HIDDEN, _VISIBLE)
    size = (image.shape[1] // grid[0], image.shape[2] // grid[1])
    return np.where(np.kron(hidden[..., 0], np.ones(size))[..., None] > 0, _HIDDEN, _pixels(image))


def _view_name(view: int, global_crops: int) -> str:
    return f"global {view + 1}" if view < global_crops else f"local {view - global_crops + 1}"


def _short(policy: ViewPolicy) -> str:
    cells = {
        "student global": policy.student_global,
        "student local": policy.student_local,
        "teacher global": policy.teacher_global,
    }
    masked = [f"{name}: {masker!r}" for name, masker in cells.items() if masker is not None]
    return "; ".join(masked) or "no view is masked"
