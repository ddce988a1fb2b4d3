"""Figures of class-token attention: models, heads, and steps of training beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from maskdistill.plotting.pixels import (
    LOOKS,
    Look,
    attention_pixels,
    check,
    masked_pixels,
    outlined_pixels,
)
from maskdistill.plotting.style import DPI, PAGE, bare, caption, fits, fitted, inches, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Scale: TypeAlias = Literal["own", "image", "all"]
SCALES: tuple[str, ...] = get_args(Scale)
_SCALED = {
    "own": "each map scaled to its own maximum",
    "image": "the maps of an image on one scale",
    "all": "all maps on one scale",
}


def plot_attention(
    images: Tensor,
    maps: Mapping[str, Tensor],
    grid: tuple[int, int],
    masks: Tensor | None = None,
    *,
    style: Look = "map",
    scale: Scale = "own",
) -> Figure:
    """Plot class-token attention over images, one row per model.

    >>> plot_attention(images, {"before": a, "after": b}, (8, 8))  # doctest: +SKIP

    Args:
        images: ``(B, 3, H, W)`` uint8; one column each.
        maps: title to ``(B, heads, N)`` attention, which is averaged over heads.
        grid: patch rows and columns.
        masks: ``(B, H, W)`` bool object masks, shown as outlines.
        style: ``"map"``, the attention's colours alone, or ``"overlay"`` over the darkened image.
        scale: what has the brightest colour: the maximum of each map (``"own"``), of an image's
            maps (``"image"``), or of all (``"all"``), for models whose attention differs in how
            much it is concentrated.

    Raises:
        ValueError: attention or masks that do not fit the images or the grid, an unknown choice.
    """
    _check(images, maps, grid, masks, style, scale)
    means = torch.stack([attention.float().mean(dim=1) for attention in maps.values()])
    return _sheet(
        images, means, grid, masks, style, scale, said="attention averaged over heads",
        images_across=True, row_titles=["image", *maps],
    )  # fmt: skip


def plot_attention_heads(
    images: Tensor,
    attention: Tensor,
    grid: tuple[int, int],
    masks: Tensor | None = None,
    *,
    titles: Sequence[str] | None = None,
    style: Look = "overlay",
    scale: Scale = "own",
) -> Figure:
    """Plot the class-token attention of each head, one row per image.

    >>> plot_attention_heads(images, vit.attention(normalize(images)), (14, 14))  # doctest: +SKIP

    Args:
        images: ``(B, 3, H, W)`` uint8; one row each.
        attention: ``(B, heads, N)``; one column per head, and their mean.
        grid: patch rows and columns.
        masks: as in `plot_attention`.
        titles: of the images, written beside them.
        style: as in `plot_attention`.
        scale: as in `plot_attention`.

    Raises:
        ValueError: attention, masks or titles that do not fit the images or the grid, an unknown
            choice.
    """
    _check(images, {"attention": attention}, grid, masks, style, scale)
    if titles is not None and len(titles) != len(images):
        raise ValueError(f"titles must be one per image, {len(images)}; got {len(titles)}.")
    heads = attention.float().transpose(0, 1)
    return _sheet(
        images, torch.cat([heads, heads.mean(dim=0, keepdim=True)]), grid, masks, style, scale,
        said="class-token attention", row_titles=titles or (), word="head",
        column_titles=["image", *(f"head {i + 1}" for i in range(len(heads))), "mean"],
    )  # fmt: skip


def plot_attention_strip(
    images: Tensor,
    attention: Mapping[int, Tensor],
    grid: tuple[int, int],
    masks: Tensor | None = None,
    *,
    style: Look = "overlay",
    scale: Scale = "own",
    most: int = 7,
) -> Figure:
    """Plot how class-token attention changes over training: a column per step, a row per image.

    >>> plot_attention_strip(images, {0: before, 100: later, 400: last}, (4, 4))  # doctest: +SKIP

    Args:
        images: ``(B, 3, H, W)`` uint8; one row each.
        attention: step to ``(B, heads, N)``, which is averaged over heads; in the order of steps.
        grid: patch rows and columns.
        masks: as in `plot_attention`.
        style: as in `plot_attention`.
        scale: as in `plot_attention`.
        most: steps to show, at least 2; of more, the first, the last, and evenly spread ones
            between.

    Raises:
        ValueError: no step, attention or masks that do not fit the images or the grid, an unknown
            choice.
    """
    steps = chosen_steps(attention, most)
    _check(images, {f"step {step}": attention[step] for step in steps}, grid, masks, style, scale)
    means = torch.stack([attention[step].float().mean(dim=1) for step in steps])
    return _sheet(
        images, means, grid, masks, style, scale, said="attention averaged over heads",
        column_titles=["image", *(f"step {step:,}" for step in steps)], word="step",
    )  # fmt: skip


def chosen_steps(attention: Mapping[int, Any], most: int) -> list[int]:
    """Return the steps in order; of too many, the first, the last and evenly spread ones.

    Raises:
        ValueError: no step, or fewer than 2 to choose.
    """
    if not attention:
        raise ValueError("attention must have at least one step; got none.")
    if most < 2:
        raise ValueError(f"most must be at least 2 steps, the first and the last; got {most!r}.")
    steps = sorted(attention)
    if len(steps) <= most:
        return steps
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _check(
    images: Tensor,
    maps: Mapping[str, Tensor],
    grid: tuple[int, int],
    masks: Tensor | None,
    style: str,
    scale: str,
) -> None:
    """Refuse images, attention and masks that do not fit each other, and unknown choices."""
    check("style", style, LOOKS)
    check("scale", scale, SCALES)
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"images must be (B, 3, H, W) uint8; got {tuple(images.shape)}.")
    if not maps:
        raise ValueError("maps must name at least one model's attention; got none.")
    for title, attention in maps.items():
        wanted = (len(images), grid[0] * grid[1])
        if attention.ndim != 3 or (attention.shape[0], attention.shape[2]) != wanted:
            raise ValueError(
                f"the attention of {title!r} must be (B, heads, N) = ({wanted[0]}, heads, "
                f"{wanted[1]}) for a grid of {grid[0]}x{grid[1]} patches; got "
                f"{tuple(attention.shape)}."
            )
    if masks is not None and (masks.ndim != 3 or len(masks) != len(images)):
        raise ValueError(
            f"masks must be (B, H, W) bool, one per image; got {tuple(masks.shape)} for "
            f"{len(images)} images."
        )


# --- A sheet: rows and columns of equally large pictures, at most as wide as a page

_GAP = 0.03
"""Inches between panels, and around all."""
_PANEL = 0.95
"""Inches of a picture's width at most."""


def _sheet(
    images: Tensor,
    maps: Tensor,
    grid: tuple[int, int],
    masks: Tensor | None,
    look: Look,
    scale: Scale,
    *,
    said: str,
    images_across: bool = False,
    row_titles: Sequence[str] = (),
    column_titles: Sequence[str] = (),
    word: str = "",
) -> Figure:
    """Return a figure of the images and of each map over them.

    Args:
        images: ``(B, 3, H, W)`` uint8.
        maps: ``(M, B, N)`` attention.
        grid: patch rows and columns.
        masks: as in `plot_attention`.
        look: the style of `plot_attention`.
        scale: as in `plot_attention`.
        said: what the maps are, for the caption.
        images_across: a column per image and a row per map, instead of the other way round.
        row_titles: beside the rows.
        column_titles: above the columns.
        word: begins several titles of columns, and is left out where it takes too much.
    """
    rows, columns = len(images), len(maps) + 1
    if images_across:
        rows, columns = columns, rows
    # --- Sizes in inches: wide labels leave less to the pictures, which leave less to the labels.
    shape = images.shape[2] / images.shape[3]
    labels = _Labels()
    for _ in range(2):
        labels = _row_labels(row_titles, _panel_width(columns, labels) * shape - 0.03)
    panel = _panel_width(columns, labels)
    height = panel * shape
    # --- Pictures, about twice as fine as they are shown
    figure = new_figure(PAGE, PAGE, "none")
    axes = figure.subplots(rows, columns, squeeze=False)
    pictures = axes.T if images_across else axes
    tops = _brightest(maps, scale)
    size = int(2 * panel * DPI)
    for i, image in enumerate(images):
        mask = None if masks is None else masks[i].bool()
        pixels = masked_pixels(image, None, (1, 1), size=size)
        bare(pictures[i][0]).imshow(pixels if mask is None else outlined_pixels(pixels, mask))
        for axis, values, top in zip(pictures[i][1:], maps[:, i], tops[:, i].tolist(), strict=True):
            pixels = attention_pixels(
                image, values, grid, scale=top or None, look=look, size=size, outline=mask
            )
            bare(axis).imshow(pixels)
    # --- Titles and caption
    for row, line in enumerate(labels.lines):
        beside: Any = {} if labels.upright else {"rotation": 0, "ha": "right", "va": "center"}
        axes[row][0].set_ylabel(line, fontsize=labels.size, labelpad=3, **beside)
    above, numbers = _write_column_titles(axes[0], column_titles, panel - 0.04, word)
    left = labels.width + _GAP
    width = min(PAGE, left + columns * (panel + _GAP))
    figure.set_figwidth(width)
    outline = "" if masks is None else "; blue outline: object mask"
    caption(figure, f"{numbers}{said}, {_SCALED[scale]}{outline}")
    below = 0.18 + 0.11 * figure.get_supxlabel().count("\n")
    total = above + rows * (height + _GAP) - _GAP + below
    figure.set_figheight(total)
    figure.subplots_adjust(
        left=left / width, right=1 - _GAP / width, bottom=below / total,
        top=1 - above / total, wspace=_GAP / panel, hspace=_GAP / height,
    )  # fmt: skip
    return figure


def _brightest(maps: Tensor, scale: Scale) -> Tensor:
    """Return the attention that has the brightest colour in each map, ``(M, B)``."""
    own = maps.amax(dim=2)
    if scale == "image":
        return own.amax(dim=0, keepdim=True).expand_as(own)
    return own.max().expand_as(own) if scale == "all" else own


def _write_column_titles(
    axes: Any, titles: Sequence[str], room: float, word: str
) -> tuple[float, str]:
    """Write titles above the columns; return the inches that they take, and a caption's begin."""
    if not titles:
        return _GAP, ""
    said = ""
    if word and max(inches(title, 7) for title in titles) > room:
        titles = [title.removeprefix(f"{word} ") for title in titles]
        said = f"numbers: {word}s; "
    sizes = [s for s in (7, 6.5, 6, 5.5) if max(inches(t, s) for t in titles) <= room + 0.06]
    look: Any = {"fontsize": sizes[0]} if sizes else {"fontsize": 6, "rotation": 90}
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, pad=3, **look)
    return 0.17 if sizes else 0.1 + max(inches(title, 6) for title in titles), said


class _Labels(NamedTuple):
    """What is written beside the rows of a sheet.

    Attributes:
        lines: of each row.
        size: of its letters, in points.
        upright: written upwards, along the panel's height; else in a column of its own.
        width: inches that it takes.
    """

    lines: Sequence[str] = ()
    size: float = 7.5
    upright: bool = True
    width: float = 0.0


def _panel_width(columns: int, labels: _Labels) -> float:
    """Return the inches of a panel's width with which all panels fit on a page."""
    return min(_PANEL, (PAGE - labels.width - _GAP * (columns + 1)) / columns)


def _row_labels(titles: Sequence[str], height: float) -> _Labels:
    """Return the titles of rows so high in inches that none is longer than its row is high.

    They are written upwards in up to three lines where that breaks no word, and else across.
    """
    if not titles:
        return _Labels()
    for size in (7.5, 7.0, 6.5, 6.0):
        lines = [fitted(title, height, size) for title in titles]
        most = max(line.count("\n") + 1 for line in lines)
        if most <= 3 and all(fits(title, height, size) for title in titles):
            return _Labels(lines, size, True, 0.1 + most * _line_height(size))
    kept = max(1, int(height / _line_height(size)))  # lines that a row has room for
    widths = (0.6, 0.8, 1.0, 1.3, 1.6, 2.0, 2.5)
    low = [
        width
        for width in widths
        if all(fitted(title, width, size).count("\n") < kept for title in titles)
    ]
    whole = [width for width in low if all(fits(title, width, size) for title in titles)]
    width = (whole or low or widths[-1:])[0]
    lines = [_cut(fitted(title, width, size).split("\n"), kept) for title in titles]
    widest = max(inches(part, size) for line in lines for part in line.split("\n"))
    return _Labels(lines, size, False, 0.1 + widest)


def _line_height(size: float) -> float:
    return 1.25 * size / 72


def _cut(lines: Sequence[str], kept: int) -> str:
    """Return the first lines, and a sign where some are left out."""
    return "\n".join(lines) if len(lines) <= kept else "\n".join(lines[:kept])[:-1] + "…"
