"""``maskdistill models``: what each transformer of timm takes."""

from __future__ import annotations

import dataclasses
import json

from maskdistill.commands.said import progress
from maskdistill.models.backbones import ModelSupport, support_of, transformer_names

_HEAD = ("model", "image", "patch", "token", "drop", "attention", "other sizes")


def models(pattern: str = "vit_*", /, why: bool = False, json: bool = False) -> None:
    """Say what the transformers of timm take: mask tokens, dropped tokens, attention, other sizes.

    maskdistill models "swin_*" --why

    Each model is run on the meta device, without weights and without a download: about a second
    each. Pixels can be masked in front of every one of them.

    Args:
        pattern: which names, as in a shell: "vit_*", "*_dinov2*", "*" for all, some ten minutes.
        why: also say, in a sentence each, why a model does not take something.
        json: print a JSON object per line instead.
    """
    names = transformer_names(pattern)
    if not names:
        raise ValueError(
            f'no transformer of timm matches {pattern!r}. A pattern is as in a shell: "vit_*", in '
            'quotes; "*" is all of them.'
        )
    found = [support_of(name) for name in progress(names, "running models", "model")]
    if json:
        for model in found:
            print(_as_json(model))
        return
    rows = [_HEAD, *map(_row, found)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    for row in rows:
        print("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip())
    if why:
        for model in found:
            for name, reason in model.reasons.items():
                print(f"\n{model.name}, {name}: {reason}")


def _row(model: ModelSupport) -> tuple[str, ...]:
    return (
        model.name,
        "x".join(map(str, model.image_size)),
        "x".join(map(str, model.patch_size)),
        "yes" if model.token else "no",
        "yes" if model.drop else "no",
        model.attention or "no",
        (model.sizes_by or "yes") if model.sizes else "no",
    )


def _as_json(model: ModelSupport) -> str:
    return json.dumps(dataclasses.asdict(model))
