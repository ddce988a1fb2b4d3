"""Write the tables of docs/models.md by running every transformer of timm on the meta device.

python docs/make_models.py            # all, about ten minutes on one core
python docs/make_models.py "vit_*"    # these alone; the other lines stay as they are
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from maskdistill.models.backbones import ModelSupport, family_of, support_of, transformer_names

PAGE = Path(__file__).parent / "models.md"
MARKS = ("<!-- families -->", "<!-- models -->")


def row(model: ModelSupport) -> str:
    """Return a model's line in the long table."""
    sizes = {True: f"`{model.sizes_by}`" if model.sizes_by else "yes", False: "no"}[model.sizes]
    cells = [
        f"`{model.name}`",
        "x".join(map(str, model.image_size)),
        "x".join(map(str, model.patch_size)),
        "yes" if model.token else "no",
        "yes" if model.drop else "no",
        model.attention or "no",
        sizes,
    ]
    return f"| {' | '.join(cells)} |"


def models_table(models: list[ModelSupport]) -> str:
    """Return the long table: one line per model."""
    head = "| model | image | patch of the mask | token | drop | attention | other sizes |"
    return "\n".join([head, "|---|---|---|---|---|---|---|", *map(row, models)])


def families_table(models: list[ModelSupport]) -> str:
    """Return the short table: one line per module of timm, with counts where its models differ."""
    lines = ["| timm's module | models | token | drop | attention | other sizes |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for family in dict.fromkeys(model.family for model in models):
        of = [model for model in models if model.family == family]
        attention = Counter(model.attention or "no" for model in of)
        sizes = Counter(
            (f"`{model.sizes_by}`" if model.sizes_by else "yes") if model.sizes else "no"
            for model in of
        )
        cells = [
            family,
            str(len(of)),
            _share(Counter("yes" if model.token else "no" for model in of)),
            _share(Counter("yes" if model.drop else "no" for model in of)),
            _share(attention),
            _share(sizes),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(values: Counter[str]) -> str:
    if len(values) == 1:
        return next(iter(values))
    return ", ".join(f"{value} ({count})" for value, count in values.most_common())


def fill(page: str, mark: str, table: str) -> str:
    """Return the page with the table between two marks replaced."""
    before, _, after = page.split(mark)
    return f"{before}{mark}\n\n{table}\n\n{mark}{after}"


def read(page: str) -> dict[str, ModelSupport]:
    """Return the models of the long table as it stands, by name."""
    models = {}
    for line in page.split(MARKS[1])[1].strip().splitlines()[2:]:
        name, image, patch, token, drop, attention, sizes = (
            cell.strip(" `") for cell in line.strip("|").split("|")
        )
        models[name] = ModelSupport(
            name=name,
            family=family_of(name),
            image_size=_pair(image),
            patch_size=_pair(patch),
            token=token == "yes",
            drop=drop == "yes",
            attention=None if attention == "no" else attention,
            sizes=sizes != "no",
            sizes_by="" if sizes in ("no", "yes") else sizes,
        )
    return models


def _pair(text: str) -> tuple[int, int]:
    height, width = map(int, text.split("x"))
    return height, width


def main() -> None:
    """Run the models and write the page."""
    pattern = sys.argv[1] if len(sys.argv) > 1 else "*"
    fresh = [support_of(name) for name in tqdm(transformer_names(pattern), unit="model")]
    page = PAGE.read_text(encoding="utf-8")
    known = {} if pattern == "*" else read(page)
    known.update({model.name: model for model in fresh})
    models = [known[name] for name in transformer_names() if name in known]
    for mark, table in zip(MARKS, (families_table(models), models_table(models)), strict=True):
        page = fill(page, mark, table)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
