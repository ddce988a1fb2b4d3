"""Write the table of docs/models.md by running every transformer of timm on the meta device.

python docs/make_models.py            # all, about ten minutes on one core
python docs/make_models.py "vit_*"    # these alone; the others stay as they are
"""

from __future__ import annotations

import sys
from pathlib import Path

from tqdm import tqdm

from maskdistill.models.backbones import ModelSupport, support_of, transformer_names

PAGE = Path(__file__).parent / "models.md"
MARK = "<!-- models -->"
HEAD = """\
| timm's module | patch | masks | attention | image sizes | models |
|---|---|---|---|---|---|"""


def cells(model: ModelSupport) -> tuple[str, ...]:
    """Return what the table says of a model: module, patch, masks, attention, image sizes."""
    masks = [name for name in ("token", "drop") if getattr(model, name)]
    sizes = f"`{model.sizes_by}`" if model.sizes_by else "any" if model.sizes else "one"
    return (
        model.family,
        "x".join(map(str, model.patch_size)),
        ", ".join([*masks, "pixel"]),
        model.attention or "none",
        sizes,
    )


def read(page: str) -> dict[str, tuple[str, ...]]:
    """Return the cells of every model in the table, by its name."""
    found = {}
    for line in page.split(MARK)[1].strip().splitlines()[2:]:
        *row, names = (cell.strip() for cell in line.strip("|").split("|"))
        found.update({name.strip("`"): tuple(row) for name in names.split()})
    return found


def table(models: dict[str, tuple[str, ...]]) -> str:
    """Return the table: models of one module that take the same share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, row in models.items():
        rows.setdefault(row, []).append(f"`{name}`")
    lines = [f"| {' | '.join(row)} | {' '.join(names)} |" for row, names in rows.items()]
    return "\n".join([HEAD, *lines])


def main() -> None:
    """Run the models and write the page."""
    pattern = sys.argv[1] if len(sys.argv) > 1 else "*"
    fresh = {
        name: cells(support_of(name)) for name in tqdm(transformer_names(pattern), unit="model")
    }
    page = PAGE.read_text(encoding="utf-8")
    known = (read(page) if pattern != "*" else {}) | fresh
    models = {name: known[name] for name in transformer_names() if name in known}
    before, _, after = page.split(MARK)
    PAGE.write_text(f"{before}{MARK}\n\n{table(models)}\n\n{MARK}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
