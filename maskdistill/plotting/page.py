"""The figure of every picture; it imports matplotlib, so it is imported late."""

from __future__ import annotations

import io
import os
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Text stays text, which can be searched and set in a page's own font.
_VECTOR: Any = {"svg.fonttype": "none", "pdf.fonttype": 42, "svg.hashsalt": "maskdistill"}
# The same figure is the same file, whenever it is written.
_UNDATED = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}


class Page(Figure):
    """A figure without pyplot: no window, no global state, no backend to choose."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        FigureCanvasAgg(self)

    def savefig(self, fname: Any, *, transparent: bool | None = None, **kwargs: Any) -> None:
        """Write the figure as its name says: .png, .svg, .pdf and what else matplotlib knows."""
        suffix = os.path.splitext(fname)[1][1:] if isinstance(fname, str | os.PathLike) else ""
        kind = (kwargs.get("format") or suffix or matplotlib.rcParams["savefig.format"]).lower()
        if kind in _UNDATED:
            kwargs["metadata"] = {**_UNDATED[kind], **(kwargs.get("metadata") or {})}
        with matplotlib.rc_context(_VECTOR):
            super().savefig(fname, transparent=transparent, **kwargs)

    def _repr_png_(self) -> bytes:
        """Return what a notebook shows."""
        written = io.BytesIO()
        self.savefig(written, format="png")
        return written.getvalue()
