"""How all figures look: sizes, colours, and drawing for light and dark pages."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMN, PAGE = 3.3, 6.9
"""Inches of a column and of a page of a paper in two columns."""
DPI = 200
_LEGEND = 6.5  # points

# Colour-blind-safe (Okabe and Ito, 2008). Blue is too dark for a dark page, sky blue takes its
# place there; yellow is too light for a light page, and is left out.
BLUE, SKY, VERMILION, GREEN = "#0072B2", "#56B4E9", "#D55E00", "#009E73"
PURPLE, ORANGE = "#CC79A7", "#E69F00"
_LINES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1.2, 1, 1.2)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
# Greys of which each has a contrast above 5 to its own page (WCAG 2, level AA asks for 4.5).
_INKS = {"light": ("#1F2328", "#59606A"), "dark": ("#E6E8EB", "#A4ABB5")}


@contextmanager
def light() -> Iterator[None]:
    """Draw figures for a light page: dark text, and no background of their own.

    >>> with style.light():  # doctest: +SKIP
    ...     plot_curves(metrics).savefig("curves-light.svg")
    """
    with _inked("light"):
        yield


@contextmanager
def dark() -> Iterator[None]:
    """Draw figures for a dark page: light text, and no background of their own.

    >>> with style.dark():  # doctest: +SKIP
    ...     plot_curves(metrics).savefig("curves-dark.svg")

    The page is taken to be as dark as ``#22272E`` or darker.
    """
    with _inked("dark"):
        yield


@contextmanager
def _inked(page: str) -> Iterator[None]:
    import matplotlib

    ink, _ = _INKS[page]
    look: Any = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink
    )
    look |= dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none")
    with matplotlib.rc_context(look):
        yield


def is_dark() -> bool:
    """Whether matplotlib's present settings are those of a dark page, by their text."""
    import matplotlib
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(matplotlib.rcParams["text.color"])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.5


def ink() -> Any:
    """Return the colour of text."""
    import matplotlib

    return matplotlib.rcParams["text.color"]


def grey() -> str:
    """Return the colour of captions and reference lines, which reads on the present page."""
    return _INKS["dark" if is_dark() else "light"][1]


def accent() -> str:
    """Return the colour of the only line of a plot."""
    return SKY if is_dark() else BLUE


def series(number: int) -> dict[str, Any]:
    """Return colour, dashes and marker of the n-th line of a plot: each differs by all three."""
    colours = (accent(), VERMILION, GREEN, PURPLE, ORANGE, ink())
    return {
        "color": colours[number % len(colours)],
        "linestyle": _LINES[number % len(_LINES)],
        "marker": _MARKERS[number % len(_MARKERS)],
    }


def styles(names: Sequence[str], order: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """Return the look of each name: by its place in the order, which all plots may share.

    Raises:
        ValueError: a name that the order lacks.
    """
    ordered = list(names if order is None else order)
    lacking = [name for name in names if name not in ordered]
    if lacking:
        raise ValueError(f"order lacks {', '.join(map(repr, lacking))}; it has {ordered}.")
    return {name: series(ordered.index(name)) for name in names}


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches."""
    from maskdistill.plotting.page import Page

    return Page(figsize=(width, height), layout="constrained", dpi=DPI)


def bare(axis: Any) -> Any:
    """Take ticks and frame away, for a picture."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    axis.patch.set_visible(False)
    return axis


def plain(axis: Any) -> Any:
    """Give an axis small ticks and no frame above and at the right, for lines."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=7, length=2.5, pad=2)
    axis.xaxis.label.set_fontsize(8)
    axis.yaxis.label.set_fontsize(8)
    return axis


def caption(figure: Figure, text: str, size: float = 6.5) -> None:
    """Write below a figure, in as many lines as its width takes."""
    figure.supxlabel(wrapped(text, figure.get_figwidth(), size), fontsize=size, color=grey())


def wrapped(text: str, width: float, size: float) -> str:
    """Break text into lines of so many inches, at this size of letters in points."""
    # A letter is half as wide as it is high, and a little more to be sure.
    return textwrap.fill(text, max(10, int(width * 72 / (0.56 * size))))


def legend_rows(names: Sequence[str], width: float) -> int:
    """Return how many rows a legend of so many inches has."""
    inches = 0.42 + max(len(name) for name in names) * 0.56 * _LEGEND / 72
    columns = max(1, min(len(names), int(width / inches)))
    return -(-len(names) // columns)


def legend_above(axis: Any, handles: Mapping[str, Any], width: float) -> None:
    """Name the lines above an axis, where they cover none of them.

    Args:
        axis: of the lines.
        handles: names and lines.
        width: inches that there are.
    """
    axis.legend(
        list(handles.values()), list(handles), fontsize=_LEGEND, frameon=False,
        ncols=-(-len(handles) // legend_rows(list(handles), width)),
        loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.2, handlelength=2.6,
        columnspacing=1.2, labelspacing=0.3, borderpad=0.2,
    )  # fmt: skip
