"""Figures of class-token attention: models, heads, and steps of training beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

from torch import Tensor

from maskdistill.plotting.pixels import (
    LOOKS,
    Look,
    Pixels,
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


def brightest(values: Sequence[Tensor], everything: Any, scale: Scale) -> list[float | None]:
    """Return what has the brightest colour in each map of an image."""
    if scale == "own":
        return [None] * len(values)
    among = values if scale == "image" else everything
    return [max(float(value.max()) for value in among) or None] * len(values)


def check_sheet(
    images: Tensor,
    maps: Mapping[str, Tensor],
    grid: tuple[int, int],
    masks: Tensor | None,
    style: str,
    scale: str,
) -> None:
    """Refuse images, attention and masks that do not fit each other, and unknown choices.

    Raises:
        ValueError: says which, and what was wanted.
    """
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


_GAP = 0.03
"""Inches between panels, and around all."""
_ACROSS = [0.6, 0.8, 1.0, 1.3, 1.6, 2.0, 2.5]
"""Inches that a column of titles may be wide."""


class Labels(NamedTuple):
    """What is written beside the rows of a sheet.

    Attributes:
        lines: of each row.
        size: of its letters, in points.
        upright: written upwards, along the panel's height; else in a column of its own.
        width: inches that it takes.
    """

    lines: tuple[str, ...] = ()
    size: float = 7.5
    upright: bool = True
    width: float = 0.0


def row_labels(titles: Sequence[str], height: float) -> Labels:
    """Return the titles of rows so high in inches that none is longer than its row is high.

    They are written upwards in up to three lines where that breaks no word, and else across.
    """
    if not titles:
        return Labels()
    for size in (7.5, 7.0, 6.5, 6.0):
        lines = tuple(fitted(title, height, size) for title in titles)
        most = max(line.count("\n") + 1 for line in lines)
        if most <= 3 and all(fits(title, height, size) for title in titles):
            return Labels(lines, size, True, 0.1 + most * _line_height(size))
    broken = {width: tuple(fitted(title, width, size) for title in titles) for width in _ACROSS}
    low = [
        width
        for width, lines in broken.items()
        if all((line.count("\n") + 1) * _line_height(size) <= height for line in lines)
    ]
    whole = [width for width in low if all(fits(title, width, size) for title in titles)]
    lines = broken[(whole or low or _ACROSS[-1:])[0]]
    kept = max(1, int(height / _line_height(size)))
    lines = tuple(_cut(line.split("\n"), kept) for line in lines)
    widest = max(inches(part, size) for line in lines for part in line.split("\n"))
    return Labels(lines, size, False, 0.1 + widest)


def _line_height(size: float) -> float:
    return 1.25 * size / 72


def _cut(lines: Sequence[str], kept: int) -> str:
    """Return the first lines, and a sign where some are left out."""
    return "\n".join(lines) if len(lines) <= kept else "\n".join(lines[:kept])[:-1] + "…"


class Sheet:
    """Rows and columns of equally large pictures, at most as wide as a page.

    Args:
        rows, columns: of pictures.
        images: ``(B, 3, H, W)`` uint8.
        panel: inches of a picture's width at most.
        titles: of the rows, written beside them.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        images: Tensor,
        panel: float = 0.95,
        titles: Sequence[str] | None = None,
    ) -> None:
        self.images, self.said, self.labels = images, "", Labels()
        self.rows, self.columns, self.above = rows, columns, _GAP
        shape = images.shape[2] / images.shape[3]
        for _ in range(2):  # wide labels leave less to the pictures, which leave less to the labels
            self.panel = self._width_left(panel)
            self.labels = row_labels(titles or (), self.panel * shape - 0.03)
        self.panel = self._width_left(panel)
        self.height = self.panel * shape
        self.pixels = int(2 * self.panel * DPI)
        self.figure = new_figure(PAGE, PAGE, "none")  # `finish` knows all sizes
        self.axes = self.figure.subplots(rows, columns, squeeze=False)
        for axis in self.axes.flat:
            bare(axis)
        for row, line in enumerate(self.labels.lines):
            look: Any = {"fontsize": self.labels.size, "labelpad": 3}
            if not self.labels.upright:
                look |= {"rotation": 0, "ha": "right", "va": "center"}
            self.axes[row][0].set_ylabel(line, **look)

    def _width_left(self, most: float) -> float:
        """Return the width of a panel that all fit on a page with."""
        left = PAGE - self.labels.width - _GAP * (self.columns + 1)
        return min(most, left / self.columns)

    def _show(self, row: int, column: int, pixels: Pixels) -> None:
        """Draw pixels in a place, instead of those that are there."""
        shown = self.axes[row][column].images
        if shown:
            shown[0].set_data(pixels)
        else:
            self.axes[row][column].imshow(pixels)

    def image(self, row: int, column: int, index: int, mask: Tensor | None) -> None:
        """Draw an image."""
        pixels = masked_pixels(self.images[index], None, (1, 1), size=self.pixels)
        self._show(row, column, pixels if mask is None else outlined_pixels(pixels, mask.bool()))

    def attention(
        self,
        row: int,
        column: int,
        index: int,
        values: Tensor,
        grid: tuple[int, int],
        look: Look,
        top: float | None,
        mask: Tensor | None,
    ) -> None:
        """Draw attention over an image."""
        outline = None if mask is None else mask.bool()
        pixels = attention_pixels(
            self.images[index], values, grid, scale=top, look=look, size=self.pixels,
            outline=outline,
        )  # fmt: skip
        self._show(row, column, pixels)

    def titles(self, titles: Sequence[str], word: str = "") -> None:
        """Write above the columns; a word that begins several is left out where it takes much."""
        room = self.panel - 0.04
        if word and max(inches(title, 7) for title in titles) > room:
            titles = [title.removeprefix(f"{word} ") for title in titles]
            self.said = f"numbers: {word}s; "
        sizes = [s for s in (7, 6.5, 6, 5.5) if max(inches(t, s) for t in titles) <= room + 0.06]
        widest = max(inches(title, 6) for title in titles)
        self.above = 0.17 if sizes else 0.1 + widest
        for axis, title in zip(self.axes[0], titles, strict=True):
            axis.set_title(
                title, fontsize=sizes[0] if sizes else 6, pad=3, rotation=0 if sizes else 90
            )

    def finish(self, said: str, scale: Scale, masks: Tensor | None) -> Figure:
        """Give all its place, and write the caption."""
        outline = "" if masks is None else "; blue outline: object mask"
        left = self.labels.width + _GAP
        width = min(PAGE, left + self.columns * (self.panel + _GAP))
        self.figure.set_figwidth(width)
        caption(self.figure, f"{self.said}{said}, {_SCALED[scale]}{outline}")
        below = 0.18 + 0.11 * self.figure.get_supxlabel().count("\n")
        height = self.above + self.rows * (self.height + _GAP) - _GAP + below
        self.figure.set_figheight(height)
        self.figure.subplots_adjust(
            left=left / width, right=1 - _GAP / width, bottom=below / height,
            top=1 - self.above / height, wspace=_GAP / self.panel, hspace=_GAP / self.height,
        )  # fmt: skip
        return self.figure


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_attention(
    images: Tensor,
    maps: Mapping[str, Tensor],
    grid: tuple[int, int],
    masks: Tensor | None = None,
    *,
    style: Look = "map",
    scale: Scale = "own",
) -> Figure:
    """Draw class-token attention over images, one row per model.

    >>> plot_attention(images, {"before": a, "after": b}, (8, 8))  # doctest: +SKIP

    Args:
        images: ``(B, 3, H, W)`` uint8; one column each.
        maps: title to ``(B, heads, N)`` attention; drawn averaged over heads.
        grid: patch rows and columns.
        masks: ``(B, H, W)`` bool object masks, drawn as outlines, where there are any.
        style: ``"map"``, the attention's colours alone, or ``"overlay"`` over the darkened image.
        scale: what has the brightest colour: the maximum of each map (``"own"``), of an image's
            maps (``"image"``), or of all (``"all"``), for models whose attention differs in how
            much it is concentrated.

    Raises:
        ValueError: attention or masks that do not fit the images or the grid, an unknown choice.
    """
    check_sheet(images, maps, grid, masks, style, scale)
    means = {title: attention.float().mean(dim=1) for title, attention in maps.items()}
    sheet = Sheet(len(maps) + 1, len(images), images, titles=["image", *maps])
    for column in range(len(images)):
        mask = None if masks is None else masks[column]
        sheet.image(0, column, column, mask)
        values = [mean[column] for mean in means.values()]
        for row, tops in enumerate(brightest(values, means.values(), scale)):
            sheet.attention(row + 1, column, column, values[row], grid, style, tops, mask)
    return sheet.finish("attention averaged over heads", scale, masks)


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
    """Draw the class-token attention of each head, one row per image.

    >>> plot_attention_heads(images, vit.attention(normalize(images)), (14, 14))  # doctest: +SKIP

    Args:
        images: ``(B, 3, H, W)`` uint8; one row each.
        attention: ``(B, heads, N)``; one column per head, and their mean.
        grid: patch rows and columns.
        masks: ``(B, H, W)`` bool object masks, drawn as outlines, where there are any.
        titles: of the images, written beside them.
        style: ``"overlay"`` over the darkened image, or ``"map"``, the colours alone.
        scale: what has the brightest colour: the maximum of each map (``"own"``), of an image's
            maps (``"image"``), or of all (``"all"``).

    Raises:
        ValueError: attention, masks or titles that do not fit the images or the grid, an unknown
            choice.
    """
    check_sheet(images, {"attention": attention}, grid, masks, style, scale)
    if titles is not None and len(titles) != len(images):
        raise ValueError(f"titles must be one per image, {len(images)}; got {len(titles)}.")
    heads = attention.shape[1]
    values = attention.float()
    sheet = Sheet(len(images), heads + 2, images, titles=titles)
    for row in range(len(images)):
        mask = None if masks is None else masks[row]
        sheet.image(row, 0, row, mask)
        shown = [*values[row], values[row].mean(dim=0)]
        for column, top in enumerate(brightest(shown, [values], scale)):
            sheet.attention(row, column + 1, row, shown[column], grid, style, top, mask)
    sheet.titles(["image", *(f"head {i + 1}" for i in range(heads)), "mean"], "head")
    return sheet.finish("class-token attention", scale, masks)


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
    """Draw how class-token attention changes over training: a column per step, a row per image.

    >>> plot_attention_strip(images, {0: before, 100: later, 400: last}, (4, 4))  # doctest: +SKIP

    Args:
        images: ``(B, 3, H, W)`` uint8; one row each.
        attention: step to ``(B, heads, N)``; drawn averaged over heads, in the order of the steps.
        grid: patch rows and columns.
        masks: ``(B, H, W)`` bool object masks, drawn as outlines, where there are any.
        style: ``"overlay"`` over the darkened image, or ``"map"``, the colours alone.
        scale: what has the brightest colour: the maximum of each map (``"own"``), of an image's
            maps (``"image"``), or of all (``"all"``).
        most: steps to draw, at least 2; of more, the first, the last, and evenly spread ones
            between.

    Raises:
        ValueError: no step, attention or masks that do not fit the images or the grid, an unknown
            choice.
    """
    steps = chosen_steps(attention, most)
    check_sheet(
        images, {f"step {step}": attention[step] for step in steps}, grid, masks, style, scale
    )
    means = [attention[step].float().mean(dim=1) for step in steps]
    sheet = Sheet(len(images), len(steps) + 1, images)
    for row in range(len(images)):
        mask = None if masks is None else masks[row]
        sheet.image(row, 0, row, mask)
        values = [mean[row] for mean in means]
        for column, top in enumerate(brightest(values, means, scale)):
            sheet.attention(row, column + 1, row, values[column], grid, style, top, mask)
    sheet.titles(["image", *(f"step {step:,}" for step in steps)], "step")
    return sheet.finish("attention averaged over heads", scale, masks)


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
