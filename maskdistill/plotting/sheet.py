"""Rows and columns of images and of attention over them."""

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
from maskdistill.plotting.style import (
    DPI,
    PAGE,
    bare,
    caption,
    fits,
    fitted,
    inches,
    new_figure,
)

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
