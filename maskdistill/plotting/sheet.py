"""Rows and columns of images and of attention over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

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
from maskdistill.plotting.style import DPI, bare, caption, new_figure

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


class Sheet:
    """Rows and columns of equally large pictures."""

    def __init__(self, rows: int, columns: int, images: Tensor, panel: float) -> None:
        self.images = images
        height = panel * images.shape[2] / images.shape[3]
        self.pixels = int(2 * panel * DPI)
        self.figure = new_figure(panel * columns + 0.25, height * rows + 0.2)
        layout: Any = self.figure.get_layout_engine()
        layout.set(w_pad=0.015, h_pad=0.015, wspace=0, hspace=0)
        self.axes = self.figure.subplots(rows, columns, squeeze=False)
        for axis in self.axes.flat:
            bare(axis)

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

    def row(self, row: int, title: str) -> None:
        """Write beside a row."""
        self.axes[row][0].set_ylabel(title, fontsize=7.5, labelpad=3)

    def column(self, column: int, title: str) -> None:
        """Write above a column."""
        if not column:
            self.figure.set_figheight(self.figure.get_figheight() + 0.16)
        self.axes[0][column].set_title(title, fontsize=7, pad=3)

    def finish(self, said: str, scale: Scale, masks: Tensor | None) -> Figure:
        """Write the caption."""
        outline = "" if masks is None else "; blue outline: object mask"
        caption(self.figure, f"{said}, {_SCALED[scale]}{outline}")
        return self.figure
