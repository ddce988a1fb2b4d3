"""The page of pictures and the pictures on it."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_shows_what_its_examples_save() -> None:
    """As `python docs/make_pictures.py` writes it."""
    text = (DOCS / "pictures.md").read_text(encoding="utf-8")
    code = "".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    saved = set(re.findall(r'"([\w-]+\.png)"', code))
    shown = set(re.findall(r"\]\(img/pictures/([\w.-]+)\)", text))
    there = {path.name for path in (DOCS / "img" / "pictures").iterdir()}
    assert saved == shown == there
    assert sum(path.stat().st_size for path in (DOCS / "img" / "pictures").iterdir()) < 1_300_000


def test_every_public_picture_is_on_the_page() -> None:
    from maskdistill import plotting

    text = (DOCS / "pictures.md").read_text(encoding="utf-8")
    # plot_curves is what a run draws of itself; the trainer's page shows it.
    wanted = set(plotting.__all__) - {"style", "plot_curves"}
    assert {name for name in wanted if name not in text} == set()
