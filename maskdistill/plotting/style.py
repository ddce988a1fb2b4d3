"""How all figures look: sizes, colours, and plots for light and dark pages."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMN, PAGE = 3.3, 6.9
"""Inches of a column and of a page of a paper in two columns."""
DPI = 200
_LEGEND, _HANDLE = 6.5, 0.46
"""Points of a legend's letters, and inches of a line in it with the gaps beside it."""

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
    """Plot figures for a light page: dark text, and no background of their own.

    >>> with style.light():  # doctest: +SKIP
    ...     plot_curves(metrics).savefig("curves-light.svg")
    """
    with _inked("light"):
        yield


@contextmanager
def dark() -> Iterator[None]:
    """Plot figures for a dark page: light text, and no background of their own.

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


def new_figure(width: float, height: float, layout: str = "constrained") -> Figure:
    """Return an empty figure of so many inches; "none" leaves its parts where they are put."""
    from maskdistill.plotting.page import Page

    return Page(figsize=(width, height), layout=layout, dpi=DPI)


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


def fitted(text: str, width: float, size: float) -> str:
    """Break text into lines that are at most so many inches wide, as its letters are measured.

    Lines end at spaces, after ``_ / = , -`` and before the dots of methods, and within a word only
    where no line takes it.
    """
    return "\n".join(_lines(text, width, size)[0])


def fits(text: str, width: float, size: float) -> bool:
    """Whether `fitted` breaks text at the ends of words alone."""
    return not _lines(text, width, size)[1]


def _lines(text: str, width: float, size: float) -> tuple[list[str], bool]:
    """Return the lines of a text, and whether a word is broken."""
    lines, broken = [""], False
    for piece in re.split(r"(?<=[\s_/=,-])|(?=\.[A-Za-z])", text):
        rest = piece
        while rest:
            if inches((lines[-1] + rest).rstrip(), size) <= width:
                lines[-1] += rest
                break
            if lines[-1]:
                lines.append("")
                continue
            count = max([1, *(n for n in range(1, len(rest)) if inches(rest[:n], size) <= width)])
            broken = broken or len(rest) > count
            lines[-1], rest = rest[:count], rest[count:]
            if rest:
                lines.append("")
    return [line.rstrip() for line in lines if line.strip()], broken


@cache
def inches(text: str, size: float) -> float:
    """Return how wide a line of text is, at this size of letters in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    wide, _, _ = text_to_path.get_text_width_height_descent(
        text, FontProperties(size=size), ismath=False
    )
    return float(wide) / 72


def legend_rows(names: Sequence[str], width: float) -> int:
    """Return how many lines of text a legend of so many inches has."""
    columns, shown = _legend(names, width)
    lines = [name.count("\n") + 1 for name in shown]
    rows = -(-len(names) // columns)
    # A legend is filled column by column.
    return max(sum(lines[start : start + rows]) for start in range(0, len(lines), rows))


def _legend(names: Sequence[str], width: float) -> tuple[int, list[str]]:
    """Return the columns of a legend, and its names in lines that it takes."""
    shown = [fitted(name, max(0.5, width - _HANDLE), _LEGEND) for name in names]
    column = _HANDLE + max(inches(name, _LEGEND) for name in names)
    columns = max(1, min(len(names), int(width / column)))
    rows = -(-len(names) // columns)
    return -(-len(names) // rows), shown


def legend_above(axis: Any, handles: Mapping[str, Any], width: float) -> None:
    """Name the lines above an axis, where they cover none of them.

    Args:
        axis: of the lines.
        handles: names and lines.
        width: inches that there are; longer names are broken into several lines.
    """
    columns, shown = _legend(list(handles), width)
    axis.legend(
        list(handles.values()), shown, fontsize=_LEGEND, frameon=False, ncols=columns,
        loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.2, handlelength=2.6,
        columnspacing=1.2, labelspacing=0.3, borderpad=0.2,
    )  # fmt: skip


def mark_floors(axis: Any, floors: Mapping[str, float], height: float, side: str = "right") -> None:
    """Plot values to compare with as lines, named on a side of the axis.

    Names that would lie on each other, or on the next line, are pushed apart.

    Args:
        axis: whose limits are final.
        floors: names and values.
        height: inches of the axis, about.
        side: ``"left"`` or ``"right"``.
    """
    ordered = sorted(floors.items(), key=lambda floor: floor[1])
    for number, (_, value) in enumerate(floors.items()):
        axis.axhline(
            value, color=grey(), linewidth=0.9, linestyle=(":", "--", "-.")[number % 3],
            zorder=1,
        )  # fmt: skip
    bottom, top = axis.get_ylim()
    at = [72 * height * (value - bottom) / (top - bottom) for _, value in ordered]
    for (name, value), line, place in zip(ordered, at, _apart(at, 72 * height), strict=True):
        axis.annotate(
            name, (float(side == "right"), value), xycoords=("axes fraction", "data"),
            xytext=(2 if side == "left" else 0, place - line), textcoords="offset points",
            ha=side, va="bottom", fontsize=6, color=grey(),
        )  # fmt: skip


def _apart(lines: Sequence[float], height: float, letters: float = 8.0) -> list[float]:
    """Return where names lie, in points from the bottom: above their lines, or below them.

    Of lines that are near each other the lowest has its name below them where there is room, and
    the others have theirs above the highest, in their order.
    """
    places: list[float] = []
    free, start = 0.0, 0
    while start < len(lines):
        stop = start + 1
        while True:
            crowded = stop - start > 1 or lines[start] + letters > height + 1
            below = crowded and lines[start] - letters - 1 >= free
            end = lines[stop - 1] + 1.5 + letters * (stop - start - below)
            if stop == len(lines) or lines[stop] >= end:
                break
            stop += 1
        if below:
            places.append(lines[start] - letters - 1)
        places += [lines[stop - 1] + 1.5 + letters * i for i in range(stop - start - below)]
        free, start = end, stop
    for number in reversed(range(len(places))):
        most = places[number + 1] if number + 1 < len(places) else height + 2
        places[number] = min(places[number], most - letters)
    return places
