"""Makes the pictures of docs/pictures.md by running the code that stands on that page.

    python docs/make_pictures.py

It writes docs/img/pictures/*: every .png that the page's examples save.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

DOCS = Path(__file__).parent
PICTURES = DOCS / "img" / "pictures"
WIDTH = 700
"""Pixels."""


def main() -> None:
    """Run the page, and write its pictures."""
    with tempfile.TemporaryDirectory() as folder:
        before = Path.cwd()
        os.chdir(folder)
        try:
            run(page())
        finally:
            os.chdir(before)
        PICTURES.mkdir(parents=True, exist_ok=True)
        for old in PICTURES.iterdir():
            old.unlink()
        for path in sorted(Path(folder).iterdir()):
            if path.suffix == ".png":
                write_small(path, PICTURES / path.name)


def page() -> str:
    """Return the page that the pictures stand on."""
    return (DOCS / "pictures.md").read_text(encoding="utf-8")


def run(text: str) -> None:
    """Run all examples of a page in one namespace and in the present folder."""
    namespace: dict[str, Any] = {"__name__": "a_page_of_the_docs"}
    for code in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        exec(compile(code, "pictures.md", "exec"), namespace)


def write_small(source: Path, target: Path) -> None:
    """Write a picture no wider than a page of the documentation shows it."""
    with Image.open(source) as opened:
        picture = opened.convert("RGB")
    if picture.getcolors(5000):  # lines and flat colours
        picture.quantize(256, dither=Image.Dither.NONE).save(target, optimize=True)
        return
    if picture.width > WIDTH:
        height = round(picture.height * WIDTH / picture.width)
        picture = picture.resize((WIDTH, height), Image.Resampling.LANCZOS)
    picture.save(target, optimize=True)


if __name__ == "__main__":
    main()
