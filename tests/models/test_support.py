"""supported_models, on the meta device; the complete scan is in the long profile."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import maskdistill as md
from maskdistill.models.backbones import (
    FAMILIES,
    ModelSupport,
    build_on_meta,
    support_of,
    transformer_names,
)

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
# The first model of each of timm's modules, and kinds within them that differ.
OTHERS = (
    "vit_small_patch16_dinov3",
    "deit_tiny_distilled_patch16_224",
    "mvitv2_base_cls",
    "vit_relpos_base_patch16_cls_224",
    "hiera_tiny_abswin_256",
    "pit_ti_distilled_224",
)
SAMPLE = [names[0] for family in FAMILIES if (names := timm.list_models(module=family))]
SAMPLE += [name for name in OTHERS if timm.is_model(name)]
# Families whose every model must drop tokens; 271 models in timm 1.0.31.
DROPPING = ("VisionTransformer", "VisionTransformerDistilled", "Eva")


@pytest.fixture(autouse=True)
def needs_the_meta_device() -> None:
    """An older timm cannot build on it, and some of these models fill a memory."""
    with torch.device("meta"):
        try:
            timm.create_model("vit_tiny_patch16_224")
        except RuntimeError:
            pytest.skip("this timm does not build on the meta device")


def check(model: ModelSupport) -> None:
    """What must hold of every model. Anything but a refusal of ours would have raised already."""
    built = build_on_meta(model.name)
    kind = type(built).__name__
    stem = getattr(built, "patch_embed", None)
    if isinstance(stem, nn.Module) and not isinstance(stem, nn.ModuleList):
        assert model.token, "a single patch embedding takes mask tokens"
    if kind in DROPPING:
        assert model.drop, model.reasons
        assert model.sizes_by == "dynamic_img_size"
        assert model.attention is not None
    for missing in ("token", "drop", "attention", "sizes"):
        if not getattr(model, missing):
            reason = model.reasons[missing]
            assert kind in reason
            assert re.search(r"[Uu]se |[Cc]hoose |[Gg]ive ", reason), "what to do instead"


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_timm(name: str) -> None:
    check(support_of(name))


def test_the_page_says_what_is_so() -> None:
    rows = table()
    if not set(rows) <= set(timm.list_models()):
        pytest.skip("the page is for another timm")
    for name in SAMPLE[::6]:
        assert rows[name] == cells(support_of(name))


@pytest.mark.long
@pytest.mark.parametrize("name", transformer_names())
def test_all_of_timm(name: str) -> None:
    model = support_of(name)
    check(model)
    rows = table()
    if name in rows:
        assert rows[name] == cells(model)


def cells(model: ModelSupport) -> tuple[str, ...]:
    sizes = (f"`{model.sizes_by}`" if model.sizes_by else "yes") if model.sizes else "no"
    yes = {True: "yes", False: "no"}
    return yes[model.token], yes[model.drop], model.attention or "no", sizes


def table() -> dict[str, tuple[str, ...]]:
    """Return the long table of docs/models.md: cells by the model's name."""
    lines = PAGE.read_text(encoding="utf-8").split("<!-- models -->")[1].strip().splitlines()[2:]
    found = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
    return {row[0].strip("`"): tuple(row[3:]) for row in found}


def test_patterns() -> None:
    assert [m.name for m in md.models.supported_models("vit_tiny_patch16_2*")] == [
        "vit_tiny_patch16_224"
    ]
    with pytest.raises(ValueError, match="no transformer of timm matches 'resnet50'"):
        md.models.supported_models("resnet50")
