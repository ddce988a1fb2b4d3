"""supported_models, on the meta device; the complete scan is in the long profile."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

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

DOCS = Path(__file__).parents[2] / "docs"
# One model of each of timm's modules, and kinds within them that differ.
OTHERS = (
    "vit_small_patch16_dinov3",
    "deit_tiny_distilled_patch16_224",
    "mvitv2_small_cls",
    "vit_relpos_base_patch16_cls_224",
    "hiera_tiny_abswin_256",
    "pit_ti_distilled_224",
)


def small(names: list[str]) -> str:
    """Return a model of a module that is not among its large ones, if its names tell."""
    words = ("nano", "xxs", "tiny", "_ti_", "small", "_s18", "_s0")
    return next((name for word in words for name in names if word in name), names[0])


SAMPLE = [small(names) for family in FAMILIES if (names := timm.list_models(module=family))]
SAMPLE += [name for name in OTHERS if timm.is_model(name)]


def page_script() -> ModuleType:
    """Return the script that writes the table of docs/models.md."""
    spec = importlib.util.spec_from_file_location("make_models", DOCS / "make_models.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


SCRIPT = page_script()
ON_PAGE = SCRIPT.read(SCRIPT.PAGE.read_text(encoding="utf-8"))
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
    if set(ON_PAGE) <= set(timm.list_models()):  # else the page is for another timm
        assert ON_PAGE[model.name] == SCRIPT.cells(model)


@pytest.mark.parametrize("name", SAMPLE[::3])
def test_a_sample_of_timm(name: str) -> None:
    check(support_of(name))


@pytest.mark.long
@pytest.mark.parametrize("name", transformer_names())
def test_all_of_timm(name: str) -> None:
    check(support_of(name))


def test_patterns() -> None:
    assert [m.name for m in md.models.supported_models("vit_tiny_patch16_2*")] == [
        "vit_tiny_patch16_224"
    ]
    with pytest.raises(ValueError, match="no transformer of timm matches 'resnet50'"):
        md.models.supported_models("resnet50")
