"""Figures of masks, attention and training, returned and never shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from einops import rearrange
from torch import Tensor

from maskdistill.views import ViewMasks, ViewPolicy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colour-blind-safe (Okabe and Ito, 2008).
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
_HIDDEN = np.array([0.16, 0.16, 0.19], dtype=np.float32)


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
