"""All figures: nothing is cut off, files are what their names say, text reads on its page."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from maskdistill import plotting
from maskdistill.plotting import style
from maskdistill.plotting.style import series
from tests.plotting.shown import (
    contrast,
    curve,
    every_figure,
)

FIGURES = (
    "views", "masker", "attention", "heads", "strip", "curves", "bands", "occlusion", "intervals"
)  # fmt: skip


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    made = every_figure()
    assert tuple(made) == FIGURES
    return made


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_cut_off(figures: dict[str, Any], name: str) -> None:
    """All that is drawn lies within the figure, and no title covers another."""
    figure = figures[name]
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    drawn = figure.get_tightbbox(renderer).extents * style.DPI
    # The extents of a text have some room above and below its letters.
    assert (drawn[:2] > -3).all(), drawn
    assert drawn[2] < figure.bbox.width + 3
    assert drawn[3] < figure.bbox.height + 3
    titles = [axis.title.get_window_extent(renderer) for axis in figure.axes if axis.get_title()]
    for i, one in enumerate(titles):
        assert not any(one.overlaps(other) for other in titles[:i])


@pytest.mark.parametrize("name", FIGURES)
def test_vector_files_keep_text_as_text(figures: dict[str, Any], name: str, tmp_path: Path) -> None:
    figures[name].savefig(tmp_path / "x.svg")
    svg = (tmp_path / "x.svg").read_text(encoding="utf-8")
    words = " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg))
    wanted = {"views": "student sees", "masker": "P(hidden)", "curves": "nats"}
    assert wanted.get(name, "") in words
    assert words
    pictures = name in ("views", "masker", "attention", "heads", "strip")
    assert ("data:image/png;base64" in svg) == pictures
    if name not in ("strip", "intervals"):  # pictures and lines; the others are their like
        return
    figures[name].savefig(tmp_path / "x.pdf")
    pdf = (tmp_path / "x.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert b"/FontFile2" in pdf  # TrueType, which is text; type 3 is drawn shapes


def test_a_file_is_the_same_each_time(tmp_path: Path) -> None:
    for suffix in ("svg", "pdf", "png"):
        written = []
        for i in range(2):
            path = tmp_path / f"{i}.{suffix}"
            plotting.plot_occlusion({"none": curve(0.6)}).savefig(path)
            written.append(path.read_bytes())
        assert written[0] == written[1], suffix
    drawn = io.BytesIO()
    plotting.plot_occlusion({"none": curve(0.6)}).savefig(
        drawn, format="svg", metadata={"Title": "x"}
    )
    assert b"<dc:title>x</dc:title>" in drawn.getvalue()
    assert b"<dc:date>" not in drawn.getvalue()


def test_no_figure_touches_pyplot_or_the_settings() -> None:
    code = """if True:
        import sys
        from maskdistill import plotting
        assert "matplotlib" not in sys.modules
        import matplotlib
        def settings():  # to ask for the backend would choose one, by way of pyplot
            names = set(matplotlib.rcParams) - {"backend"}
            return {name: matplotlib.rcParams[name] for name in names}
        before = settings()
        with plotting.style.dark():
            figure = plotting.plot_occlusion({"none": ((0.0, 0.5), (0.6, 0.3))})
        assert figure._repr_png_().startswith(b"\\x89PNG")
        assert settings() == before
        assert "matplotlib.pyplot" not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("page", "paper"), [("light", "#FFFFFF"), ("dark", "#22272E")])
def test_text_reads_on_its_page(page: str, paper: str) -> None:
    background = matplotlib.colors.to_rgb(paper)
    with getattr(style, page)():
        for name, figure in every_figure().items():
            assert figure.get_facecolor()[3] == 0  # the page's own background is seen
            for text in figure.findobj(matplotlib.text.Text):
                behind = text.get_bbox_patch()
                on = background if behind is None else behind.get_facecolor()
                if text.get_text().strip():
                    colour = matplotlib.colors.to_rgb(text.get_color())
                    assert contrast(colour, on) >= 4.5, (name, text)
        lines = [matplotlib.colors.to_rgb(series(i)["color"]) for i in range(6)]
        assert min(contrast(line, background) for line in lines) > 2
        assert min(contrast(line, background) for line in lines[:3]) > 3


def test_twenty_lines_differ_in_more_than_colour() -> None:
    looks = [series(i) for i in range(20)]
    in_print = [(str(look["linestyle"]), look["marker"]) for look in looks[:8]]
    assert len(set(in_print)) == 8
    assert len({(str(x["linestyle"]), x["marker"], x["color"]) for x in looks}) == 20
